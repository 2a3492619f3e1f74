"""sgd-jax: the programs of this package by name, each as `python -m experiments.NAME` runs it.

Importing this module imports no JAX, so that help and a mistyped name are answered at once.
"""

import ast
import difflib
import importlib
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

USAGE = """\
How good is a mini-batch gradient? Stochastic gradient descent in JAX, by experiments.

usage: sgd-jax PROGRAM [--flag=value ...]
       sgd-jax PROGRAM --help
       sgd-jax --version

programs; the beginning of a name is enough where no other begins so:
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a program, with ``arguments`` or those of the command line; returns the exit code."""
    first, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if first == "help" and rest:
        first, rest = rest[0], ["--help"]
    if first in ("-h", "-help", "--help", "help"):
        return _show(help_text())
    if first == "--version":
        print(f"sgd_jax {metadata.version('sgd_jax')}")
        return 0
    try:
        program = find_program(first)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, _end_at_once)  # until the program takes its signals
        importlib.import_module(f"{__package__}.runs")  # which says what to install
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.argv = [f"sgd-jax {program}", *rest]
    runpy.run_module(f"{__package__}.{program}", run_name="__main__", alter_sys=True)
    return 0


def _show(text: str) -> int:
    """Prints a text; returns the exit code, that of SIGPIPE if nobody reads it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os._exit(128 + signal.SIGPIPE)  # or Python would try again as it ends
    return 0


def _end_at_once(number: int, frame: Any) -> None:
    """Ends a program that is still being imported; an exception could be lost in a callback."""
    del frame
    os.write(2, b"error: stopped by SIGINT\n")
    os._exit(128 + number)


def programs() -> dict[str, str]:
    """Returns the programs: names, and the question of each, the first line of its docstring."""
    sources = sorted(Path(__file__).parent.glob("[a-z]*.py"))
    docs = {path.stem: ast.get_docstring(ast.parse(path.read_bytes())) for path in sources}
    return {name: (doc or "").partition("\n")[0] for name, doc in docs.items()}


def help_text() -> str:
    """Returns the text of --help: the programs and their questions."""
    questions = programs()
    width = max(map(len, questions))
    return USAGE + "\n".join(f"  {name:{width}}  {text}" for name, text in questions.items())


def find_program(word: str) -> str:
    """Returns the program that a word names or begins; raises ValueError for none or several."""
    names = programs()
    word_of_module = word.replace("-", "_")
    if word_of_module in names:
        return word_of_module
    found = [name for name in names if word_of_module and name.startswith(word_of_module)]
    if len(found) != 1:
        meaning = f"may be {' or '.join(found)}" if found else "names no program"
        close = difflib.get_close_matches(word_of_module, names, n=1)
        remedy = f"Did you mean {close[0]}?" if close and not found else "See --help"
        raise ValueError(f"{word!r} {meaning}; expected one of {', '.join(names)}. {remedy}")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
