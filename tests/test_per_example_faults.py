"""Faults planted in G's machinery: the comparison with vmap(grad) must notice each of them."""

import dataclasses
import functools
import operator

import architectures
import jax
import jax.numpy as jnp
import pytest
from test_per_example import CLAIMS, TOLERANCES, compare

from sgd_jax.per_example import factors, grads, layout, pullback, rules

Outer, Grads = factors.Outer, grads.PerExampleGrads


def drop_cross_terms(patch):
    """‖Σ_k g^k‖² as Σ_k ‖g^k‖²."""
    patch.setattr(factors, "merge", tuple)
    patch.setattr(factors, "_CANCELS", 0)  # nothing is formed again
    patch.setattr(factors, "inner", lambda x, y: 0.0)


def drop_cross_terms_of_second_moment(patch):
    def without(kept, weights):
        return functools.reduce(operator.add, (f.second_moment(weights) for f in kept))

    patch.setattr(factors, "merge", tuple)
    patch.setattr(factors, "second_moment", without)


def forget_transposition(patch):
    """Matrices put into the leaf in the order in which they come."""
    patch.setattr(
        layout.Layout,
        "to_array",
        lambda self, matrices: matrices.reshape(matrices.shape[:-3] + self.shape),
    )


def forget_that_alignment_transposes(patch):
    patch.setattr(Outer, "swapped", lambda self: self)


def take_mean_for_sum(patch):
    whole = Grads.sum
    patch.setattr(
        Grads,
        "sum",
        lambda self, weights=None: jax.tree.map(
            lambda leaf: leaf / self.num_examples, whole(self, weights)
        ),
    )


def forget_constants(patch):
    """A weight times a constant gets the gradient of the weight alone."""
    patch.setattr(pullback, "_times", lambda factor, array, varies: [factor])


def square_rows_before_adding_them(patch):
    """Σ_t row_t² for (Σ_t row_t)² in an embedding."""
    right = Outer.second_moment

    def wrong(self, weights):
        if not self.is_indexed:
            return right(self, weights)
        return Outer(self.left, jnp.square(self.right), self.layout).weighted_sum(weights)

    patch.setattr(Outer, "second_moment", wrong)


def take_repeated_rows_for_different(patch):
    """Σ_t ‖row_t‖² for the squared norm of an embedding's gradient."""
    patch.setattr(Outer, "combined", lambda self: (self.left, self.right))


def keep_the_diagonal_of_the_gram_route(patch):
    """Σ_t ‖left_t‖² ‖right_t‖² for a weight with a sequence axis."""

    def wrong(x, y):
        lefts = jnp.sum(x.left * y.left, axis=3)
        return jnp.sum(lefts * jnp.sum(x.right * y.right, axis=3), axis=(1, 2))

    patch.setattr(factors, "inner_by_gram", wrong)
    patch.setattr(factors, "_CANCELS", 0)  # nothing is formed again


def send_indices_out_of_bounds_to_the_edge(patch):
    right = rules.Rows.factor
    patch.setattr(
        rules.Rows,
        "factor",
        lambda self, *rest: right(dataclasses.replace(self, drops=False), *rest),
    )


def forget_windows(patch):
    """A slice taken for the beginning of the parameter."""
    right = layout.Layout.windowed
    patch.setattr(
        layout.Layout,
        "windowed",
        lambda self, shape, starts: right(self, shape, [0] * len(starts)),
    )


def take_overlapping_windows_for_disjoint(patch):
    patch.setattr(layout.Layout, "is_disjoint", lambda self, other: self.axes != other.axes)


def forget_the_sign_of_weights(patch):
    right = Grads.second_moment
    patch.setattr(
        Grads,
        "second_moment",
        lambda self, weights=None: right(self, None if weights is None else jnp.abs(weights)),
    )


def clip_without_the_minimum(patch):
    """Every gradient scaled to the norm, the short ones too."""

    def wrong(self, max_norm, weights=None):
        return self.sum(max_norm / jnp.sqrt(self.squared_norms()) / self.num_examples)

    patch.setattr(Grads, "clipped_mean", wrong)


def forget_what_is_pulled_back(patch):
    right = Grads.sum
    patch.setattr(
        Grads,
        "sum",
        lambda self, weights=None: right(dataclasses.replace(self, pulled=None), weights),
    )


def reverse_the_groups_of_a_convolution(patch):
    right = rules._split
    patch.setattr(rules, "_split", lambda x, groups: jnp.flip(right(x, groups), axis=-2))


# fault: (the architecture that shows it, the claim that must fail)
FAULTS = {
    drop_cross_terms: [
        ("transposed_use", "squared norms"),
        ("embedding_three_ways", "squared norms per leaf"),
        ("penalty_and_fit", "squared norms"),
        ("gru_unrolled", "squared norms"),
    ],
    drop_cross_terms_of_second_moment: [("transposed_use", "second moment")],
    forget_transposition: [("sequence_gram", "sum"), ("dot_general_numbers", "materialize")],
    forget_that_alignment_transposes: [("used_twice", "squared norms")],
    take_mean_for_sum: [("sigmoid_mlp", "sum"), ("bare_array", "mean")],
    forget_constants: [("scaled_weights", "sum"), ("conv_3d", "squared norms")],
    square_rows_before_adding_them: [("narrow_indices", "second moment")],
    take_repeated_rows_for_different: [("narrow_indices", "squared norms")],
    keep_the_diagonal_of_the_gram_route: [("sequence_gram", "squared norms")],
    send_indices_out_of_bounds_to_the_edge: [("embedding_modes", "sum")],
    forget_windows: [("overlapping_slices", "sum")],
    take_overlapping_windows_for_disjoint: [("overlapping_slices", "squared norms")],
    forget_the_sign_of_weights: [("sigmoid_mlp", "weighted second moment")],
    clip_without_the_minimum: [("sigmoid_mlp", "clipped mean")],
    forget_what_is_pulled_back: [("choice_by_parameter", "sum")],
    reverse_the_groups_of_a_convolution: [("conv_grouped", "materialize")],
}


@pytest.mark.parametrize(
    ("plant", "name", "claim"),
    [(plant, name, claim) for plant, cases in FAULTS.items() for name, claim in cases],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_is_noticed(plant, name, claim, monkeypatch):
    made, only = architectures.make(name), {claim: CLAIMS[claim]}
    plant(monkeypatch)
    wrong = compare(*made, TOLERANCES[jnp.float64], claims=only, strategy="factored")
    assert any(message.startswith(f"{claim}: off by") for message in wrong)
    monkeypatch.undo()
    assert not compare(*made, TOLERANCES[jnp.float64], claims=only, strategy="factored")
