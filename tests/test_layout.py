"""Views and layouts hold the entries that NumPy's indexing holds, after any moves in a row."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sgd_jax.per_example.views import Axis, Layout, View

SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4).map(tuple)


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


class Viewed:
    """A view and, beside it, the same entries as NumPy moves them.

    The axes of the scans around the value stand first in ``entries``, ``depth`` of them.
    """

    def __init__(self, shape):
        self.shape = shape
        self.view, self.entries, self.depth = View.whole(0, shape), arange(shape), 0

    @property
    def sizes(self):
        return self.entries.shape[self.depth :]

    def move(self, view, entries):
        """Takes a move over, unless it makes no view."""
        if view is not None:
            self.view, self.entries = view, entries
        return view is not None

    def transpose(self, order):
        lead = range(self.depth)
        moved = self.entries.transpose(*lead, *(self.depth + d for d in order))
        return self.move(self.view.transpose(order), moved)

    def squeeze(self, dims):
        squeezed = np.squeeze(self.entries, tuple(self.depth + d for d in dims))
        return self.move(self.view.squeeze(dims), squeezed)

    def reshape(self, sizes):
        reshaped = self.entries.reshape(self.entries.shape[: self.depth] + sizes)
        return self.move(self.view.reshape(sizes), reshaped)

    def slice(self, starts, sizes):
        windows = tuple(slice(b, b + s) for b, s in zip(starts, sizes, strict=True))
        cut = self.entries[(slice(None),) * self.depth + windows]
        return self.move(self.view.slice(starts, sizes), cut)

    def scaled(self, factor):
        return self.move(self.view.scaled(factor), self.entries * factor)

    def unstack(self):
        unstacked = self.move(self.view.unstack(), self.entries)
        self.depth += unstacked
        return unstacked


@st.composite
def viewed(draw, shape=None):
    """A view of a leaf after some moves that the leaf's shape allows."""
    made = Viewed(shape or draw(SHAPES))
    for _ in range(draw(st.integers(0, 4))):
        sizes = made.sizes
        name = draw(st.sampled_from(["transpose", "squeeze", "reshape", "slice", "scaled", "scan"]))
        if name == "transpose":
            made.transpose(draw(st.permutations(range(len(sizes)))))
        elif name == "squeeze":
            ones = [d for d, size in enumerate(sizes) if size == 1]
            made.squeeze(draw(st.sets(st.sampled_from(ones))) if ones else ())
        elif name == "reshape":
            made.reshape(draw(factorizations(math.prod(sizes))))
        elif name == "slice":
            starts = [draw(st.integers(0, size - 1)) for size in sizes]
            made.slice(
                starts,
                [draw(st.integers(1, size - b)) for b, size in zip(starts, sizes, strict=True)],
            )
        elif name == "scaled":
            made.scaled(draw(st.sampled_from([-1.0, 0.5, 3.0])))
        elif sizes:
            made.unstack()
    return made


def layout_of(made, parts):
    """The layout whose part runs over dimension d where parts[d] says, and the entries so laid."""
    dims = [[d for d, part in enumerate(parts) if part == k] for k in range(3)]
    layout = Layout.of(made.view, made.shape, *dims)
    order = [*range(made.depth), *(made.depth + d for part in dims for d in part)]
    return layout, made.entries.transpose(order).reshape(layout.sizes())


def parts_of(data, made):
    """Which of group, left and right each dimension goes to."""
    return [data.draw(st.integers(0, 2)) for _ in made.sizes]


@given(viewed(), st.data())
@settings(max_examples=60)
def test_a_layout_takes_the_entries_of_the_view_out_of_the_leaf(made, data):
    layout, entries = layout_of(made, parts_of(data, made))
    leaf = arange(made.shape)
    found = layout.from_leaf(np.stack([leaf, -leaf]))  # with a leading axis of examples
    np.testing.assert_array_equal(made.view.scale * found, np.stack([entries, -entries]))
    np.testing.assert_array_equal(layout.from_leaf(leaf), found[0])
    np.testing.assert_array_equal(layout.swapped().from_leaf(leaf), found[0].swapaxes(1, 2))


@pytest.mark.parametrize(
    ("shape", "moves"),
    [
        ((6,), lambda made: [made.slice([1], [5]), made.slice([2], [3])]),
        (
            (4, 3),  # the axis that a scan runs over stands behind the one that is cut in two
            lambda made: [made.transpose([1, 0]), made.unstack(), made.reshape((2, 2))],
        ),
        ((4, 6), lambda made: [made.transpose([1, 0]), made.reshape((3, 2, 2, 2))]),
    ],
)
def test_a_move_counts_from_where_the_one_before_has_led(shape, moves):
    made = Viewed(shape)
    assert all(moves(made))
    layout, entries = layout_of(made, [2] * len(made.sizes))
    np.testing.assert_array_equal(layout.from_leaf(arange(shape)), entries)


@given(viewed(), st.data())
@settings(max_examples=20)
def test_a_layout_puts_matrices_where_it_takes_them_from_and_zeros_elsewhere(made, data):
    layout, _ = layout_of(made, parts_of(data, made))
    matrices = 1.0 + arange((2, *layout.sizes()))
    places = layout.from_leaf(arange(made.shape))  # by the test above
    expected = np.zeros((2, math.prod(made.shape)))
    expected[:, places] = matrices
    leaves = layout.to_leaf(matrices)
    np.testing.assert_array_equal(leaves, expected.reshape(2, *made.shape))
    np.testing.assert_array_equal(layout.from_leaf(leaves), matrices)
    swapped = layout.swapped().to_leaf(matrices.swapaxes(2, 3))
    np.testing.assert_array_equal(swapped, leaves)


@given(SHAPES.flatmap(lambda shape: st.tuples(viewed(shape), viewed(shape))))
@settings(max_examples=60)
def test_what_is_called_disjoint_shares_no_entry(pair):
    layouts = [Layout.of(v.view, v.shape, right=range(len(v.sizes))) for v in pair]
    places = [layout.from_leaf(arange(pair[0].shape)) for layout in layouts]
    if layouts[0].is_disjoint(layouts[1]):
        assert not np.intersect1d(*places).size
    assert layouts[0].is_disjoint(layouts[1]) == layouts[1].is_disjoint(layouts[0])


@st.composite
def two_windows(draw):
    """A shape, and starts and sizes of two windows of it."""
    shape = draw(SHAPES)
    windows = []
    for _ in range(2):
        starts = [draw(st.integers(0, size - 1)) for size in shape]
        sizes = [draw(st.integers(1, n - b)) for b, n in zip(starts, shape, strict=True)]
        windows.append((starts, sizes))
    return shape, windows


@given(two_windows())
@example(((4, 3), [([0, 0], [2, 3]), ([2, 0], [2, 3])]))
@example(((4, 3), [([0, 0], [3, 2]), ([2, 1], [2, 2])]))
@settings(max_examples=60)
def test_windows_of_a_parameter_are_disjoint_exactly_if_they_share_no_entry(windows):
    shape, cuts = windows
    made = [Viewed(shape), Viewed(shape)]
    for one, cut in zip(made, cuts, strict=True):
        assert one.slice(*cut)
    layouts = [Layout.of(one.view, shape, right=range(len(shape))) for one in made]
    shared = np.intersect1d(made[0].entries, made[1].entries)
    assert layouts[0].is_disjoint(layouts[1]) == (shared.size == 0)


@given(SHAPES)
def test_a_flat_leaf_takes_any_shape_and_any_shape_becomes_flat(shape):
    flat = (math.prod(shape),)
    for before, after in ((flat, shape), (shape, flat)):
        made = Viewed(before)
        assert made.reshape(after)
        layout, entries = layout_of(made, [2] * len(after))
        np.testing.assert_array_equal(layout.from_leaf(arange(before)), entries)


@pytest.mark.parametrize(
    ("shape", "move"),
    [
        ((2, 3), lambda view: view.reshape((3, 2))),  # the axis of 3 would be cut unevenly
        ((2, 3), lambda view: view.reshape((6,)).slice([1], [4])),  # a window of two axes
        ((2, 3), lambda view: view.reshape((6,)).unstack()),
        ((6,), lambda view: view.slice([1], [4]).reshape((2, 2))),  # a window would be cut
        ((2, 3), lambda view: view.reshape((0,))),
    ],
)
def test_what_is_no_view_is_none(shape, move):
    assert move(View.whole(0, shape)) is None


def test_the_first_axes_of_a_whole_leaf_may_be_those_of_scans():
    view = View.whole(0, (2, 1, 3), num_stacked=2)
    made = Viewed((2, 1, 3))
    made.unstack()
    made.unstack()
    assert view.dims == made.view.dims == ((2,),)
    assert view.axes == (Axis(2, 0, 2), Axis(1, 0, 1), Axis(3, 0, 3))
    layout = Layout.of(view, (2, 1, 3), right=[0])
    np.testing.assert_array_equal(layout.from_leaf(arange((2, 1, 3)))[:, 0], [[0, 1, 2], [3, 4, 5]])
