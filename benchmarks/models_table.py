"""The table of the suite `models`: one row a model, from the JSON lines of its runs."""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.zoo import MODELS

PLAIN, OURS, VMAP = "plain gradient", "sgd_jax, norms + mean", "vmap(grad), norms + mean"
HEADING = """# Models that other people wrote

`scripts/benchmark.py --suite=models`: packages of the extra `models`, small sizes, random weights.
Each row: the largest relative error of `sum`, weighted `sum`, `mean`, `squared_norms` (also per
leaf), `second_moment`, `inner_products`, `gram`, `clipped_mean` and `materialize` against
`jax.vmap(jax.grad(fun))` in float64; then, in float32 and over the plain gradient of the mean cost:
medians of the time of norms + mean (and the shortest of ours over the shortest), ours and by
`vmap(grad)`, timed in turns in one process; trace and compile; temporary memory. Last, the
primitives at which a gradient was materialized for want of a rule, or the exception."""
EXACT = 1e-9
"""Largest relative error in float64 that counts as exact."""


def fell_back(explained: str) -> list[str]:
    """Returns the primitives at which `sj.explain` shows a fallback, each once."""
    cells = [re.split(r"\s{2,}", line) for line in explained.splitlines()]
    fallbacks = [row for row in cells if len(row) > 2 and row[2].startswith("fallback")]
    return sorted({row[1].split()[0] for row in fallbacks})


def ratio(row: dict, name: str, entry: str) -> float | None:
    """Returns a ratio to the plain gradient: the median of times, or of another entry."""
    if "contenders" not in row:
        return None
    of, to = (row["contenders"][c][entry] for c in (name, PLAIN))
    return of / to if to > 0 else None


def as_line(row: dict) -> str:
    """Returns a row in one line for a terminal."""
    cells = as_cells(row)
    return f"{row['model']}: " + ", ".join(
        f"{name} {cell}" for name, cell in zip(COLUMNS[1:], cells[1:], strict=True) if cell
    )


COLUMNS = [
    "model", "parameters", "n", "worst error", "norms + mean", "of minima",
    "vmap(grad) + norms",
    "plain, ms", "compile", "memory", "memory, vmap(grad)", "fell back",
]  # fmt: skip


def as_cells(row: dict) -> list[str]:
    """Returns the cells of a row of the table."""

    def number(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    errors = row.get("errors", {})
    worst = max(errors, key=errors.get) if errors else None
    worst_cell = "" if worst is None else f"{errors[worst]:.0e}"
    if worst is not None and not errors[worst] < EXACT:
        worst_cell += f" ({worst})"
    plain = row.get("contenders", {}).get(PLAIN, {}).get("median")
    last = ", ".join(row.get("fell_back", []))
    if "error" in row:
        last = f"refused: {row['error']}"
    return [
        row["model"],
        f"{row['num_parameters']:,}" if "num_parameters" in row else "",
        str(row.get("num_examples", "")),
        worst_cell,
        number(ratio(row, OURS, "median")),
        number(ratio(row, OURS, "least")),
        number(ratio(row, VMAP, "median")),
        number(None if plain is None else plain * 1e3, 1),
        number(ratio(row, OURS, "compile_seconds")),
        number(ratio(row, OURS, "temporary_bytes")),
        number(ratio(row, VMAP, "temporary_bytes")),
        last,
    ]


def latest(path: Path) -> list[dict]:
    """Returns the last row of each model in a file of JSON lines, in the order of the zoo."""
    rows = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows[row["model"]] = row
    return [rows[model.name] for model in MODELS if model.name in rows]


def as_markdown(rows: Sequence[dict]) -> str:
    """Returns the table, and what it adds up to."""
    rule = "|" + "|".join(["---", *["---:"] * (len(COLUMNS) - 2), "---"]) + "|"
    lines = ["| " + " | ".join(COLUMNS) + " |", rule]
    for row in rows:
        lines.append("| " + " | ".join(c.replace("|", "/") for c in as_cells(row)) + " |")
    exact = [max(row["errors"].values()) for row in rows if "errors" in row]
    ours = [r for row in rows if (r := ratio(row, OURS, "median")) is not None]
    compiles = [r for row in rows if (r := ratio(row, OURS, "compile_seconds")) is not None]
    slower = [
        row["model"]
        for row in rows
        if "contenders" in row
        and row["contenders"][OURS]["median"] > 1.1 * row["contenders"][VMAP]["median"]
    ]
    summary = [
        f"{len(rows)} models; {sum('error' in row for row in rows)} refused.",
        f"Every method exact to {EXACT:g} in float64: "
        f"{sum(e < EXACT for e in exact)} of {len(exact)}.",
    ]
    if ours:
        summary += [
            f"Norms + mean over the plain gradient: median {statistics.median(ours):.2f}, at most "
            f"1.4 on {sum(r <= 1.4 for r in ours)} of {len(ours)}, largest {max(ours):.2f}.",
            f"More than a tenth slower than vmap(grad) + norms: {', '.join(slower) or 'none'}.",
            f"Trace + compile over the plain gradient's: median {statistics.median(compiles):.2f}, "
            f"largest {max(compiles):.2f}.",
        ]
    versions = rows[-1]["where"]["versions"]
    loads = [row["load_before"] for row in rows if row.get("load_before") is not None]
    if loads:
        summary.append(f"Load of the machine before: {min(loads):.1f} to {max(loads):.1f}.")
    packages = {name: v for row in rows for name, v in row.get("packages", {}).items()}
    versions = versions | packages
    where = (
        f"Commits {', '.join(sorted({str(row['commit']) for row in rows}))}; "
        f"{rows[-1]['where']['num_cores']} cores, {rows[-1]['where']['machine']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "."
    )
    return "\n".join(
        [HEADING, "", *lines, "", "\n".join(f"- {line}" for line in summary), "", where]
    )
