"""A picture of what the suites measured: ratios as bars, drawn from the JSON files they wrote."""

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.per_example import NORMS
from experiments import runs

OURS, OTHERS = "#cc3355", "#8899aa"


class Panel(NamedTuple):
    """The bars of one table."""

    heading: str
    rows: Sequence[dict[str, Any]]
    label: Callable[[dict[str, Any]], str] = lambda row: row["contender"]


def draw_figure(folder: Path, path: Path) -> list[str]:
    """Draws the main tables of `epoch`, `per_example` and `sweep` into a PNG file.

    Args:
      folder: Of `<suite>.json`, as `--out_dir` has them written.
      path: Of the file, replaced where there is one.

    Returns:
      The headings of what was drawn.

    Raises:
      FileNotFoundError: there is not one such table in the folder.
    """
    panels = [
        panel
        for suite, make in (("epoch", _epoch), ("per_example", _per_example), ("sweep", _sweep))
        if (folder / f"{suite}.json").is_file()
        for panel in make(json.loads((folder / f"{suite}.json").read_text())["tables"])
        if panel.rows
    ]
    if not panels:
        raise FileNotFoundError(
            f"{folder} holds no main table of epoch.json, per_example.json or sweep.json; expected "
            "what --suite=epoch --out_dir=FOLDER and the like write"
        )
    heights = [len(panel.rows) + 3 for panel in panels]
    figure = Figure(figsize=(9, 0.26 * sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw(axes, panel)
    runs.save_figure(path, figure)
    return [panel.heading for panel in panels]


def _epoch(tables: Sequence[dict[str, Any]]) -> list[Panel]:
    def label(row: dict[str, Any]) -> str:
        return row["contender"] + ", cross-entropy" * row["question"].startswith("cross")

    return [
        Panel(f"Time of {table['work']}", table["rows"], label)
        for table in tables
        if table["suite"] == "epoch"
    ]


def _per_example(tables: Sequence[dict[str, Any]]) -> list[Panel]:
    """Norms and mean gradient, beside the plain gradient of the same library."""
    networks = [table for table in tables if table["suite"] in ("mlp", "conv", "transformer")]
    return [
        Panel(
            "Norms of all gradients and their mean, in plain gradients of the same library: "
            + table["work"],
            [row for row in table["rows"] if row["question"] == NORMS],
        )
        for table in networks
    ]


def _sweep(tables: Sequence[dict[str, Any]]) -> list[Panel]:
    def label(row: dict[str, Any]) -> str:
        return f"{row['contender']}, {row['question']}"

    return [Panel(f"Sweeps: {table['work']}", table["rows"], label) for table in tables]


def _draw(axes: Any, panel: Panel) -> None:
    """Draws a bar from 1 to each ratio on a logarithmic axis, the least ratio on top."""
    rows = sorted(panel.rows, key=lambda row: row["ratio"])
    ratios = [row["ratio"] for row in rows]
    colors = [OURS if row["contender"].startswith("sgd_jax") else OTHERS for row in rows]
    places = range(len(ratios))
    axes.barh(places, [ratio - 1 for ratio in ratios], left=1, color=colors, height=0.65)
    axes.scatter(ratios, places, color=colors, s=22, zorder=3)
    for place, ratio in zip(places, ratios, strict=True):
        digits = "{:.2f}" if ratio < 10 else "{:.0f}"
        axes.annotate(
            digits.format(ratio), (max(ratio, 1), place), (7, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(min(*ratios, 1) / 1.2, max(*ratios, 1) * 1.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.set_yticks(places, [panel.label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    heading = "\n".join(textwrap.wrap(panel.heading, 88))
    axes.set_title(heading, fontsize=9, loc="left", parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="x", which="both", labelsize=8)
