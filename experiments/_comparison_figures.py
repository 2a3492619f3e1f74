"""Pictures of a comparison of gradient estimates: laws as lines, measurements as points."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments._tabled import Picture

_COLORS = {
    "without_replacement": "#4477aa",
    "with_replacement": "#cc3355",
    "poisson": "#ccaa22",
    "stratified": "#228833",
    "stratified_neyman": "#66bb88",
    "importance": "#aa3377",
    "control_variate": "#222222",
}
_Z = 1.96  # bars and shades hold 95 % of a normal distribution
Rows = list[dict[str, Any]]


def draw_all(description: str, result: Any) -> list[Picture]:
    """Returns the figures of a comparison.

    Args:
      description: Of the point where gradients are compared.
      result: What `experiments.compare_gradients.run` returns.
    """
    by_scheme: dict[str, Rows] = {}
    for row in result.rows:
        by_scheme.setdefault(row["scheme"], []).append(row)
    law = figure_of_laws(by_scheme, result.point)
    law.suptitle(f"What a mini-batch gradient is worth: {description}", fontsize=13)
    price = figure_of_prices(by_scheme, result.point)
    price.suptitle(f"Better ways to draw, and what they cost: {description}", fontsize=13)
    return [
        Picture(
            "Laws and measurements",
            "Three curves over the mini-batch size: the squared error of the estimate falls as its "
            "law says, measured over exact error stays near 1, and the cosine to the full gradient "
            "rises to 1.",
            law,
            "laws",
        ),
        Picture(
            "Ways to draw",
            "Left, the squared error of each way to draw as a multiple of that of independent "
            "draws; right, the relative error against the time of an estimate.",
            price,
            "schemes",
        ),
    ]


def figure_of_laws(by_scheme: Mapping[str, Rows], point: Mapping[str, float]) -> Figure:
    """Returns error, ratio of measured to exact error, and cosine, each against m."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    error, ratio, cosine = figure.subplots(1, 3)
    n, squared_norm = point["num_examples"], point["squared_norm"]
    m = np.geomspace(1, n, 400)
    error.plot(m, point["trace"] / m / squared_norm, ":", color="#999999", label="tr Σ/(m‖G‖²)")
    uniform = [s for s in ("without_replacement", "with_replacement") if s in by_scheme]
    shown = uniform or list(by_scheme)[:2]
    for name in shown:
        rows = by_scheme[name]
        sizes, measured, bars = _columns(rows, "batch_size", "measured", "standard_error")
        is_zero = _columns(rows, "predicted")[0] <= 0
        keep = ~is_zero
        _line(error, name, rows, n, 1 / squared_norm)
        error.errorbar(
            sizes[keep],
            measured[keep] / squared_norm,
            _Z * bars[keep] / squared_norm,
            fmt="o",
            ms=4.5,
            color=_COLORS[name],
            mfc="white",
            label=f"{_words(name)}, measured",
        )
    positive = [r["predicted"] / squared_norm for s in shown for r in by_scheme[s] if r["ratio"]]
    error.set_ylim(0.2 * min(positive), 3 * max(positive))
    error.axhline(1, color="#999999", lw=0.8)
    error.annotate(
        "error as long as G", (n, 1), xytext=(0, 3), textcoords="offset points", ha="right",
        fontsize=8, color="#666666",
    )  # fmt: skip
    error.set_yscale("log")
    error.set_title("E‖ĝ − G‖²/‖G‖²: lines exact, points measured", fontsize=11)
    error.legend(fontsize=8, loc="lower left")

    ratio.axhspan(0.98, 1.02, color="#4477aa", alpha=0.12, lw=0, label="± 2 %")
    ratio.axhline(1, color="#444444", lw=0.8)
    offsets = np.geomspace(0.9, 1.11, len(by_scheme)) if len(by_scheme) > 1 else [1.0]
    for (name, rows), offset in zip(by_scheme.items(), offsets, strict=True):
        rows = [row for row in rows if row["ratio"] is not None]
        sizes, values, bars = _columns(rows, "batch_size", "ratio", "ratio_standard_error")
        ratio.errorbar(
            sizes * offset, values, _Z * bars, fmt="o", ms=3.5, lw=1, color=_COLORS[name],
            label=_words(name),
        )  # fmt: skip
    low, high = ratio.get_ylim()
    half = min(0.5, max(0.04, 1 - low, high - 1))
    ratio.set_ylim(1 - half, 1 + half)
    ratio.set_title("measured/exact error, bars 95 %", fontsize=11)
    ratio.legend(fontsize=8, ncols=2, loc="upper right")

    name = shown[0]
    sizes, mean, low, high = _columns(
        by_scheme[name], "batch_size", "mean_cosine", "cosine_5", "cosine_95"
    )
    shape = _predicted(name, by_scheme[name], n)
    cosine.plot(
        m, 1 / np.sqrt(1 + shape(m) / squared_norm), color=_COLORS[name],
        label="1/√(1 + E‖ĝ − G‖²/‖G‖²), exact for\nthe ratio of means",
    )  # fmt: skip
    cosine.fill_between(sizes, low, high, color=_COLORS[name], alpha=0.18, lw=0, label="5 to 95 %")
    cosine.plot(sizes, mean, "o", ms=4.5, color=_COLORS[name], mfc="white", label="mean, measured")
    cosine.set_title(f"cos(ĝ, G), {_words(name)}", fontsize=11)
    cosine.set_ylim(min(0.0, float(low.min())) - 0.02, 1.03)
    cosine.legend(fontsize=8, loc="lower right")
    for axis in (error, ratio, cosine):
        axis.set_xscale("log")
        axis.set_xlabel(f"mini-batch size m, of n = {n:,}")
        axis.grid(alpha=0.25)
    return figure


def figure_of_prices(by_scheme: Mapping[str, Rows], point: Mapping[str, float]) -> Figure:
    """Returns the error of every scheme beside tr Σ/m, and the error that a second buys."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    gain, price = figure.subplots(1, 2)
    n, squared_norm, trace = point["num_examples"], point["squared_norm"], point["trace"]
    for name, rows in by_scheme.items():
        rows = [row for row in rows if row["ratio"] is not None]
        sizes, measured, bars = _columns(rows, "batch_size", "measured", "standard_error")
        color = _COLORS[name]
        m = _grid(name, rows, n)
        gain.plot(m, _predicted(name, rows, n)(m) * m / trace, color=color, lw=1.3)
        gain.errorbar(
            sizes, measured * sizes / trace, _Z * bars * sizes / trace, fmt="o", ms=4, color=color,
            mfc="white", label=_words(name),
        )  # fmt: skip
        draw, gradient = _columns(rows, "draw_seconds", "gradient_seconds")
        price.plot(
            1e3 * (draw + gradient), np.sqrt(measured / squared_norm), "o-", ms=4, lw=1.1,
            color=color, label=_words(name),
        )  # fmt: skip
    first = next(iter(by_scheme.values()))
    for row in first:
        if row["ratio"] is not None:
            x = 1e3 * (row["draw_seconds"] + row["gradient_seconds"])
            y = np.sqrt(row["measured"] / squared_norm)
            price.annotate(
                f"m={row['batch_size']:,}", (x, y), xytext=(5, 4), textcoords="offset points",
                fontsize=7, color="#555555",
            )  # fmt: skip
    price.axvline(1e3 * point["seconds"], color="#999999", ls="--", lw=1)
    price.annotate(
        "the full gradient", (1e3 * point["seconds"], 0.02), xycoords=("data", "axes fraction"),
        xytext=(-3, 0), textcoords="offset points", rotation=90, ha="right", va="bottom",
        fontsize=8, color="#666666",
    )  # fmt: skip
    gain.set_xscale("log")
    gain.set_xlabel(f"mini-batch size m, of n = {n:,}")
    gain.set_ylim(bottom=0)
    gain.set_title("E‖ĝ − G‖² as a multiple of tr Σ/m: lower is better", fontsize=11)
    price.set_xscale("log")
    price.set_yscale("log")
    price.set_xlabel("milliseconds to draw and to estimate")
    price.set_title("√(E‖ĝ − G‖²)/‖G‖, measured: what a second buys", fontsize=11)
    for axis in (gain, price):
        axis.grid(alpha=0.25)
    gain.legend(fontsize=8)
    return figure


def _columns(rows: Rows, *names: str) -> list[np.ndarray]:
    return [np.array([row[name] for row in rows], np.float64) for name in names]


def _words(name: str) -> str:
    return {"stratified_neyman": "stratified, Neyman"}.get(name, name.replace("_", " "))


def _predicted(name: str, rows: Rows, n: float) -> Any:
    """Returns the exact law as a function of real m ≥ 1.

    Through the law's own shape where the scheme has one: between whole numbers it is only a line
    for the eye. Stratified draws have none; theirs is straight between sizes on the log scale.
    """
    sizes, predicted = _columns(rows, "batch_size", "predicted")
    shapes = {
        "with_replacement": lambda m: 1 / m,
        "importance": lambda m: 1 / m,
        "without_replacement": lambda m: (n - m) / m,
        "poisson": lambda m: (n - m) / m,
        "control_variate": lambda m: (n - m) / m,
    }
    if name not in shapes:
        return lambda m: np.interp(np.log(m), np.log(sizes), predicted * sizes) / m
    shape = shapes[name]
    return lambda m: predicted[0] * shape(m) / shape(sizes[0])


def _grid(name: str, rows: Rows, n: float) -> np.ndarray:
    """The m at which a law is drawn: dense, and denser near n, where some of them bend."""
    if name.startswith("stratified"):
        return _columns(rows, "batch_size")[0]
    return np.unique(np.concatenate([np.geomspace(1, n, 300), n - np.geomspace(1e-4, n / 2, 300)]))


def _line(axis: Any, name: str, rows: Rows, n: float, scale: float) -> None:
    m = _grid(name, rows, n)
    axis.plot(
        m, scale * _predicted(name, rows, n)(m), color=_COLORS[name], lw=1.3,
        label=f"{_words(name)}, exact",
    )  # fmt: skip
