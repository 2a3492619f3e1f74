"""Metrics for TensorBoard and Weights & Biases, by their own libraries, imported when asked for."""

import statistics
from collections.abc import Callable
from typing import Any, Protocol

from experiments.runs.folder import Record, RunFolder


class Logger(Protocol):
    """Where lines of metrics go besides `metrics.jsonl`."""

    def log(self, record: Record) -> None:
        """Takes one line of metrics; it can be read elsewhere when this returns."""

    def close(self) -> None:
        """Ends the log."""


def scalars(record: Record) -> dict[str, float]:
    """Returns the numbers of a line by name, several seeds as name/median, name/min and name/max.

    None, which is no number, is left out.

    >>> scalars({"epoch": 1, "cost_train": [3.0, 1.0, 2.0], "seconds": 0.5, "note": None})
    {'cost_train/median': 2.0, 'cost_train/min': 1.0, 'cost_train/max': 3.0, 'seconds': 0.5}
    """
    flat = {}
    for name, value in record.items():
        if isinstance(value, list):
            value = [number for number in value if number is not None]
            if not value:
                continue
            flat[f"{name}/median"] = float(statistics.median(value))
            flat[f"{name}/min"] = float(min(value))
            flat[f"{name}/max"] = float(max(value))
        elif value is not None and name != "epoch":
            flat[name] = float(value)
    return flat


class TensorBoardLogger:
    """Writes event files into `tensorboard/` of the run; the axis is the epoch."""

    def __init__(self, folder: RunFolder, config: dict[str, Any]):
        del config  # it is in config.json
        self._writer = _import_tensorboard().Writer(str(folder.path / "tensorboard"))

    def log(self, record: Record) -> None:
        """See `Logger`."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, step=record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """See `Logger`."""
        self._writer.close()


class WandbLogger:
    """Sends to Weights & Biases, project `sgd_jax`, under the name of the run.

    Its own environment variables apply: with ``WANDB_MODE=offline`` nothing leaves the machine and
    the log lies in `wandb/` of the run.
    """

    def __init__(self, folder: RunFolder, config: dict[str, Any]):
        name = folder.path.name
        self._run = _import_wandb().init(
            project="sgd_jax", name=name, id=name, resume="allow", dir=folder.path, config=config
        )

    def log(self, record: Record) -> None:
        """See `Logger`."""
        self._run.log(scalars(record), step=record["epoch"])

    def close(self) -> None:
        """See `Logger`."""
        self._run.finish()


LOGGERS: dict[str, Callable[[RunFolder, dict[str, Any]], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}
"""By the name that --log_to knows; JSON lines are written in any case."""


def check_loggers(names: tuple[str, ...]) -> None:
    """Raises ValueError at an unknown name, ImportError where the library is not installed."""
    for name in names:
        if name not in ("jsonl", *LOGGERS):
            raise ValueError(
                f"log_to names {name!r}; expected any of jsonl (always on), {', '.join(LOGGERS)}, "
                "separated by commas"
            )
    if "tensorboard" in names:
        _import_tensorboard()
    if "wandb" in names:
        _import_wandb()


def _import_tensorboard() -> Any:
    try:
        from tensorboard import summary
    except ImportError as error:
        raise _missing("tensorboard") from error
    return summary


def _import_wandb() -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _missing("wandb") from error
    return wandb


def _missing(name: str) -> ImportError:
    return ImportError(
        f"log_to names {name}, which is not installed. Run: pip install 'sgd_jax[{name}]', or drop "
        "it from --log_to"
    )
