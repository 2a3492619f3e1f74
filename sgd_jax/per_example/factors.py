"""The kinds of factor: what is kept of the per-example gradients of one array.

A factor stands for n arrays g_1 … g_n of an array's shape without materializing them. Every kind
answers the same questions: weighted sum Σ_i c_i g_i, inner products ⟨g_i, v⟩, second moment
Σ_i c_i |g_i|², and the g_i themselves. `inner` and `gram` relate two factors of one parameter, so
that a parameter used in several places (tied weights, recurrent networks) keeps its cross terms.

Inner products are those of pairs of real numbers, ⟨x, y⟩ = Re Σ x̄ y, so that complex gradients have
real norms. Products accumulate in float32 at least.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from sgd_jax._chunks import vary_like
from sgd_jax.per_example.layout import Layout
from sgd_jax.typing import Array

_CHUNK_ENTRIES = 1 << 22
"""How many entries of g_i are materialized at a time, if they must be."""

NUMBER = 16.0
"""Writing a number and reading it again takes about as long as this many operations."""

_CANCELS = 1 / 16
"""A squared norm below this fraction of the sum over its terms is computed again from g_i."""


def promote(*dtypes: Any) -> jnp.dtype:
    """Returns the dtype that holds numbers of all these dtypes, whatever JAX lets mix."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the real dtype in which norms of numbers of ``dtype`` accumulate."""
    return promote(jnp.finfo(dtype).dtype, jnp.float32)


def einsum(subscripts: str, *operands: Array) -> Array:
    """Returns `jnp.einsum` of operands of any dtypes, accumulated in float32 at least."""
    dtype = promote(*(x.dtype for x in operands))
    out = promote(dtype, jnp.float32)
    operands = tuple(x.astype(dtype) for x in operands)
    return jnp.einsum(subscripts, *operands, preferred_element_type=out)


def square(x: Array) -> Array:
    """Returns |x|², real and in float32 at least."""
    x = x.astype(promote(x.dtype, jnp.float32))
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """The g_i materialized: n arrays, (n, *shape)."""

    values: Array

    def weighted_sum(self, weights: Array | None) -> Array:
        """Returns Σ_i c_i g_i; weights None is all ones."""
        if weights is None:
            return jnp.sum(self.values, axis=0)
        dtype = promote(self.values.dtype, jnp.float32)
        weights = weights.astype(self.values.dtype)
        return jnp.tensordot(weights, self.values, axes=1, preferred_element_type=dtype)

    def inner_products(self, direction: Array) -> Array:
        """Returns ⟨g_i, v⟩, (n,)."""
        axes = tuple(range(1, self.values.ndim))
        products = jnp.conj(self.values) * direction.astype(self.values.dtype)[None]
        return jnp.sum(products.real, axis=axes, dtype=accumulator(products.dtype))

    def second_moment(self, weights: Array) -> Array:
        """Returns Σ_i c_i |g_i|², entry by entry."""
        return Dense(square(self.values)).weighted_sum(weights)

    def squared_norms(self) -> Array:
        """Returns ‖g_i‖², (n,)."""
        return jnp.sum(square(self.values), axis=tuple(range(1, self.values.ndim)))

    def materialize(self) -> Array:
        """Returns the g_i, (n, *shape)."""
        return self.values

    def select(self, choose: Callable[[Array], Array]) -> "Dense":
        """Returns the factor of other examples: ``choose`` acts on every leading axis."""
        return Dense(choose(self.values))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """g_i = c_i B: one array for all examples, times a number for each. A penalty makes such."""

    coefficients: Array
    basis: Array

    def weighted_sum(self, weights: Array | None) -> Array:
        """Returns Σ_i c_i g_i; weights None is all ones."""
        return self.basis * Dense(self.coefficients).weighted_sum(weights)

    def inner_products(self, direction: Array) -> Array:
        """Returns ⟨g_i, v⟩, (n,)."""
        product = jnp.vdot(self.basis, direction.astype(self.basis.dtype))
        return (jnp.conj(self.coefficients) * product).real

    def second_moment(self, weights: Array) -> Array:
        """Returns Σ_i c_i |g_i|², entry by entry."""
        return square(self.basis) * Dense(self.coefficients).second_moment(weights)

    def squared_norms(self) -> Array:
        """Returns ‖g_i‖², (n,)."""
        return square(self.coefficients) * jnp.sum(square(self.basis))

    def materialize(self) -> Array:
        """Returns the g_i, (n, *shape)."""
        return jnp.multiply.outer(self.coefficients, self.basis)

    def select(self, choose: Callable[[Array], Array]) -> "Shared":
        """Returns the factor of other examples: ``choose`` acts on every leading axis."""
        return Shared(choose(self.coefficients), self.basis)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outer:
    """Sums of outer products: g_i[h] = scale[h] ⊙ Σ_t left[i, h, t] ⊗ right[i, h, t].

    ``right`` is (n, h, t, b). ``left`` is (n, h, t, a), or integer (n, h, t): then term t goes to
    row ``left[i, h, t]`` of the matrix, as with an embedding; a row of −1 is no row at all. t runs
    over whatever one example uses the array for many times: positions, time steps, uses. ``scale``,
    (h, a, b), multiplies every entry, as a mask on a weight does; None is all ones.
    """

    left: Array
    right: Array
    layout: Layout = dataclasses.field(metadata={"static": True})
    scale: Array | None = None

    @property
    def is_indexed(self) -> bool:
        """Whether ``left`` names rows instead of listing them."""
        return self.left.ndim == 3

    @property
    def num_terms(self) -> int:
        """The number of outer products summed, t."""
        return self.right.shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of g_i."""
        if self.is_indexed:
            return self.right.dtype
        return promote(self.left.dtype, self.right.dtype)

    def weighted_sum(self, weights: Array | None) -> Array:
        """Returns Σ_i c_i g_i; weights None is all ones."""
        left, right = self.left, self.right
        group, rows, _ = self.layout.sizes()
        scale = None if weights is None else weights.astype(right.dtype)[:, None, None, None]
        if group == 1 and not self.is_indexed:
            matrices = _sum_of_outer(left, right, scale)[None]
        else:
            if scale is not None:
                if self.is_indexed or left.shape[-1] > right.shape[-1]:
                    right = right * scale
                else:
                    left = left * scale.astype(left.dtype)
            if self.is_indexed:
                matrices = _scatter(jnp.moveaxis(left, 1, 0), jnp.moveaxis(right, 1, 0), rows)
            else:
                matrices = einsum("nhta,nhtb->hab", left, right)
        return self.layout.to_array(self._scaled(matrices))

    def inner_products(self, direction: Array) -> Array:
        """Returns ⟨g_i, v⟩, (n,)."""
        matrices = self._scaled(self.layout.from_array(jnp.conj(direction)).astype(self.dtype))
        if self.is_indexed:
            applied = _gather_rows(matrices, self.left)
        elif matrices.shape[0] == 1:
            applied = einsum("nhta,ab->nhtb", self.left, matrices[0])
        else:
            applied = einsum("nhta,hab->nhtb", self.left, matrices)
        products = self.right.astype(applied.dtype) * applied
        return jnp.sum(products.real, axis=(1, 2, 3), dtype=accumulator(products.dtype))

    def second_moment(self, weights: Array) -> Array:
        """Returns Σ_i c_i |g_i|², entry by entry."""
        scale = None if self.scale is None else square(self.scale)
        if self.is_indexed:
            rows, totals = self.combined()
            squares = Outer(rows, square(totals), self.layout, scale)
            return squares.weighted_sum(weights)
        if self.num_terms == 1:
            return Outer(square(self.left), square(self.right), self.layout, scale).weighted_sum(
                weights
            )
        return _second_moment_in_chunks((self,), weights)

    def materialize(self) -> Array:
        """Returns the g_i, (n, *shape)."""
        return self.layout.to_array(self.matrices())

    def matrices(self) -> Array:
        """Returns the g_i as (n, group, left, right)."""
        if self.is_indexed:
            rows = self.layout.sizes()[1]
            scatter = jax.vmap(jax.vmap(functools.partial(_scatter_one, rows=rows)))
            return self._scaled(scatter(self.left, self.right))
        return self._scaled(einsum("nhta,nhtb->nhab", self.left, self.right).astype(self.dtype))

    def select(self, choose: Callable[[Array], Array]) -> "Outer":
        """Returns the factor of other examples: ``choose`` acts on every leading axis."""
        return dataclasses.replace(self, left=choose(self.left), right=choose(self.right))

    def swapped(self) -> "Outer":
        """Returns the same g_i seen as transposed matrices."""
        scale = None if self.scale is None else jnp.swapaxes(self.scale, 1, 2)
        return Outer(self.right, self.left, self.layout.swapped(), scale)

    def conjugated(self) -> "Outer":
        """Returns the factor of the conjugates ḡ_i."""
        scale = None if self.scale is None else _conjugate(self.scale)
        return Outer(_conjugate(self.left), _conjugate(self.right), self.layout, scale)

    def combined(self) -> tuple[Array, Array]:
        """Returns the rows that ``left`` names and the sum of what goes to each.

        Rows named several times by an example are added up and named once; the other places hold
        row −1 and zeros.
        """
        t, rows = self.num_terms, self.layout.sizes()[1]
        if t == 1:
            return self.left, jnp.where(self.left[..., None] >= 0, self.right, 0)
        if rows <= t:
            index = jnp.broadcast_to(jnp.arange(rows), (*self.left.shape[:2], rows))
            scatter = jax.vmap(jax.vmap(functools.partial(_scatter_one, rows=rows)))
            return index, scatter(self.left, self.right)
        if t <= _SHORT:
            same = _same_rows(self.left, self.left)
            earlier = jnp.tri(t, k=-1, dtype=bool)[None, None]
            is_first = ~jnp.any(same & earlier, axis=-1)
            totals = einsum("nhts,nhsb->nhtb", same.astype(self.right.dtype), self.right)
            kept = is_first & (self.left >= 0)
            return jnp.where(kept, self.left, -1), jnp.where(kept[..., None], totals, 0)
        return jax.vmap(jax.vmap(_combine_sorted))(self.left, self.right)

    def norm_route(self) -> str:
        """Returns the cheapest exact route to ‖g_i‖²: rows, product, gram, pairs or formed.

        Operations for one example: Gram, Σ_{t,s} ⟨left_t, left_s⟩ ⟨right_t, right_s⟩, takes
        2t²(a + b); pairs, Σ_{t≤s} (left_t ⊙ left_s)ᵀ scale² (right_t ⊙ right_s), takes t(t + 1)ab;
        forming g_i takes 2tab, and 16 for each number written and read.
        """
        h, a, b = self.layout.sizes()
        t = self.num_terms
        if self.is_indexed:
            return "rows" if self.scale is None else "formed"
        if t == 1:
            return "product" if self.scale is None else "pairs"
        formed = h * a * b * (2 * t + 2 * NUMBER)
        if self.scale is None:
            products = h * t * t * (2 * (a + b) + 2 * NUMBER)
            return "gram" if products <= formed else "formed"
        products = h * t * (t + 1) * (a * b + NUMBER * (a + b))
        return "pairs" if products <= formed else "formed"

    def squared_norms(self) -> tuple[Array, Array | None]:
        """Returns ‖g_i‖², (n,), and Σ_t ‖g_it‖² over its terms where they may cancel, or None."""
        route = self.norm_route()
        if route == "rows":
            return jnp.sum(square(self.combined()[1]), axis=(1, 2, 3)), None
        if route == "formed":
            return formed_squared_norms((self,)), None
        if route == "product":
            lefts, rights = (jnp.sum(square(x), axis=(2, 3)) for x in (self.left, self.right))
            return jnp.sum(lefts * rights, axis=1), None
        if route == "gram":
            terms = jnp.sum(square(self.left), -1) * jnp.sum(square(self.right), -1)
            return inner_by_gram(self, self), jnp.sum(terms, axis=(1, 2))
        assert self.scale is not None  # the route of scaled factors
        weights = square(self.scale)
        own = dataclasses.replace(self, left=square(self.left), right=square(self.right))
        own = jnp.sum(own._paired(weights), axis=(1, 2))
        if self.num_terms == 1:
            return own, None
        lower, upper = jnp.triu_indices(self.num_terms, 1)
        cross = Outer(
            (self.left[:, :, lower] * jnp.conj(self.left[:, :, upper])),
            (self.right[:, :, lower] * jnp.conj(self.right[:, :, upper])),
            self.layout,
        )
        return own + 2 * jnp.sum(cross._paired(weights), axis=(1, 2)), own

    def _paired(self, matrices: Array) -> Array:
        """Returns Re left_tᵀ M right_t for every term, (n, h, t)."""
        applied = einsum("nhta,hab->nhtb", self.left, matrices.astype(self.left.dtype))
        return jnp.sum((applied * self.right.astype(applied.dtype)).real, axis=-1)

    def _scaled(self, matrices: Array) -> Array:
        """Returns matrices (..., h, a, b) times the scale."""
        if self.scale is None:
            return matrices
        scale = self.scale.astype(promote(matrices.dtype, _least(self.scale.dtype)))
        return matrices * jnp.expand_dims(scale, range(matrices.ndim - 3))


Factor: TypeAlias = Dense | Shared | Outer


def _conjugate(x: Array) -> Array:
    return jnp.conj(x) if jnp.iscomplexobj(x) else x


def _least(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the narrowest dtype that is complex if ``dtype`` is."""
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.dtype(jnp.complex64 if is_complex else jnp.bfloat16)


_SMALL = 1 << 16
"""A left operand of up to this many entries is transposed before it is multiplied."""

_SHORT = 32
"""Up to this many rows by index are compared with each other; more are sorted."""


def _sum_of_outer(left: Array, right: Array, scale: Array | None) -> Array:
    """Returns Σ c left ⊗ right over all axes but the last, (a, b); ``scale`` is c, None for ones.

    XLA's library for small products on a CPU takes no transposed left operand and leaves leftᵀ
    right to a slower one. The barrier keeps the transpose out of the product, where it becomes
    part of the scaling: an epoch of [784, 30, 10] with m = 10 takes 0.9 of the time, with m = 128
    0.75. Large products are better off as they are.
    """
    if scale is not None:
        if left.shape[-1] > right.shape[-1]:
            right = right * scale
        else:
            left = left * scale.astype(left.dtype)
    dtype = promote(left.dtype, right.dtype)
    rows, columns = (
        x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(dtype) for x in (left, right)
    )
    transposed = rows.T
    if rows.size <= _SMALL:
        transposed = jax.lax.optimization_barrier(transposed)
    return jnp.matmul(transposed, columns, preferred_element_type=promote(dtype, jnp.float32))


def is_larger_than_formed(factor: Factor) -> bool:
    """Whether g_i is at most half as large as its factors: t(a + b) ≥ 2ab."""
    if not isinstance(factor, Outer) or factor.num_terms == 1 or factor.is_indexed:
        return False
    _, a, b = factor.layout.sizes()
    return factor.num_terms * (a + b) >= 2 * a * b


def prefers_forming(factor: Factor) -> bool:
    """Whether materializing g_i at once costs less than keeping its factors, as a rule.

    It does if g_i is at most half as large as its factors, as with the kernels of convolutions, or
    if norms and sum take less time from g_i (one product, and the writing of its a·b numbers, which
    costs twelve times `NUMBER` since the memory is new) than from the factors (the product of the
    sum, and the norms by `Outer.norm_route`), and g_i is not much larger.
    """
    if not isinstance(factor, Outer) or factor.num_terms == 1:
        return False
    _, a, b = factor.layout.sizes()
    t = factor.num_terms
    if factor.is_indexed:
        return a <= t
    if is_larger_than_formed(factor):
        return True
    if a * b > 4 * t * (a + b):
        return False
    formed = a * b * (2 * t + 12 * NUMBER)
    gram = t * t * (2 * (a + b) + 2 * NUMBER)
    norms = a * b * (2 * t + 2 * NUMBER)
    return formed < 0.95 * (2 * t * a * b + min(gram if factor.scale is None else norms, norms))


def inner_by_gram(x: Outer, y: Outer) -> Array:
    """Returns ⟨g_i, h_i⟩ = Σ_{t,s} ⟨left_t, left'_s⟩ ⟨right_t, right'_s⟩, two of one layout."""
    y = y.conjugated()
    rights = einsum("nhtb,nhsb->nhts", x.right, y.right)
    return jnp.sum((_left_products(x, y) * rights).real, axis=(1, 2, 3))


def inner_by_forming(x: Outer, y: Factor) -> Array:
    """Returns ⟨g_i, h_i⟩ with h_i materialized."""
    values = y.materialize()
    matrices = x._scaled(x.layout.from_array(jnp.conj(values)))
    if x.is_indexed:
        products = x.right * jax.vmap(_gather_rows_of_one)(matrices, x.left)
        return jnp.sum(products.real, axis=(1, 2, 3))
    return einsum("nhta,nhab,nhtb->n", x.left, matrices, x.right).real


def merge(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Returns the same sum of gradients in fewer factors: what is alike is added or joined."""
    dense = [f for f in factors if isinstance(f, Dense)]
    others: list[Factor] = [f for f in factors if isinstance(f, Shared)]
    if dense:
        others.append(Dense(functools.reduce(operator.add, (f.values for f in dense))))
    groups: list[list[Outer]] = []
    for factor in factors:
        if not isinstance(factor, Outer):
            continue
        for group in groups:
            aligned = _align(factor, group[0])
            if aligned is None or aligned.is_indexed != group[0].is_indexed:
                continue
            if factor.scale is None and group[0].scale is None:
                group.append(aligned)
                break
        else:
            groups.append([factor])
    for group in groups:
        if len(group) == 1:
            others.append(group[0])
            continue
        left, right = (
            jnp.concatenate([x.astype(_common(xs)) for x in xs], axis=2)
            for xs in ([f.left for f in group], [f.right for f in group])
        )
        others.append(Outer(left, right, group[0].layout))
    return tuple(others)


def squared_norms(leaves: Sequence[Sequence[Factor]], num_examples: int) -> list[Array]:
    """Returns ‖Σ_k g_i^k‖² over the factors k of each parameter, (n,), cross terms included.

    Products of factors lose ε·(Σ_t ‖g_it‖² / ‖g_i‖²) where terms cancel, where ``vmap(grad)`` loses
    the square root of that. So if they cancel in any example, g_i is formed.
    """
    merged = [merge(factors) for factors in leaves]
    totals = [jnp.zeros(num_examples) for _ in leaves]
    cancelling = []
    doubtful = []
    for k, factors in enumerate(merged):
        if not factors:
            continue
        total, terms = _norms_by_products(factors)
        totals[k] = jnp.maximum(total, 0)
        if terms is not None:
            doubtful.append(k)
            cancelling.append(jnp.any(total < _CANCELS * terms))
    if not doubtful:
        return totals
    cancels = functools.reduce(operator.or_, cancelling)

    def formed() -> list[Array]:
        return [formed_squared_norms(merged[k]).astype(totals[k].dtype) for k in doubtful]

    again = jax.lax.cond(cancels, formed, lambda: [totals[k] for k in doubtful])
    for k, total in zip(doubtful, again, strict=True):
        totals[k] = total
    return totals


def _norms_by_products(factors: Sequence[Factor]) -> tuple[Array, Array | None]:
    """Returns ‖Σ_k g_i^k‖², and the sum of the squared norms of its terms where they may cancel."""
    norms, terms, may_cancel = [], [], len(factors) > 1
    for factor in factors:
        own = factor.squared_norms()
        norm, parts = own if isinstance(own, tuple) else (own, None)
        norms.append(norm)
        terms.append(norm if parts is None else parts)
        may_cancel |= parts is not None
    for x, y in itertools.combinations(factors, 2):
        norms.append(2 * inner(x, y))
    total = functools.reduce(operator.add, norms)
    return total, functools.reduce(operator.add, terms) if may_cancel else None


def formed_squared_norms(factors: Sequence[Factor]) -> Array:
    """Returns ‖Σ_k g_i^k‖², (n,), from g_i, formed some examples at a time."""

    def one(factors: Sequence[Factor]) -> Array:
        lead = [f.select(lambda x: x[None]) for f in factors]
        values = functools.reduce(operator.add, (_values(f, len(lead) == 1) for f in lead))
        return jnp.sum(square(values))

    size = max(1, _CHUNK_ENTRIES // max(1, _entries(factors[0])))
    return _map_examples(one, tuple(factors), size)


def _values(factor: Factor, alone: bool) -> Array:
    """Returns g_i, as matrices where the place of an entry does not matter."""
    return factor.matrices() if alone and isinstance(factor, Outer) else factor.materialize()


def _map_examples(one: Callable[..., Array], factors: tuple[Factor, ...], size: int) -> Array:
    """Applies a function of one example's factors to all, ``size`` of them at a time."""
    arrays: list[Array] = []

    def collect(array: Array) -> Array:
        arrays.append(array)
        return array

    for factor in factors:
        factor.select(collect)

    def of_arrays(chosen: Sequence[Array]) -> Array:
        left = list(chosen)
        return one([f.select(lambda _: left.pop(0)) for f in factors])

    if size >= arrays[0].shape[0]:
        return jax.vmap(of_arrays)(arrays)
    return jax.lax.map(of_arrays, arrays, batch_size=size)


def second_moment(factors: Sequence[Factor], weights: Array) -> Array:
    """Returns Σ_i c_i |Σ_k g_i^k|², entry by entry, over the factors k of one parameter."""
    factors = merge(factors)
    if len(factors) == 1:
        return factors[0].second_moment(weights)
    return _second_moment_in_chunks(factors, weights)


def gram(factors: Sequence[Factor], others: Sequence[Factor]) -> Array:
    """Returns ⟨Σ_k g_i^k, Σ_l h_j^l⟩ over the factors k and l of one parameter, (n, n')."""
    products = [_gram(x, y) for x in merge(factors) for y in merge(others)]
    return functools.reduce(operator.add, products)


def inner(x: Factor, y: Factor) -> Array:
    """Returns ⟨g_i, h_i⟩ for two factors of one parameter, (n,)."""
    if isinstance(x, Shared):
        return (jnp.conj(x.coefficients) * _bilinear(y, jnp.conj(x.basis))).real
    if isinstance(y, Shared):
        return inner(y, x)
    if isinstance(x, Outer) and isinstance(y, Outer):
        if x.layout.is_disjoint(y.layout):
            return jnp.zeros(x.right.shape[:1], accumulator(x.right.dtype))
        aligned = _align(x, y)
        if aligned is not None and aligned.scale is None and y.scale is None:
            return inner_by_gram(aligned, y)
        if aligned is not None and not (aligned.is_indexed or y.is_indexed):
            pairs = aligned.num_terms * y.num_terms
            if pairs <= aligned.num_terms + y.num_terms:
                return _inner_by_pairs(aligned, y)
    if isinstance(x, Outer):
        return inner_by_forming(x, Dense(y.materialize()))
    if isinstance(y, Outer):
        return inner_by_forming(y, x)
    axes = tuple(range(1, x.values.ndim))
    products = (jnp.conj(x.values) * y.values).real
    return jnp.sum(products, axis=axes, dtype=accumulator(products.dtype))


def _inner_by_pairs(x: Outer, y: Outer) -> Array:
    """Returns Σ_{t,s} (left_t ⊙ left'_s)ᵀ scale scale' (right_t ⊙ right'_s), two of one layout."""
    y = y.conjugated()
    n, h = x.left.shape[:2]

    def pair(u: Array, v: Array) -> Array:
        return (u[:, :, :, None] * v[:, :, None]).reshape(n, h, -1, u.shape[-1])

    scale = functools.reduce(operator.mul, [f.scale for f in (x, y) if f.scale is not None])
    pairs = Outer(pair(x.left, y.left), pair(x.right, y.right), x.layout)
    return jnp.sum(pairs._paired(scale), axis=(1, 2))


def _bilinear(factor: Factor, array: Array) -> Array:
    """Returns Σ g_i v without conjugation or real part, (n,)."""
    if not jnp.iscomplexobj(array) and not jnp.iscomplexobj(jax.tree.leaves(factor)[-1]):
        return factor.inner_products(array)
    values = factor.materialize()
    return jnp.tensordot(values, array.astype(values.dtype), axes=array.ndim)


def _gram(x: Factor, y: Factor) -> Array:
    """Returns ⟨g_i, h_j⟩ for two factors of one parameter, (n, n')."""
    if isinstance(x, Shared):
        products = _bilinear(y, jnp.conj(x.basis))
        return jnp.multiply.outer(jnp.conj(x.coefficients), products).real
    if isinstance(y, Shared):
        return _gram(y, x).T
    if isinstance(x, Outer) and isinstance(y, Outer):
        if x.layout.is_disjoint(y.layout):
            shape = (x.left.shape[0], y.left.shape[0])
            return jnp.zeros(shape, accumulator(x.right.dtype))
        aligned = _align(x, y)
        if aligned is not None and _pairs_are_cheaper(aligned, y):
            y = y.conjugated()
            rights = einsum("nhtb,mhsb->nmhts", aligned.right, y.right)
            return einsum("nmhts,nmhts->nm", _left_pairs(aligned, y), rights).real
    a, b = x.materialize(), jnp.conj(y.materialize())
    a, b = (x.reshape(x.shape[0], math.prod(x.shape[1:])) for x in (a, b))
    return einsum("np,mp->nm", a, b).real


def _pairs_are_cheaper(x: Outer, y: Outer) -> bool:
    """Whether n·m·t·s·(a + b) products are fewer than forming both and multiplying."""
    if x.scale is not None or y.scale is not None:
        return False
    _, a, b = x.layout.sizes()
    n, m, t, s = x.left.shape[0], y.left.shape[0], x.num_terms, y.num_terms
    if t == s == 1:
        return True
    return n * m * t * s * (a + b) <= (n * t + m * s + n * m) * a * b


def _align(x: Outer, y: Outer) -> Outer | None:
    """Returns ``x`` in the layout of ``y``, transposed if need be; None if there is no such way."""
    if x.layout == y.layout:
        return x
    if not x.is_indexed and x.layout.swapped() == y.layout:
        return x.swapped()
    return None


def _common(arrays: Sequence[Array]) -> jnp.dtype:
    return promote(*(x.dtype for x in arrays))


def _same_rows(x: Array, y: Array) -> Array:
    """Whether rows x (..., t) and y (..., s) are the same row, and a row at all: (..., t, s)."""
    return (x[..., :, None] == y[..., None, :]) & (x[..., :, None] >= 0)


def _left_products(x: Outer, y: Outer) -> Array:
    """Returns left_t · left'_s within each example, (n, h, t, s)."""
    if x.is_indexed and y.is_indexed:
        return _same_rows(x.left, y.left).astype(x.right.dtype)
    if x.is_indexed:
        return jnp.swapaxes(_left_products(y, x), -1, -2)
    if y.is_indexed:
        # left_t at row index_s, zero if there is no row
        picked = jnp.take_along_axis(
            x.left, jnp.maximum(y.left, 0)[:, :, None, :].astype(jnp.int32), axis=-1
        )
        return jnp.where(y.left[:, :, None, :] >= 0, picked, 0)
    return einsum("nhta,nhsa->nhts", x.left, y.left)


def _left_pairs(x: Outer, y: Outer) -> Array:
    """Returns left_t · left'_s between examples of x and examples of y, (n, m, h, t, s)."""
    if x.is_indexed or y.is_indexed:
        return jax.vmap(
            lambda one: jax.vmap(lambda other: _left_products(_lead(one), _lead(other))[0])(y)
        )(x)
    return einsum("nhta,mhsa->nmhts", x.left, y.left)


def _lead(factor: Outer) -> Outer:
    """Returns a factor of one example, whose arrays have lost their leading axis to vmap."""
    return Outer(factor.left[None], factor.right[None], factor.layout)


def _scatter(index: Array, rows_of_right: Array, rows: int) -> Array:
    """Adds up rows: index (h, n, t) and right (h, n, t, b) make (h, rows, b)."""
    flat_index = index.reshape(index.shape[0], -1)
    flat_right = rows_of_right.reshape(*flat_index.shape, rows_of_right.shape[-1])
    return jax.vmap(functools.partial(_scatter_one, rows=rows))(flat_index, flat_right)


def _scatter_one(index: Array, right: Array, rows: int) -> Array:
    """Adds up rows: index (t,) and right (t, b) make (rows, b); index −1 goes nowhere."""
    index = jnp.where(index >= 0, index, rows)
    return jnp.zeros((rows, right.shape[-1]), right.dtype).at[index].add(right, mode="drop")


def _combine_sorted(index: Array, right: Array) -> tuple[Array, Array]:
    """Adds up rows of the same index: (t,) and (t, b), one place for each index that occurs."""
    order = jnp.argsort(index)
    index = index[order]
    starts = jnp.concatenate([jnp.ones(1, bool), index[1:] != index[:-1]])
    place = jnp.cumsum(starts) - 1
    place = jnp.where(index >= 0, place, -1)
    totals = _scatter_one(place, right[order], index.shape[0])
    place = jnp.where(place >= 0, place, index.shape[0])
    rows = jnp.full(index.shape, -1, index.dtype).at[place].set(index, mode="drop")
    return rows, totals


def _gather_rows(matrices: Array, index: Array) -> Array:
    """Returns rows (n, h, t, b) of matrices (h, a, b) named by index; −1 gives zeros."""
    return jax.vmap(lambda one: _gather_rows_of_one(matrices, one))(index)


def _gather_rows_of_one(matrices: Array, index: Array) -> Array:
    rows = jnp.take_along_axis(matrices, jnp.maximum(index, 0)[..., None], axis=1)
    return jnp.where(index[..., None] >= 0, rows, 0)


def _second_moment_in_chunks(factors: Sequence[Factor], weights: Array) -> Array:
    """Returns Σ_i c_i |Σ_k g_i^k|², with g_i formed a chunk of examples at a time."""
    n = weights.shape[0]
    size = max(1, min(n, _CHUNK_ENTRIES // max(1, _entries(factors[0]))))
    steps = -(-n // size)

    def split(array: Array) -> Array:
        padding = [(0, steps * size - n)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(steps, size, *array.shape[1:])

    split_factors = tuple(f.select(split) for f in factors)

    def add(total: Array, step: Array) -> tuple[Array, None]:
        chunk = [f.select(lambda array: array[step]) for f in split_factors]
        values = functools.reduce(operator.add, (f.materialize() for f in chunk))
        return total + Dense(values).second_moment(split_weights[step]).astype(dtype), None

    split_weights = split(weights)
    likes = [jax.eval_shape(lambda f: f.materialize(), factor) for factor in factors]
    like, dtype = likes[0], accumulator(_common([*likes, weights]))
    zeros = vary_like((tuple(factors), weights), jnp.zeros(like.shape[1:], dtype))
    return jax.lax.scan(add, zeros, jnp.arange(steps))[0]


def _entries(factor: Factor) -> int:
    """Returns the number of entries of one g_i."""
    like = jax.eval_shape(lambda f: f.materialize(), factor)
    return math.prod(like.shape[1:])
