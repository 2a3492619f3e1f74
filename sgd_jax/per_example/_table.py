"""A table of how the gradients of each parameter are kept."""

from collections.abc import Callable
from typing import Any

import jax

from sgd_jax import _validate
from sgd_jax.per_example.factors import Dense, Factor
from sgd_jax.per_example.grads import format_bytes
from sgd_jax.per_example.pullback import Landed
from sgd_jax.per_example.rules import Lift
from sgd_jax.per_example.sites import Site
from sgd_jax.per_example.transform import Collected, collect, flat, leaf_names
from sgd_jax.typing import Examples, Params


def explain(fun: Callable[..., Any], params: Params, examples: Examples) -> str:
    """Returns a table of how the gradients of each parameter are kept.

    One line for each place where a parameter meets an example: the parameter, the primitive and
    source line, how its gradients are kept, and the memory that takes for n examples beside that of
    n materialized gradients. ``fallback`` marks a meeting without a rule, ``formed`` one whose
    gradients are materialized because that costs less than keeping the factors, ``pulled back`` one
    whose factor stopped at a value computed from the parameter: norms then form the gradients.

    Args:
      fun: the cost of ONE example, ``(params, example) -> scalar``.
      params: the parameters, or their shapes (`jax.ShapeDtypeStruct`).
      examples: n examples, or their shapes.
    """
    _validate.floating_params(params)
    n = _validate.num_examples(examples)
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda tree: tree, params))
    function = flat(fun, treedef, has_aux=False)
    found: list[tuple[Collected, list[Landed]]] = []

    def kept(leaves: list[Any], examples: Examples) -> None:
        collected = collect(function, leaves, examples)
        landed = [collected.land(k, forms=True) for k in range(len(collected.trace.sites))]
        found.append((collected, landed))

    jax.eval_shape(kept, leaves, examples)
    ((collected, landed),) = found
    names = leaf_names(params)
    rows = [("parameter", "meets the example in", "kept as", "memory", "materialized")]
    used: set[int] = set()
    for site, where in zip(collected.trace.sites, landed, strict=True):
        touched = sorted(site.origin.leaves)
        used.update(touched)
        factors = [f for found in (*where.leaves.values(), *where.stopped.values()) for f in found]
        memory = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(factors))
        materialized = sum(leaves[leaf].size * leaves[leaf].dtype.itemsize for leaf in touched) * n
        rows.append(
            (
                " ".join(names[leaf] for leaf in touched),
                f"{site.primitive} {site.source}".strip(),
                _kept_as(site, where, factors),
                format_bytes(memory),
                format_bytes(materialized),
            )
        )
    rows += [
        (name, "nothing", "gradient is zero", format_bytes(0), format_bytes(0))
        for leaf, name in enumerate(names)
        if leaf not in used
    ]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _kept_as(site: Site, landed: Landed, factors: list[Factor]) -> str:
    """Returns the words for how the gradients at one site are kept."""
    if site.fallback:
        words = "fallback: materialized"
        words += "" if site.fallback == "no rule" else f" ({site.fallback})"
    else:
        words = site.rule.name
        formed = factors and all(isinstance(f, Dense) for f in factors)
        if formed and not isinstance(site.rule, Lift):
            words += ", formed"
    return words + (", pulled back" if landed.stopped else "")
