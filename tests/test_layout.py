"""A layout says where NumPy's indexing has moved the entries of matrices, after any moves."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sgd_jax.per_example.layout import Axis, Layout

SHAPES = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3).map(tuple)


def arange(shape):
    return np.arange(math.prod(shape)).reshape(shape)


@st.composite
def factorizations(draw, size):
    """Shapes of `size` entries, with and without dimensions of size 1."""
    shape = []
    while size > 1:
        divisors = [d for d in range(2, size + 1) if size % d == 0]
        shape.append(draw(st.sampled_from(divisors)))
        size //= shape[-1]
        shape += [1] * draw(st.integers(0, 1))
    return tuple(shape)


class Laid:
    """A layout, and an array that NumPy moves along: 1, 2, … are matrix entries, 0 is none."""

    def __init__(self, shape, parts):
        dims = [[d for d, part in enumerate(parts) if part == k] for k in range(3)]
        order = [d for part in dims for d in part]
        self.layout = Layout.of(shape, *dims)
        self.matrices = 1 + arange(self.layout.sizes())
        in_order = self.matrices.reshape([shape[d] for d in order])
        self.array = in_order.transpose(np.argsort(order)) if order else in_order

    def move(self, layout, array):
        """Takes a move over, unless the layout cannot make it."""
        if layout is not None:
            self.layout, self.array = layout, array
        return layout is not None

    def reshaped(self, shape):
        return self.move(self.layout.reshaped(shape), self.array.reshape(shape))

    def transposed(self, order):
        return self.move(self.layout.transposed(order), self.array.transpose(order))

    def windowed(self, shape, starts):
        larger = np.zeros(shape, int)
        window = zip(starts, self.array.shape, strict=True)
        larger[tuple(slice(start, start + size) for start, size in window)] = self.array
        return self.move(self.layout.windowed(shape, starts), larger)

    def swapped(self):
        self.matrices = self.matrices.swapaxes(1, 2)
        return self.move(self.layout.swapped(), self.array)

    def canonical(self):
        return self.move(self.layout.canonical(), self.array)

    def places(self):
        """Where in the flat array the entries of the matrices are."""
        order = np.argsort(self.array, axis=None)[-self.matrices.size :]
        return order[self.matrices - 1]

    def assert_right(self):
        assert self.layout.shape == self.array.shape
        both = np.stack([self.matrices, -self.matrices])  # with a leading axis of examples
        np.testing.assert_array_equal(
            self.layout.to_array(both), np.stack([self.array, -self.array])
        )
        other = 5 + arange(self.array.shape)  # nothing is zero outside
        found = self.layout.from_array(np.stack([other, -other]))
        np.testing.assert_array_equal(found[0], other.reshape(-1)[self.places()])
        np.testing.assert_array_equal(found[1], -found[0])


@st.composite
def laid(draw, shape=None):
    """A layout after some moves; they end in an array of `shape`, if one is given."""
    start = shape or draw(SHAPES)
    if shape:
        start = tuple(draw(st.integers(1, size)) for size in shape)
    made = Laid(start, [draw(st.integers(0, 2)) for _ in start])
    for _ in range(draw(st.integers(0, 4)) if not shape else 0):
        sizes = made.array.shape
        move = draw(st.sampled_from(["transpose", "reshape", "window", "swap", "canonical"]))
        if move == "transpose":
            made.transposed(draw(st.permutations(range(len(sizes)))))
        elif move == "reshape":
            made.reshaped(draw(factorizations(math.prod(sizes))))
        elif move == "window":
            around = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in sizes]
            larger = tuple(a + n + b for (a, b), n in zip(around, sizes, strict=True))
            made.windowed(larger, tuple(a for a, _ in around))
        elif move == "swap":
            made.swapped()
        else:
            made.canonical()
    if shape:
        made.windowed(
            shape, [draw(st.integers(0, n - m)) for n, m in zip(shape, start, strict=True)]
        )
    return made


@given(laid())
@settings(max_examples=40)
def test_after_any_moves_entries_are_put_and_taken_where_numpy_has_moved_them(made):
    made.assert_right()


@pytest.mark.parametrize(
    ("shape", "parts", "moves"),
    [
        ((2,), [1], lambda made: [made.windowed((4,), [1]), made.windowed((7,), [2])]),
        (
            (2, 3, 4),
            [2, 0, 1],
            lambda made: [made.reshaped((6, 2, 2)), made.transposed([1, 0, 2])],
        ),
        (  # the window lies in one row of the shape into which it is cut
            (2,),
            [1],
            lambda made: [made.windowed((8,), [5]), made.reshaped((2, 4)), made.transposed([1, 0])],
        ),
        (
            (2, 3),
            [1, 1],
            lambda made: [made.reshaped((6,)), made.windowed((12,), [3]), made.canonical()],
        ),
        (  # the axis behind the one that is cut is another one afterwards
            (4, 3),
            [1, 2],
            lambda made: [made.reshaped((2, 2, 3)), made.transposed([1, 0, 2])],
        ),
        ((2, 3), [1, 1], lambda made: [made.windowed((2, 5), [0, 1]), made.canonical()]),
        ((1, 3), [1, 2], lambda made: [made.windowed((4, 3), [2, 0]), made.transposed([1, 0])]),
    ],
)
def test_a_move_counts_from_where_the_one_before_has_led(shape, parts, moves):
    made = Laid(shape, parts)
    assert all(moves(made))
    made.assert_right()


@given(laid())
def test_the_canonical_layout_is_the_same_and_has_no_axes_to_merge(made):
    axes = len(made.layout.axes)
    made.canonical()
    assert len(made.layout.axes) <= axes
    assert made.layout.canonical() == made.layout
    made.assert_right()


def test_axes_that_follow_each_other_become_one():
    assert Layout.of((2, 3), left=[0, 1]).canonical().axes == (Axis(6, 0, 6),)
    assert len(Layout.of((2, 3), left=[0], right=[1]).canonical().axes) == 2
    assert len(Layout.of((2, 3), left=[1, 0]).canonical().axes) == 2


@given(laid())
@settings(max_examples=30)
def test_aligned_axes_lie_in_the_dimensions_of_the_shape(made):
    aligned = made.layout.aligned()
    if aligned is None:
        return
    layout, dims = aligned
    assert [math.prod(layout.axes[a].full for a in dim) for dim in dims] == list(layout.shape)
    assert [a for dim in dims for a in dim] == list(range(len(layout.axes)))
    made.move(layout, made.array)
    made.assert_right()


def are_disjoint(one, other):
    assert one.layout.is_disjoint(other.layout) == other.layout.is_disjoint(one.layout)
    return one.layout.is_disjoint(other.layout)


@given(SHAPES.flatmap(lambda shape: st.tuples(laid(shape), laid(shape))))
@settings(max_examples=60)
@example((Laid((4,), [1]), Laid((4,), [1])))
def test_windows_of_one_array_are_disjoint_exactly_if_they_share_no_entry(pair):
    shared = np.intersect1d(*(made.places() for made in pair))
    assert are_disjoint(*pair) == (shared.size == 0)


@pytest.mark.parametrize(("start", "disjoint"), [(1, False), (2, True), (3, True)])
def test_windows_that_touch_are_disjoint(start, disjoint):
    first, second = Laid((2, 3), [1, 2]), Laid((2, 3), [1, 2])
    first.windowed((5, 3), [0, 0])
    second.windowed((5, 3), [start, 0])
    assert are_disjoint(first, second) == disjoint


@pytest.mark.parametrize(
    "move",
    [
        # a window of six in rows of four lies in parts of two
        lambda: Layout.of((6,), left=[0]).windowed((8,), [1]).reshaped((2, 4)).transposed([1, 0]),
        lambda: Layout.of((6,), left=[0]).windowed((8,), [1]).reshaped((2, 4)).aligned(),
        # rows of three, and a window that does not begin or end with one
        lambda: Layout.of((2, 3), left=[0], right=[1]).reshaped((6,)).windowed((9,), [1]),
        lambda: Layout.of((2, 3), left=[0], right=[1]).reshaped((6,)).windowed((8,), [0]),
    ],
)
def test_what_is_no_layout_is_none(move):
    assert move() is None
