r"""What is a mini-batch gradient worth, compared with the gradient of all examples?

For mini-batches of every size, drawn in several ways: the exact law of the mean squared error
E‖ĝ − G‖² beside that of thousands of mini-batches, the angle to the full gradient G, and the time
that an estimate takes. At initialization (--epochs=0), after training, or at the last checkpoint of
a run of `experiments.train`. Leaves table, figures and report in a run folder.

  python -m experiments.compare_gradients
  python -m experiments.compare_gradients --dataset=mnist --init=normal --epochs=30 \
    --schemes=without_replacement --min_drawn=400000
  python -m experiments.compare_gradients --run=runs/mine

Expected: measured over exact error is 1 to within a few of the standard errors beside it, and the
error is zero to rounding at m = n unless drawn with replacement. Sizes, unless given: 1, 3, 10,
30, … up to n. Second command: measured and exact agree (χ² of ten sizes 9.5), with standard errors
of about 1 %. Its time goes into the largest m: 2,000 estimates are 2,000 m gradients of examples.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments import (
    _cli,
    _comparison,
    _comparison_figures,
    _flags,
    _processes,
    _recorded,
    _starting_point,
    _tabled,
    runs,
)
from experiments._config import check_fields, fill_batch_sizes
from experiments._starting_point import StartingPoint
from experiments._tabled import Column

_SMOKE = {"num_draws": 200, "min_drawn": 0, "batch_sizes": (10, 0)}
_TRAINING = {"epochs": 5}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared; the flags of the same names say what each is."""

    batch_sizes: tuple[int, ...] | None = None
    schemes: tuple[str, ...] | None = None
    num_draws: int = 2000
    min_drawn: int = 20_000
    floor: float = 0.1
    run: str | None = None

    def __post_init__(self):
        """Raises ValueError at what is wrong whatever the data are."""
        known = ", ".join(_comparison.SCHEMES)
        unknown = set(self.schemes or ()) - set(_comparison.SCHEMES)
        check_fields(
            self,
            ("schemes", self.schemes != () and not unknown, f"any of {known}"),
            ("batch_sizes", self.batch_sizes != (), "one size or more, as in 1,10,100,full"),
            ("batch_sizes", min(self.batch_sizes or (0,)) >= 0, "whole numbers of at least 1"),
            ("num_draws", self.num_draws >= 2, "a whole number of at least 2"),
            ("min_drawn", self.min_drawn >= 0, "a whole number of at least 0"),
            ("floor", 0 <= self.floor <= 1, "a number from 0 to 1"),
        )


def resolve(config: Config, n: int, num_classes: int, has_anchor: bool) -> Config:
    """Returns ``config`` with batch sizes and schemes filled in, each once, sizes in order.

    Raises:
      ValueError: a batch size above n; a scheme that is not defined here.
    """
    if config.batch_sizes is None:
        sizes = (*(m for k in range(10) for m in (10**k, 3 * 10**k) if m < n), n)
    else:
        sizes = fill_batch_sizes(config.batch_sizes, n)
    schemes = dict.fromkeys(config.schemes or _comparison.SCHEMES)
    if not has_anchor and "control_variate" in schemes:
        if config.schemes is not None:
            raise ValueError(
                "schemes holds control_variate, which needs the network an epoch earlier; expected "
                "--epochs of at least 1 and no --run"
            )
        del schemes["control_variate"]
    strata = [name for name in schemes if name.startswith("stratified")]
    if config.schemes is not None and strata and max(sizes) < num_classes:
        raise ValueError(
            f"schemes holds {strata[0]}, which draws from each of {num_classes} classes; expected "
            f"a batch size of at least {num_classes}"
        )
    return dataclasses.replace(config, batch_sizes=sizes, schemes=tuple(schemes))


class Result(NamedTuple):
    """What a comparison returns."""

    rows: list[dict[str, Any]]
    """One for each scheme and batch size; see `run`."""
    point: dict[str, float]
    """Of the full gradient: its `cost`, `squared_norm`, `trace`, `num_examples`, `seconds`."""


def run(
    config: Config,
    point: StartingPoint,
    seed: int = 0,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Result:
    """Compares estimates of the gradient at a point with their exact laws.

    A row holds `scheme`, `batch_size`, what `_comparison.summarize` says, `draw_seconds`, the time
    to draw a sample (without replacement: its share of reshuffling an epoch), and
    `gradient_seconds`, the time of the estimate. A scheme has no row where it is not defined:
    stratified sampling for fewer examples than classes.

    Args:
      config: What to compare; resolved here.
      point: Where.
      seed: Decides the draws.
      on_row: Called with each row.
    """
    n = len(point.labels)
    config = resolve(config, n, point.num_classes, point.anchor is not None)
    makers = _comparison.make_schemes(point, config.floor)
    whole = makers["without_replacement"]().target
    full, squared_norm = whole.moments.mean, float(whole.moments.squared_norm)
    seconds: dict[tuple[int, int], float] = {}
    shuffling = _comparison.reshuffling_seconds(n)
    rows = []
    for number, name in enumerate(config.schemes or ()):
        scheme = makers[name]()
        for m in config.batch_sizes or ():
            if m < scheme.least_batch_size:
                continue
            draw, predicted = scheme.at(m)
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), m)
            num_draws = max(config.num_draws, -(-config.min_drawn // m))
            if predicted <= 0:  # every draw is G itself, to rounding: two show it
                num_draws = 2
            errors = _comparison.measure(
                scheme.target, full, point.examples, draw, key, num_draws, point.mesh
            )
            kind = m if name != "poisson" else jax.eval_shape(draw, key).indices.shape[0]
            if (kind, scheme.num_gradients) not in seconds:
                seconds[kind, scheme.num_gradients] = _comparison.seconds_per_gradient(
                    scheme.target, point.examples, kind
                )
            is_shuffled = name in ("without_replacement", "control_variate")
            row = {
                "scheme": name,
                "batch_size": m,
                **_comparison.summarize(errors, float(predicted), squared_norm),
                "draw_seconds": (m * shuffling if is_shuffled else errors.draw_seconds),
                "gradient_seconds": seconds[kind, scheme.num_gradients],
            }
            rows.append(row)
            on_row(row)
    return Result(
        rows,
        {
            "num_examples": n,
            "cost": float(whole.moments.cost),
            "squared_norm": squared_norm,
            "trace": float(whole.moments.trace),
            "seconds": _comparison.seconds_per_gradient(whole, point.examples, None),
        },
    )


TABLE = _tabled.Table(
    (
        Column("scheme", "scheme             ", "{:<19}"),
        Column("batch_size", "m", "{:,}"),
        Column("num_draws", "draws", "{:,}"),
        Column("predicted", "E‖ĝ−G‖²", "{:.4g}"),
        Column("measured", "measured", "{:.4g}"),
        Column("ratio", "ratio", "{:.4f}"),
        Column("ratio_standard_error", "±", "{:.4f}"),
        Column("cosine_of_means", "cosine", "{:.4f}"),
        Column("mean_cosine", "mean cos", "{:.4f}"),
        Column("cosine_5", "5 %", "{:.4f}"),
        Column("cosine_95", "95 %", "{:.4f}"),
        Column("draw_seconds", "draw, µs", "{:,.1f}", scale=1e6),
        Column("gradient_seconds", "gradient, µs", "{:,.1f}", scale=1e6),
    ),
    legend="E‖ĝ−G‖² and cosine, 1/√(1 + E‖ĝ−G‖²/‖G‖²) = E⟨ĝ,G⟩/√(E‖ĝ‖²‖G‖²), are exact; measured, "
    "ratio (measured to exact, ± its standard error), mean cos and its quantiles are of the draws. "
    "The mean of the cosines is only close to the exact cosine of the means.",
)


_SCHEMES = flags.DEFINE_list(
    "schemes", None, f"Any of {', '.join(_comparison.SCHEMES)}; by default all that are defined."
)
_NUM_DRAWS = flags.DEFINE_integer("num_draws", Config.num_draws, "Mini-batches measured of each.")
_MIN_DRAWN = flags.DEFINE_integer(
    "min_drawn",
    Config.min_drawn,
    "Small mini-batches vary most: draw more than num_draws of them, until they hold so many "
    "examples in all.",
)
_FLOOR = flags.DEFINE_float(
    "floor", Config.floor, "Share of uniform draws in importance sampling, whose p is ∝ ‖g_i‖."
)
_RUN = flags.DEFINE_string(
    "run", None, "Folder of a run of experiments.train: compare at its last checkpoint."
)
GROUPS = _tabled.groups(
    {"Comparison": (_flags.BATCH_SIZES, _SCHEMES, _NUM_DRAWS, _MIN_DRAWN, _FLOOR, _RUN)},
    "num_seeds",
    shared=("Data", "Network", "Training", "Seeds", _processes.HEADING, "Run folder"),
)


def main() -> int:
    """Reads the flags, compares, leaves the run folder; returns the exit code."""
    with _cli.user_errors():
        config, given, output = _tabled.read_settings(Config, GROUPS, _SMOKE)
        mesh = _processes.make_mesh(given)
        params = None
        if config.run is None:
            training, dataset = _starting_point.prepare(_TRAINING | given)
        else:
            if not flags.FLAGS["epochs"].present:
                given.pop("epochs", None)  # --smoke says how long to train, and nothing is trained
            training, dataset, params = _starting_point.read_run(config.run, given, output, mesh)
        has_anchor = params is None and training.epochs > 0
        n, num_classes = len(dataset.train.labels), len(np.unique(dataset.train.labels))
        config = resolve(config, n, num_classes, has_anchor)
        settings = {
            **_flags.settings_read(training, GROUPS),
            "comparison": dataclasses.asdict(config),
        }
        folder, notes = _recorded.open_folder(output, settings, dataset, None, __file__)

    def find(show: _tabled.Show) -> _tabled.Answer:
        point = _starting_point.find_point(training, dataset, params, mesh=mesh)
        result = run(config, point, training.seed, functools.partial(show, TABLE))
        runs.write_json(folder.path / "table.json", {"point": result.point, "rows": result.rows})
        return _tabled.Answer(
            title=f"What a mini-batch gradient is worth: {point.description}",
            summary={"description": point.description, **result.point},
            tables=[(TABLE, result.rows)],
            pictures=_comparison_figures.draw_all(point.description, result),
        )

    total = len(config.batch_sizes or ()) * len(config.schemes or ())
    return _tabled.record(folder, notes, total, find)


if __name__ == "__main__":
    _cli.start(main, __doc__ or "", GROUPS, defaults=_TRAINING)
