"""Files that are whole at any moment, and clear words about those that are not."""

import json
import math
import os
from pathlib import Path
from typing import Any

from sgd_jax.distributed import processes

_MAX_DIGITS = 20  # of a whole number: any of 64 bits


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by ``value`` as JSON, atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces a file by ``text``, atomically: through a temporary file in the same folder.

    Of several processes the first does it, here as everywhere in `experiments.runs`.
    """
    if not processes.is_first():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises ValueError, with the path, where there is none."""
    return parse_object(path.read_bytes(), str(path))


def parse_object(text: bytes, name: str) -> dict[str, Any]:
    """Returns the JSON object that ``text`` is; raises ValueError, with ``name``, otherwise."""
    try:
        value = json.loads(
            text.decode("utf-8"), parse_constant=_refuse, parse_int=_int, parse_float=_float
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: {error}; expected a JSON object") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is damaged: it holds {value!r:.40}; expected a JSON object")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large")
    return value
