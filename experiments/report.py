"""What came out of one run, or of several, on one page?

Makes `report.html` of a run folder anew, also of a run of `train` that has not come to an end. With
several run folders, writes their reports one after the other into one page. Either needs no other
file, so it can be sent to someone.

  python -m experiments.report runs/mine --open
  python -m experiments.report runs/mine runs/yours --output=both.html

Expected: the name of the file written, in a few seconds.
"""

import webbrowser
from pathlib import Path

from absl import flags

from experiments import _cli, _recorded, runs

_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "File of the page; by default report.html of the one run. Only a report is overwritten.",
)
_TITLE = flags.DEFINE_string("title", None, "Of a page of several runs.")
_OPEN = flags.DEFINE_boolean("open", False, "Show the page in a browser.")
GROUPS: _cli.HelpGroups = {"Report": (_OUTPUT, _TITLE, _OPEN)}


def run(folders: list[Path], output: Path | None = None, title: str | None = None) -> Path:
    """Writes the report of one run, or the reports of several as one page; returns its file.

    Args:
      folders: Of the runs.
      output: Of the page; by default `report.html` of the one run.
      title: Of a page of several runs; by default it says how many.

    Raises:
      ValueError: several runs and no ``output``; one run and a ``title``.
      FileNotFoundError: a folder is not that of a run, or holds nothing to report yet.
      FileExistsError: ``output`` exists and is no report.
    """
    if len(folders) > 1 and output is None:
        raise ValueError("output is not given; expected a file for the page of several runs")
    if len(folders) == 1 and title is not None:
        raise ValueError(f"title is {title!r}; a page of one run has the title that the run gave")
    if output is not None and output.exists() and not _is_report(output):
        raise FileExistsError(
            f"output is {str(output)!r}, which exists and is no report; expected a new file"
        )
    pages = []
    for path in folders:
        folder = runs.RunFolder.open(path.absolute().parent, path.absolute().name)
        _recorded.renew_report(folder)
        pages.append(runs.read_page(folder.report_path))
    if output is None:
        return runs.RunFolder(folders[0]).report_path
    output.parent.mkdir(parents=True, exist_ok=True)
    if len(pages) == 1:
        report = runs.RunFolder(folders[0]).report_path
        runs.write_text(output, report.read_text(encoding="utf-8"))
    else:
        runs.write_joined_page(output, title or f"Reports of {len(pages)} runs", pages)
    return output


def _is_report(path: Path) -> bool:
    with open(path, "rb") as file:
        return f'<meta name="generator" content="{runs.GENERATOR}">'.encode() in file.read(1000)


def main(*folders: str) -> int:
    """Reads the flags, writes the page; returns the exit code."""
    with _cli.user_errors():
        output = Path(_OUTPUT.value) if _OUTPUT.value else None
        path = run([Path(folder) for folder in folders], output, _TITLE.value)
    print(f"report: {path}")
    if _OPEN.value and not webbrowser.open(path.absolute().as_uri()):
        print("no browser was found to show it in")
    return 0


if __name__ == "__main__":
    _cli.start(main, __doc__ or "", GROUPS, operands="folders of runs, as in runs/mine")
