"""The learning curve of a run as a picture, and its report."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.runs import style
from experiments.runs.folder import Record
from experiments.runs.page import html_figure, html_pairs, html_table, write_page
from experiments.runs.summary import per_seed
from sgd_jax.distributed import processes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = (
    ("epoch", "epoch", "{:d}"),
    ("cost_train", "cost", "{:.4g}"),
    ("accuracy_train", "train", "{:.2%}"),
    ("accuracy_validation", "validation", "{:.2%}"),
    ("accuracy_test", "test", "{:.2%}"),
    ("gradient_norm", "‖∇C‖", "{:.3g}"),
    ("noise_scale", "B", "{:.4g}"),
    ("batch_size", "m", "{:d}"),
    ("seconds", "seconds", "{:.3f}"),
)
_UNDETERMINED = "–"


@style.styled
def draw_learning_curve(path: Path, records: Sequence[Record], title: str) -> None:
    """Draws cost, accuracy and gradient norm over the epochs into a PNG file, replaced atomically.

    With several seeds a line is the median, its band reaches from the least to the largest value.
    """
    from matplotlib.figure import Figure  # here, as training need not wait for it
    from matplotlib.ticker import MaxNLocator

    has_noise = "noise_scale" in records[0]
    figure = Figure(figsize=(11, 8.4) if has_noise else (12, 4.4), layout="constrained")
    axes = figure.subplots(2, 2).ravel() if has_noise else figure.subplots(1, 3)
    epochs = [record["epoch"] for record in records]

    def draw(axis: Any, name: str, color: str, label: str | None = None, scale: float = 1) -> None:
        values = scale * np.array([per_seed(record[name]) for record in records], np.float64)
        axis.plot(epochs, np.median(values, axis=1), color=color, label=label, linewidth=1.5)
        if values.shape[1] > 1:
            axis.fill_between(
                epochs, values.min(axis=1), values.max(axis=1), color=color, alpha=0.18, linewidth=0
            )

    for split, color in style.SPLITS.items():
        draw(axes[0], f"cost_{split}", color, split)
        draw(axes[1], f"accuracy_{split}", color, split, scale=100)
    draw(axes[2], "gradient_norm", style.INK)
    num_seeds = len(per_seed(records[0]["accuracy_test"]))
    spread = f" (median, least to largest of {num_seeds} seeds)" if num_seeds > 1 else ""
    labels = ["mean cost", "accuracy in %", "‖∇C‖ of the training examples"]
    if has_noise:
        _draw_noise(axes[3], records)
        labels.append("B = tr Σ/‖∇C‖², in examples")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_ylabel(label)
        axis.set_xlabel("epoch (0: before training)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (axes[0], axes[2]):
        axis.set_yscale("log")
    _leave_out_the_start(axes[1], records)
    for axis in axes[:2]:
        style.legend(axis, ncols=3)
    figure.suptitle(title + spread, parse_math=False)
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
    axis.plot(
        epochs, value, ".-", color=style.GREEN, linewidth=1.5, markersize=4, label="noise scale B"
    )
    axis.fill_between(
        epochs, low, high, color=style.GREEN, alpha=0.18, linewidth=0, label="its interval, 95 %"
    )
    is_open = np.isnan(value)
    if is_open.any():
        axis.plot(
            np.array(epochs)[is_open], low[is_open], "^", color=style.GREY, markersize=4,
            label="at least this: undetermined",
        )  # fmt: skip
    if "batch_size" in records[0]:
        sizes = [record["batch_size"] for record in records]
        axis.step(epochs, sizes, where="pre", color=style.INK, linewidth=1.2, label="batch size m")
    axis.set_yscale("log")
    style.legend(axis)


def save_figure(path: Path, figure: "Figure") -> None:
    """Writes a figure as PNG, replaced atomically; makes the folder."""
    if not processes.is_first():
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg

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
        value for r in late for split in style.SPLITS for value in per_seed(r[f"accuracy_{split}"])
    ]
    low, high = 100 * min(accuracies), 100 * max(accuracies)
    margin = max(1.0, 0.1 * (high - low))
    axis.set_ylim(max(low - margin, 0), min(high + margin, 100))


def write_report(
    path: Path,
    *,
    title: str,
    header: dict[str, Any],
    settings: dict[str, Any],
    records: Sequence[Record],
    figure: Path,
) -> None:
    """Writes the report of a run, see `write_page`.

    Args:
      path: The file.
      title: What stands above all.
      header: A few numbers by name, shown first.
      settings: Shown last.
      records: Lines of metrics; at least one.
      figure: File of the learning curve.
    """
    cells = [format_record(record) for record in records]
    sections = {
        "": html_pairs(header),
        "Learning curve": html_figure(figure, describe_learning_curve(records)),
        "Epochs": html_table(column_labels(records[0]), cells),
        "Settings": html_pairs(settings),
    }
    write_page(path, title, sections)


def describe_learning_curve(records: Sequence[Record]) -> str:
    """Returns in words what `draw_learning_curve` shows, for a reader who cannot see it."""
    first, last = (
        dict(zip(column_labels(record), format_record(record), strict=True))
        for record in (records[0], records[-1])
    )
    changes = [
        f"{name} from {first[label]} to {last[label]}"
        for name, label in (
            ("the mean cost of the training examples", "cost"),
            ("accuracy on the training examples", "train"),
            ("on the test examples", "test"),
            ("the norm of the gradient", "‖∇C‖"),
            ("the noise scale B, in examples", "B"),
            ("the batch size", "m"),
        )
        if label in first
    ]
    return f"Curves from epoch {first['epoch']} to {last['epoch']}: {', '.join(changes)}."


def format_record(record: Record) -> list[str]:
    """Returns the cells of a line of metrics as in the tables; for several seeds their medians.

    A noise scale B is undetermined, shown as –, if it is so for half of the seeds or more.
    """
    return [_format(record[name], template) for name, _, template in _columns(record)]


def column_labels(record: Record) -> list[str]:
    """Returns the headings of the cells that `format_record` returns of a line like this one."""
    return [label for _, label, _ in _columns(record)]


def _columns(record: Record) -> list[tuple[str, str, str]]:
    """Returns name, label and template of what a line of metrics shows; B and m if it has them."""
    optional = ("noise_scale", "batch_size")
    return [column for column in _COLUMNS if column[0] not in optional or column[0] in record]


def _format(value: Any, template: str) -> str:
    if isinstance(value, list):
        value = float(np.median([np.inf if v is None else v for v in value]))
    if value is None or value == np.inf:
        return _UNDETERMINED
    return template.format(value)
