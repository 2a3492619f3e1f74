"""What experiments that answer by a table share: their settings, and all that they leave behind."""

import csv
import dataclasses
import html
import io
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from matplotlib.figure import Figure

from experiments import _flags, _recorded, _signals, runs
from experiments._cli import HelpGroups
from experiments._console import TableDisplay
from experiments._recorded import Output
from sgd_jax.distributed import processes

Row = dict[str, Any]
"""A line of a table: values by name, None where there is none."""

Own = TypeVar("Own")


class Column(NamedTuple):
    """What a column of the table shows of a row."""

    name: str
    label: str
    template: str = "{}"
    missing: str = "–"
    """Stands for None."""
    scale: float = 1
    """Of the unit shown: 1e6 shows microseconds of seconds."""

    def cell(self, row: Mapping[str, Any]) -> str:
        """Returns the value as it is shown."""
        value = row[self.name]
        if value is None:
            return self.missing
        return self.template.format(value if self.scale == 1 else self.scale * value)


class Picture(NamedTuple):
    """A figure of the report."""

    heading: str
    description: str
    """What a person sees who does not see it."""
    figure: Figure | Callable[[Path], None]
    """To be drawn, or what writes the file, given its path."""
    stem: str
    """Of its file: `figures/<stem>.png`."""
    suffix: str = ".png"
    """Of its file, where it is not drawn."""


class Table(NamedTuple):
    """The columns of a table, and what it is called."""

    columns: Sequence[Column]
    heading: str = "Table"
    stem: str = "table"
    """Of its file: `<stem>.csv`."""
    legend: str = ""
    """What the columns mean, where their labels do not say."""

    def labels(self) -> list[str]:
        """Returns the headings of the columns."""
        return [column.label for column in self.columns]

    def cells(self, row: Mapping[str, Any]) -> list[str]:
        """Returns a row as it is shown, in the order of `labels`."""
        return [column.cell(row) for column in self.columns]


Show = Callable[[Table, Row], None]
"""Shows a row of a table as soon as it is there."""


class Answer(NamedTuple):
    """What an experiment found."""

    title: str
    summary: Row
    """A few numbers, ready for JSON."""
    tables: Sequence[tuple[Table, Sequence[Row]]]
    pictures: Sequence[Picture]
    curves: Mapping[str, Sequence[Row]] = {}
    """Rows too many to show, each to a CSV file of its name."""


def groups(own: HelpGroups, *omitted: str, shared: Sequence[str]) -> HelpGroups:
    """Returns the flags of an experiment by heading: its own, then those shared with training.

    Args:
      own: Its own flags by heading.
      *omitted: Names of shared flags that it does not read.
      shared: Headings of `_flags.GROUPS` that it takes flags from.
    """
    omitted = (*omitted, "resume", "log_to")
    kept = {
        heading: tuple(holder for holder in _flags.GROUPS[heading] if holder.name not in omitted)
        for heading in shared
    }
    return {**own, **kept}


def take(given: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Takes out of ``given`` the settings that are fields of a dataclass."""
    return {f.name: given.pop(f.name) for f in dataclasses.fields(kind) if f.name in given}


def read_settings(
    kind: Callable[..., Own],
    flag_groups: HelpGroups,
    smoke: Mapping[str, Any],
) -> tuple[Own, dict[str, Any], Output]:
    """Returns the experiment's own settings, those of training that are given, and the output.

    Args:
      kind: The dataclass of its own settings.
      flag_groups: The flags that the program reads.
      smoke: Its own settings with --smoke, where they are not given.

    Raises:
      ValueError: a setting is wrong whatever the data are.
      OSError: the folder exists already, or cannot be written to.
    """
    given = _flags.given_settings(flag_groups)
    own, output = take(given, kind), Output(**take(given, Output))
    for name, value in own.items():
        if isinstance(value, list):
            own[name] = tuple(value)
    if "batch_sizes" in own:
        own["batch_sizes"] = _flags.parse_batch_sizes(own["batch_sizes"])
    config = kind(**((dict(smoke) if given.get("smoke") else {}) | own))
    processes.from_first(lambda: _recorded.read_stored(output))
    return config, given, output


def record(
    folder: runs.RunFolder,
    notes: Sequence[str],
    total: int,
    find: Callable[[Show], Answer],
    unit: str = "row",
    can_resume: bool = False,
) -> int:
    """Finds the answer, showing tables as they grow, and writes it; returns the exit code.

    Leaves a CSV file of each table, `figures/`, `report.html` and, last of all, `summary.json`, and
    gives the folder back. Of an interrupted run the rows shown so far are left.

    Args:
      folder: Of the run.
      notes: Shown first.
      total: How many rows there will be, for the progress bar.
      find: Called with what shows a row; an ArithmeticError that it raises is told to the user.
      unit: What a row is.
      can_resume: Whether the program has --resume.
    """
    shown: dict[Table, list[Row]] = {}
    try:
        return _record(folder, notes, total, find, unit, shown)
    except KeyboardInterrupt as error:
        return _leave_what_is_there(folder, shown, error, can_resume)
    finally:
        folder.lock.release()


def _record(
    folder: runs.RunFolder,
    notes: Sequence[str],
    total: int,
    find: Callable[[Show], Answer],
    unit: str,
    shown: dict[Table, list[Row]],
) -> int:
    began, last = time.perf_counter(), None
    with TableDisplay([], total, unit) as display:
        for note in notes:
            display.say(note)

        def show(table: Table, row: Row) -> None:
            nonlocal last
            if table is not last:
                display.begin(table.labels())
                last = table
            shown.setdefault(table, []).append(row)
            display.add(table.cells(row), sum(map(len, shown.values())))

        try:
            answer = find(show)
        except ArithmeticError as error:
            if processes.is_first():
                print(f"error: {error}", file=sys.stderr)
            return 1
    if not processes.is_first():
        return 0
    seconds = time.perf_counter() - began
    _write(folder, answer, seconds)
    for table, _ in answer.tables:
        if table.legend:
            print(textwrap.fill(table.legend, shutil.get_terminal_size((100, 24)).columns))
    print(f"{seconds:.1f} s in all")
    print(f"run folder: {folder.path}")
    return 0


def _leave_what_is_there(
    folder: runs.RunFolder,
    shown: Mapping[Table, Sequence[Row]],
    error: KeyboardInterrupt,
    can_resume: bool,
) -> int:
    """Writes the rows of an interrupted run and says where; returns the exit code."""
    if processes.is_first():
        with _signals.shielded():
            if shown:
                title = f"{folder.path.name}: interrupted"
                _write_report(folder, Answer(title, {}, list(shown.items()), []))
            left = "the rows found so far are kept" if shown else "no row was found yet"
            if can_resume:
                left += f": continue with --resume --run_name={folder.path.name}"
            print(f"error: {str(error) or 'interrupted'}; {left}", file=sys.stderr)
            print(f"run folder: {folder.path}")
    return _signals.exit_code(error)


def _write(folder: runs.RunFolder, answer: Answer, seconds: float) -> None:
    _write_report(folder, answer, seconds)
    folder.write_summary({"status": "complete", **answer.summary})


def _write_report(folder: runs.RunFolder, answer: Answer, seconds: float | None = None) -> None:
    """Writes pictures, CSV files and the report."""
    header = _recorded.named_numbers(answer.summary)
    if seconds is not None:
        header["seconds in all"] = round(seconds, 1)
    sections = {"": runs.html_pairs(header)} if header else {}
    for picture in answer.pictures:
        path = folder.path / "figures" / f"{picture.stem}{picture.suffix}"
        if isinstance(picture.figure, Figure):
            runs.save_figure(path, picture.figure)
        else:
            picture.figure(path)
        sections[picture.heading] = runs.html_figure(path, picture.description)
    for table, rows in answer.tables:
        legend = f"<p>{html.escape(table.legend)}</p>" if table.legend else ""
        shown = runs.html_table(table.labels(), [table.cells(row) for row in rows])
        sections[table.heading] = legend + shown
    csv_files = {table.stem: rows for table, rows in answer.tables} | dict(answer.curves)
    for stem, rows in csv_files.items():
        runs.write_text(folder.path / f"{stem}.csv", _csv(rows))
    sections["Settings"] = runs.html_pairs(_recorded.shown_settings(folder.read_config()))
    runs.write_page(folder.report_path, answer.title, sections)


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
