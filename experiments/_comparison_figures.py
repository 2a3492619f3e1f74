"""Pictures of a comparison of gradient estimates: laws as lines, measurements as points."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments._tabled import Picture
from experiments.runs import style

_COLORS = {
    "without_replacement": style.BLUE,
    "with_replacement": style.VERMILION,
    "poisson": style.ORANGE,
    "stratified": style.GREEN,
    "stratified_neyman": style.SKY,
    "importance": style.PURPLE,
    "control_variate": style.INK,
}
_Z = 1.96  # bars and shades hold 95 % of a normal distribution
Rows = list[dict[str, Any]]


@style.styled
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
    law.suptitle(f"What a mini-batch gradient is worth: {description}")
    price = figure_of_prices(by_scheme, result.point)
    price.suptitle(f"Better ways to draw, and what they cost: {description}")
    return [
        Picture(
            "Laws and measurements",
            _describe_laws(by_scheme),
            law,
            "laws",
        ),
        Picture(
            "Ways to draw",
            _describe_schemes(by_scheme, result.point),
            price,
            "schemes",
        ),
    ]


def _describe_laws(by_scheme: Mapping[str, Rows]) -> str:
    """Returns in words what `figure_of_laws` shows, from its numbers."""
    name, rows = next(iter(by_scheme.items()))
    first, last = rows[0], rows[-1]
    ratios = [row["ratio"] for rows in by_scheme.values() for row in rows if row["ratio"]]
    return (
        f"Over mini-batch sizes {first['batch_size']:,} to {last['batch_size']:,}: the squared "
        f"error of {_words(name)} from {first['measured']:.3g} to {last['measured']:.3g}; measured "
        f"over exact error of all schemes between {min(ratios):.3f} and {max(ratios):.3f}; the "
        f"mean cosine to the full gradient from {first['mean_cosine']:.3f} to "
        f"{last['mean_cosine']:.3f}."
    )


def _describe_schemes(by_scheme: Mapping[str, Rows], point: Mapping[str, float]) -> str:
    """Returns in words what `figure_of_prices` shows, from its numbers."""
    parts = []
    for name, rows in by_scheme.items():
        gains = [row["measured"] * row["batch_size"] / point["trace"] for row in rows]
        parts.append(f"{_words(name)} {min(gains):.3g} to {max(gains):.3g}")
    return (
        "Left, squared error as a multiple of that of independent draws, over the mini-batch "
        f"sizes: {'; '.join(parts)}. Right, the relative error against the time of an estimate."
    )


def figure_of_laws(by_scheme: Mapping[str, Rows], point: Mapping[str, float]) -> Figure:
    """Returns error, ratio of measured to exact error, and cosine, each against m."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    error, ratio, cosine = figure.subplots(1, 3)
    n, squared_norm = point["num_examples"], point["squared_norm"]
    m = np.geomspace(1, n, 400)
    error.plot(m, point["trace"] / m / squared_norm, ":", color=style.GREY, label="tr Σ/(m‖∇C‖²)")
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
    error.axhline(1, color=style.GREY, lw=0.8)
    error.annotate(
        "error as long as ∇C", (n, 1), xytext=(0, 3), textcoords="offset points", ha="right",
        fontsize=style.SMALL, color=style.GREY,
    )  # fmt: skip
    error.set_yscale("log")
    error.set_title("error: lines exact, points measured")
    error.set_ylabel("E‖ĝ − ∇C‖²/‖∇C‖²")
    style.legend(error)

    ratio.axhspan(0.98, 1.02, color=style.BLUE, alpha=0.12, lw=0, label="± 2 %")
    ratio.axhline(1, color=style.INK, lw=0.8)
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
    ratio.set_title("measured over exact error, bars 95 %")
    ratio.set_ylabel("measured/exact")
    style.legend(ratio)

    name = shown[0]
    sizes, mean, low, high = _columns(
        by_scheme[name], "batch_size", "mean_cosine", "cosine_5", "cosine_95"
    )
    shape = _predicted(name, by_scheme[name], n)
    cosine.plot(
        m, 1 / np.sqrt(1 + shape(m) / squared_norm), color=_COLORS[name],
        label="1/√(1 + E‖ĝ − ∇C‖²/‖∇C‖²),\nexact for the ratio of means",
    )  # fmt: skip
    cosine.fill_between(sizes, low, high, color=_COLORS[name], alpha=0.18, lw=0, label="5 to 95 %")
    cosine.plot(sizes, mean, "o", ms=4.5, color=_COLORS[name], mfc="white", label="mean, measured")
    cosine.set_title(_words(name))
    cosine.set_ylabel("cos(ĝ, ∇C)")
    cosine.set_ylim(min(0.0, float(low.min())) - 0.02, 1.03)
    style.legend(cosine)
    for axis in (error, ratio, cosine):
        axis.set_xscale("log")
        axis.set_xlabel(f"mini-batch size m, of n = {n:,}")
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
                f"m={row['batch_size']:,}", (x, y), xytext=(5, 5), textcoords="offset points",
                fontsize=style.SMALL, color=style.GREY,
            )  # fmt: skip
    price.axvline(1e3 * point["seconds"], color=style.GREY, ls="--", lw=1)
    price.annotate(
        "the full gradient", (1e3 * point["seconds"], 0.02), xycoords=("data", "axes fraction"),
        xytext=(-3, 0), textcoords="offset points", rotation=90, ha="right", va="bottom",
        fontsize=style.SMALL, color=style.GREY,
    )  # fmt: skip
    gain.set_xscale("log")
    gain.set_xlabel(f"mini-batch size m, of n = {n:,}")
    gain.set_ylim(bottom=0)
    gain.set_title("error beside that of independent draws: lower is better")
    gain.set_ylabel("E‖ĝ − ∇C‖² / (tr Σ/m)")
    price.set_xscale("log")
    price.set_yscale("log")
    price.set_xlabel("milliseconds to draw and to estimate")
    price.set_title("what a second buys")
    price.set_ylabel("√E‖ĝ − ∇C‖² / ‖∇C‖, measured")
    style.legend(gain, ncols=3)
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
