"""One style for all figures: colors, font sizes, legends below the axes.

The palette is that of Okabe and Ito, which people with any color vision can tell apart. On a page
1,000 pixels wide the smallest letter of a figure at most 15 inches wide has 8 pixels.

Source: M. Okabe, K. Ito, "Color Universal Design", 2008.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, INK, GREY = "#cc79a7", "#56b4e9", "#222222", "#767676"
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, INK)
"""Colors of curves, in the order in which they are used."""

SPLITS = {"train": BLUE, "validation": ORANGE, "test": VERMILION}
"""Colors of the parts of a data set."""

SMALL = 9
"""Size of the smallest letters, in points."""

_SETTINGS: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "figure.titlesize": 13,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that draws, so that its figures have this style."""

    @functools.wraps(draw)
    def draw_in_style(*arguments: P.args, **options: P.kwargs) -> R:
        import matplotlib as mpl  # here, as training need not wait for it

        with mpl.rc_context(_SETTINGS):
            return draw(*arguments, **options)

    return draw_in_style


def legend(axis: Any, ncols: int = 2) -> None:
    """Puts the legend of an axis below it, where it covers no data."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        axis.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.17),
            ncols=min(ncols, len(handles)), borderaxespad=0,
        )  # fmt: skip
