"""What a program shows: a table that grows by a line at a time, and a progress bar."""

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import runs


class _Console(Console):
    """A console that tells its caller when nobody reads what it prints; rich would exit."""

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError; rich calls this while it handles one."""
        raise


class TableDisplay:
    """A table and, on a terminal, a progress bar below it; a context manager.

    Args:
      labels: Headings of the columns.
      total: Of what the bar counts, all.
      unit: What the bar counts.
      console: Where to; stdout unless given.
    """

    def __init__(
        self, labels: Sequence[str], total: int, unit: str, console: Console | None = None
    ):
        self._console = console or _Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn(unit),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total)
        self.begin(labels)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, labels: Sequence[str]) -> None:
        """Begins a table: its headings stand above the next line."""
        self._widths = [max(len(label), 8) for label in labels]
        self._head = self._line(labels)
        self._started = False

    def say(self, text: str) -> None:
        """Shows a line of text."""
        self._console.print(text, markup=False, soft_wrap=True)

    def add(self, cells: Sequence[str], completed: int) -> None:
        """Shows a line of the table; ``completed`` of the total are done."""
        if not self._started:
            self._console.print(self._head, style="bold", markup=False, soft_wrap=True)
            self._started = True
        self.say(self._line(cells))
        self._progress.update(self._task, completed=completed)

    def _line(self, cells: Sequence[str]) -> str:
        return "  ".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True))


class TrainingDisplay(TableDisplay):
    """A line of metrics an epoch.

    Args:
      num_epochs: How many epochs the run has when it ends.
      console: Where to; stdout unless given.
    """

    def __init__(self, num_epochs: int, console: Console | None = None):
        super().__init__([], num_epochs, "epoch", console)

    def show(self, record: dict[str, Any]) -> None:
        """Shows a line of metrics; for several seeds their medians."""
        if not self._started:
            self.begin(runs.column_labels(record))
        self.add(runs.format_record(record), record["epoch"])
