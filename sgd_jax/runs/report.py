"""The learning curve of a run as a picture, and reports: one file each that needs no other."""

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sgd_jax.runs.folder import Record, write_text
from sgd_jax.runs.summary import per_seed

_COLORS = {"train": "#4477aa", "validation": "#ccaa22", "test": "#cc3355"}
_COLUMNS = (
    ("epoch", "epoch", "{:d}"),
    ("cost_train", "cost", "{:.4g}"),
    ("accuracy_train", "train", "{:.2%}"),
    ("accuracy_validation", "validation", "{:.2%}"),
    ("accuracy_test", "test", "{:.2%}"),
    ("gradient_norm", "‖∇C‖", "{:.3g}"),
    ("seconds", "seconds", "{:.3f}"),
)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: auto;
  padding: 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; } img { width: 100%; min-width: 48rem; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .8rem .15rem 0; text-align: right; border-bottom: 1px solid #ddd; }
.pairs th, .pairs td { text-align: left; vertical-align: top; font-weight: normal;
  overflow-wrap: anywhere; } .pairs th { color: #666; }
"""


def draw_learning_curve(path: Path, records: Sequence[Record], title: str) -> None:
    """Draws cost, accuracy and gradient norm over the epochs into a PNG file, replaced atomically.

    With several seeds a line is the median, its band reaches from the least to the largest value.
    """
    has_noise = "noise_scale" in records[0]
    figure = Figure(figsize=(15 if has_noise else 12, 3.8), layout="constrained")
    axes = figure.subplots(1, 4 if has_noise else 3)
    epochs = [record["epoch"] for record in records]

    def draw(axis: Any, name: str, color: str, label: str | None = None, scale: float = 1) -> None:
        values = scale * np.array([per_seed(record[name]) for record in records], np.float64)
        axis.plot(epochs, np.median(values, axis=1), color=color, label=label, linewidth=1.5)
        if values.shape[1] > 1:
            axis.fill_between(
                epochs, values.min(axis=1), values.max(axis=1), color=color, alpha=0.18, linewidth=0
            )

    for split, color in _COLORS.items():
        draw(axes[0], f"cost_{split}", color, split)
        draw(axes[1], f"accuracy_{split}", color, split, scale=100)
    draw(axes[2], "gradient_norm", "#333333")
    num_seeds = len(per_seed(records[0]["accuracy_test"]))
    spread = f" (median, least to largest of {num_seeds} seeds)" if num_seeds > 1 else ""
    labels = ["mean cost", "accuracy in %", "‖∇C‖, training set"]
    if has_noise:
        _draw_noise(axes[3], records)
        labels.append("noise scale tr Σ/‖∇C‖², in examples")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_title(label, fontsize=11)
        axis.set_xlabel("epoch (0: before training)")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (axes[0], axes[2]):
        axis.set_yscale("log")
    _leave_out_the_start(axes[1], records)
    axes[1].legend(loc="lower right")
    figure.suptitle(title + spread, fontsize=12, parse_math=False)
    save_figure(path, figure)


def _draw_noise(axis: Any, records: Sequence[Record]) -> None:
    """Draws the noise scale with its interval; the median seed, and a gap where undetermined."""
    epochs = [record["epoch"] for record in records]

    def column(name: str) -> np.ndarray:
        values = [per_seed(record[name]) for record in records]
        table = np.array([[np.inf if v is None else v for v in row] for row in values])
        middle = np.median(table, axis=1)
        return np.where(np.isfinite(middle), middle, np.nan)

    value, low, high = (column(f"noise_scale{end}") for end in ("", "_low", "_high"))
    axis.plot(epochs, value, ".-", color="#228833", linewidth=1.5, markersize=4)
    axis.fill_between(epochs, low, high, color="#228833", alpha=0.18, linewidth=0, label="95 %")
    is_open = np.isnan(value)
    if is_open.any():
        axis.plot(
            np.array(epochs)[is_open], low[is_open], "^", color="#888888", markersize=4,
            label="at least this: undetermined",
        )  # fmt: skip
    if "batch_size" in records[0]:
        sizes = [record["batch_size"] for record in records]
        axis.step(epochs, sizes, where="pre", color="#333333", linewidth=1.2, label="batch size")
    axis.set_yscale("log")
    axis.legend(loc="best", fontsize=8)


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG, replaced atomically; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        FigureCanvasAgg(figure).print_figure(temporary, dpi=120, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _leave_out_the_start(axis: Any, records: Sequence[Record]) -> None:
    """Lets the axis begin at the least accuracy of the last two thirds of the epochs."""
    late = records[len(records) // 3 :]
    accuracies = [
        value for r in late for split in _COLORS for value in per_seed(r[f"accuracy_{split}"])
    ]
    low, high = 100 * min(accuracies), 100 * max(accuracies)
    margin = max(1.0, 0.1 * (high - low))
    axis.set_ylim(max(low - margin, 0), min(high + margin, 100))


def write_report(
    path: Path,
    *,
    title: str,
    config: dict[str, Any],
    summary: dict[str, Any],
    records: Sequence[Record],
    figure: Path,
) -> None:
    """Writes the report of a run as one HTML file without scripts or links, replaced atomically."""
    sections = {
        "": html_pairs(summary),
        "Learning curve": html_figure(figure, "learning curve"),
        "Epochs": html_table(column_labels(), [format_record(record) for record in records]),
        "Settings": html_pairs(config),
    }
    write_page(path, title, sections)


def write_page(path: Path, title: str, sections: Mapping[str, str]) -> None:
    """Writes one HTML file without scripts or links, replaced atomically.

    Args:
      path: Of the file.
      title: Plain text.
      sections: HTML by heading; the heading "" shows none.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for heading, body in sections.items():
        parts += ([f"<h2>{html.escape(heading)}</h2>"] if heading else []) + [body]
    write_text(path, "\n".join([*parts, "</body></html>\n"]))


def html_figure(figure: Path, description: str) -> str:
    """Returns a PNG file as HTML that holds it."""
    picture = base64.b64encode(figure.read_bytes()).decode("ascii")
    source = f"data:image/png;base64,{picture}"
    return f'<div class="wide"><img alt="{html.escape(description)}" src="{source}"></div>'


def html_pairs(values: Mapping[str, Any]) -> str:
    """Returns names and values as an HTML table."""
    rows = (
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(_show(value))}</td></tr>"
        for name, value in values.items()
    )
    return f'<table class="pairs">{"".join(rows)}</table>'


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_show(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_show, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def html_table(labels: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an HTML table of plain text."""
    head = "".join(f"<th>{html.escape(label)}</th>" for label in labels)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def format_record(record: Record) -> list[str]:
    """Returns the cells of a line of metrics as in the tables; for several seeds their medians."""
    cells = []
    for name, _, template in _COLUMNS:
        value = record[name]
        if isinstance(value, list):
            value = float(np.median(value))
        cells.append(template.format(value))
    return cells


def column_labels() -> list[str]:
    """Returns the headings of the cells that `format_record` returns."""
    return [label for _, label, _ in _COLUMNS]
