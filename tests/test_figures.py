"""Figures: letters that can be read, axes that are named, legends beside the data, true words."""

import matplotlib.text
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from test_runs import record

from experiments import nielsen, reshuffling, sweep
from experiments.runs import report, style

PAGE = 1000  # pixels


def check(figure):
    """Raises AssertionError unless a figure keeps the rules."""
    figure.draw_without_rendering()
    points_to_pixels = PAGE / (72 * figure.get_figwidth())
    for text in figure.findobj(matplotlib.text.Text):
        if text.get_text():
            assert text.get_fontsize() * points_to_pixels >= 8, text.get_text()
    for axis in figure.axes:
        assert axis.get_xlabel() or axis.get_label() == "<colorbar>", axis.get_title()
        assert axis.get_ylabel(), axis.get_title()
        if legend := axis.get_legend():
            assert not legend.get_window_extent().overlaps(axis.get_window_extent())


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Returns a function that draws the learning curve of some lines and returns the figure."""
    kept = []
    monkeypatch.setattr(report, "save_figure", lambda path, figure: kept.append(figure))

    def draw(records):
        report.draw_learning_curve(tmp_path / "curve.png", records, "mine")
        return kept[-1]

    return draw


def noisy(epoch):
    scales = {"noise_scale": 5.0 + epoch, "noise_scale_low": 4.0, "noise_scale_high": 9.0}
    return record(epoch, 0.5 + 0.1 * epoch, **scales, batch_size=10 * (1 + epoch))


@pytest.mark.parametrize("make", [lambda k: record(k, 0.5), noisy])
def test_the_learning_curve_can_be_read_and_its_legends_cover_no_data(drawn, make):
    figure = drawn([make(epoch) for epoch in range(4)])
    assert len(figure.axes) == (4 if make is noisy else 3)
    check(figure)


def test_the_words_of_the_learning_curve_are_its_numbers():
    words = report.describe_learning_curve([noisy(0), noisy(3)])
    assert "on the test examples from 50.00% to 80.00%" in words
    assert "the noise scale B, in examples from 5 to 8" in words
    assert words.endswith("the batch size from 10 to 40.")
    assert "noise" not in report.describe_learning_curve([record(0, 0.5), record(1, 0.6)])


def test_the_sweep_can_be_read():
    rows = [
        {"batch_size": m, "learning_rate": rate, "median_accuracy": 0.5, "min_accuracy": 0.4,
         "max_accuracy": 0.6}
        for m in (1, 10) for rate in (0.1, 1.0)
    ]  # fmt: skip
    check(sweep.draw(rows, "mine"))


@pytest.mark.parametrize("printed", [None, 95.0])
def test_words_and_title_speak_of_crosses_only_where_the_book_prints_a_number(printed):
    rows = [
        {"network": "64-30-10", "learning_rate": 3.0, "num_seeds": 2, "printed": printed}
    ]  # fmt: skip
    accuracy = [np.array([[0.2, 0.4], [0.8, 0.9]])]  # (epochs, seeds)
    result = nielsen.Result(rows, accuracy)
    figure = nielsen.draw(result, "digits")
    check(figure)
    words = nielsen.describe(result)
    assert "64-30-10 at η = 3 from 30.0% to 85.0%" in words
    assert ("Crosses" in words) == (printed is not None)
    assert ("crosses" in figure.axes[1].get_title()) == (printed is not None)


def test_the_words_of_reshuffling_name_the_level_of_each_order():
    levels = dict(zip(reshuffling.ORDERS, (0.5, 0.4, 0.3, 0.1, 0.9), strict=True))
    shape = (len(reshuffling._RATES), 3)

    class Walk:
        def __init__(self, level):
            self.mean = np.full(shape, level)

    class Result:
        walks = {order: Walk(level) for order, level in levels.items()}  # noqa: RUF012
        costs = {order: np.full((2, 3), level) for order, level in levels.items()}  # noqa: RUF012

    words = reshuffling.describe(Result)
    for order, level in levels.items():
        assert words.count(f"{order.replace('_', ' ')} {level:g}") == 2


def closest(palette):
    """Returns the least distance of two colors, as a person without green cones sees them.

    Source: F. Viénot, H. Brettel, J. D. Mollon, "Digital video colourmaps for checking the
    legibility of displays by dichromats", 1999.
    """

    def seen(color):
        red, green, blue = (channel**2.2 for channel in to_rgb(color))
        yellow = 0.293 * red + 0.707 * green
        return np.array([yellow, max(blue + 0.022 * (green - red), 0.0)]) ** (1 / 2.2)

    colors = [seen(color) for color in palette]
    return min(np.abs(a - b).max() for k, a in enumerate(colors) for b in colors[:k])


def test_people_without_green_cones_can_tell_the_colors_apart():
    assert closest(style.PALETTE) > 0.1
    assert closest(("#cc3355", "#7f7f50")) < 0.1  # a red and a green that they cannot
