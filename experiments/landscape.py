"""Which way do SGD and gradient descent go through the landscape of the cost?

Trains the textbook network twice from one start, by SGD and by gradient descent, the same learning
rate and number of steps, and looks at both paths from above: on the plane through the start that
holds most of their distance from it, the first two principal directions of the joint paths. The
cost on that plane is computed anew at every point of a grid. Leaves a figure, an animation, table
and report in a run folder.

  python -m experiments.landscape
  python -m experiments.landscape --epochs=60 --learning_rate=1

Expected of the first command, seed 0: the plane holds 98.5 % of the squared distance from the
start; that of two random walks holds 76 % of theirs, that of two straight lines all. After 2,400
steps both paths have come to the same valley, 32 from the start and 7 from each other, at a cost
of 0.0143 by SGD and 0.0133 by gradient descent; SGD took 24,000 gradients of examples, gradient
descent 2,889,600. With as many as SGD it has gone 19 steps. 12 s on two cores with compiling.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.flatten_util import ravel_pytree
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image

import sgd_jax as sj
from experiments import _asked, _cli, _tabled
from experiments._asked import Asked, show_nothing
from experiments._config import check_fields
from experiments._tabled import Column
from experiments.runs import style
from sgd_jax import sampling
from sgd_jax.typing import Array, CostFn, Examples, Params

_COLORS = {"SGD": style.VERMILION, "gradient descent": style.BLUE}
_SMOKE = {"num_frames": 3, "grid": 7}
_TRAINING = {"epochs": 20}
_FRAME_MILLISECONDS = 120


@dataclasses.dataclass(frozen=True)
class Config:
    """What is looked at; the flags of the same names say what each is."""

    num_frames: int = 60
    grid: int = 61

    def __post_init__(self):
        """Raises ValueError at what is wrong."""
        check_fields(
            self,
            ("num_frames", self.num_frames >= 2, "a whole number of at least 2"),
            ("grid", self.grid >= 2, "a whole number of at least 2"),
        )


TABLE = _tabled.Table(
    (
        Column("step", "step", "{:,}"),
        Column("gradients_sgd", "∇ by SGD", "{:,}"),
        Column("gradients_full", "∇ by GD", "{:,}"),
        Column("cost_sgd", "cost, SGD", "{:.4g}"),
        Column("cost_full", "cost, GD", "{:.4g}"),
        Column("distance", "apart", "{:.3g}"),
        Column("travelled", "from start", "{:.3g}"),
    ),
    legend="∇: gradients of single examples taken so far. Apart: distance between the two networks "
    "in all parameters; from start: that of SGD from where both began.",
)


class Paths(NamedTuple):
    """Where two trainings went, seen on a plane; K points of each, the first that of the start."""

    steps: np.ndarray
    """Taken before each point, (K,)."""
    points: np.ndarray
    """On the plane, in units of the parameters: (2, K, 2), SGD first."""
    costs: np.ndarray
    """Of all training examples at the points of the paths themselves: (2, K)."""
    distances: np.ndarray
    """Of the points from the start, and of the two from each other: (3, K)."""
    share: float
    """Of the squared distances from the start, summed over both paths, the part on the plane."""
    null: tuple[float, float]
    """The same share of two random walks and of two straight lines: see `null_shares`."""


class Slice(NamedTuple):
    """The cost on a grid of the plane."""

    x: np.ndarray
    y: np.ndarray
    cost: np.ndarray
    """(len(y), len(x))."""


class Result(NamedTuple):
    """What `run` returns."""

    rows: list[_tabled.Row]
    paths: Paths
    slice: Slice


def run(asked: Asked[Config], show: _tabled.Show = show_nothing) -> Result:
    """Trains twice from one start and projects both paths onto their principal plane.

    Args:
      asked: The settings of training are those of both; m is that of SGD.
      show: Called with each row of `TABLE`.
    """
    config, training, n = asked.config, asked.training, asked.num_examples
    m = training.batch_size
    (fun, _), examples = asked.functions(), asked.examples()
    networks, keys = asked.first_networks()
    start = jax.tree.map(lambda leaf: leaf[0], networks)
    steps = frames(asked)
    orders = [sampling.epoch(jax.random.fold_in(keys[0], e), n, m) for e in range(training.epochs)]
    batches = np.concatenate([np.asarray(order) for order in orders])
    walks = [
        _walk(fun, training.learning_rate, start, examples, order, steps)
        for order in (batches, None)
    ]
    _, unravel = ravel_pytree(start)
    cost = jax.jit(lambda vector: sj.mean_cost(fun)(unravel(vector), examples))
    costs = np.array([[float(cost(jnp.asarray(vector))) for vector in walk] for walk in walks])
    plane, share = principal_plane([walk - walks[0][0] for walk in walks])
    points = np.stack([(walk - walks[0][0]) @ plane.T for walk in walks])
    distances = np.stack(
        [
            *(np.linalg.norm(walk - walks[0][0], axis=1) for walk in walks),
            np.linalg.norm(walks[0] - walks[1], axis=1),
        ]
    )
    seed = np.random.default_rng(training.seed)
    null = null_shares(steps, [walk[-1] - walks[0][0] for walk in walks], seed)
    paths = Paths(steps, points, costs, distances, share, null)
    rows = []
    for k, step in enumerate(steps.tolist()):
        rows.append(
            {
                "step": step,
                "gradients_sgd": step * m,
                "gradients_full": step * n,
                "cost_sgd": costs[0, k],
                "cost_full": costs[1, k],
                "distance": distances[2, k],
                "travelled": distances[0, k],
            }
            | {
                f"{axis}_{name}": points[number, k, column]
                for number, name in enumerate(("sgd", "full"))
                for column, axis in enumerate("xy")
            }
        )
        show(TABLE, rows[-1])
    return Result(rows, paths, _look(cost, walks[0][0], plane, points, config.grid))


def check(asked: Asked[Config]) -> Asked[Config]:
    """Returns what is asked; raises ValueError where the settings mean nothing here."""
    check_fields(asked.training, ("epochs", asked.training.epochs >= 1, "at least 1"))
    return _asked.with_one_batch_size(asked)


def frames(asked: Asked[Config]) -> np.ndarray:
    """Returns the steps that both paths are looked at after."""
    num_steps = asked.training.epochs * (asked.num_examples // asked.training.batch_size)
    return spaced_steps(num_steps, asked.config.num_frames)


def spaced_steps(num_steps: int, num_frames: int) -> np.ndarray:
    """Returns the steps to look at, from 0 to the last, closer together at the beginning."""
    wanted = num_steps * np.linspace(0, 1, num_frames) ** 2
    return np.unique(np.round(wanted).astype(int))


def principal_plane(displacements: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """Returns two orthonormal directions (2, p), and the share of squared length along them.

    Of all rows together, none subtracted: their first two right singular vectors. Each points the
    way in which the last row of the first array goes.
    """
    joint = np.concatenate(displacements)
    _, values, directions = np.linalg.svd(joint, full_matrices=False)
    plane = directions[:2]
    signs = np.where(displacements[0][-1] @ plane.T < 0, -1, 1)
    return signs[:, None] * plane, float(np.sum(values[:2] ** 2) / np.sum(values**2))


def null_shares(
    steps: np.ndarray, ends: list[np.ndarray], random: np.random.Generator
) -> tuple[float, float]:
    """Returns the share on their principal plane of two paths that know of no landscape.

    First of two independent random walks in p dimensions with steps of one length, looked at after
    ``steps``; then of two straight lines at even speed to the ends of the real paths, which lie on
    one plane wherever they end: 1. A plane through the start holds most of two paths by itself, so
    a share has to be read beside these.

    Args:
      steps: Taken before each point, (K,), the first 0.
      ends: Of the two paths, from their start, each (p,).
      random: Decides the walks.

    Source: Antognini and Sohl-Dickstein 2018 (arXiv 1806.08805) for the random walk.
    """
    gaps = np.sqrt(np.diff(steps, prepend=0))[:, None]
    walks = [np.cumsum(gaps * random.normal(size=(len(steps), end.size)), axis=0) for end in ends]
    lines = [np.outer(steps / steps[-1], end) for end in ends]
    return principal_plane(walks)[1], principal_plane(lines)[1]


def _walk(
    fun: CostFn,
    rate: float,
    start: Params,
    examples: Examples,
    batches: np.ndarray | None,
    steps: np.ndarray,
) -> np.ndarray:
    """Returns the parameters after the steps given, as vectors in float64: (K, p).

    Each step takes a row of ``batches``; without, all examples: gradient descent.
    """
    optimizer = sj.sgd(rate)
    take = sj.make_step(fun, optimizer)
    order = None if batches is None else jnp.asarray(batches)

    def step(number: Array, state: sj.TrainState) -> sj.TrainState:
        chosen = examples
        if order is not None:
            indices = order[number]
            chosen = jax.tree.map(lambda leaf: leaf[indices], examples)
        return take(state, chosen)[0]

    advance = jax.jit(lambda state, begin, end: jax.lax.fori_loop(begin, end, step, state))
    state = sj.init_state(start, optimizer)
    vectors = [ravel_pytree(state.params)[0]]
    for begin, end in itertools.pairwise(steps.tolist()):
        state = advance(state, begin, end)
        vectors.append(ravel_pytree(state.params)[0])
    return np.asarray(jnp.stack(vectors), np.float64)


def _look(
    cost: Callable[[Array], Array],
    origin: np.ndarray,
    plane: np.ndarray,
    points: np.ndarray,
    size: int,
) -> Slice:
    """Returns the cost on a square grid of the plane that holds all points and a margin."""
    low, high = points.min(axis=(0, 1)), points.max(axis=(0, 1))
    half = 0.6 * max(high - low)
    x, y = (np.linspace(c - half, c + half, size) for c in (low + high) / 2)
    place = jnp.asarray(origin, float), jnp.asarray(plane, float)

    @jax.jit
    def along(y: Array) -> Array:
        return jax.lax.map(
            lambda x: cost(place[0] + x * place[1][0] + y * place[1][1]), jnp.asarray(x, float)
        )

    return Slice(x, y, np.array([np.asarray(along(jnp.asarray(v, float))) for v in y]))


@style.styled
def draw(result: Result, n: int, m: int, description: str) -> tuple[Figure, Callable[[int], None]]:
    """Returns the figure, both paths whole, and what shows them up to a point of the path."""
    paths, (x, y, cost) = result.paths, result.slice
    figure = Figure(figsize=(12.5, 6.2), layout="constrained")
    plane, curve = figure.subplots(1, 2, width_ratios=(1.25, 1))
    norm = LogNorm(cost.min(), cost.max())
    levels = np.geomspace(cost.min(), cost.max(), 28)
    shades = plane.contourf(x, y, cost, levels, norm=norm, cmap="viridis_r", extend="both")
    plane.contour(x, y, cost, levels[::3], norm=norm, colors="white", linewidths=0.4, alpha=0.6)
    bar = figure.colorbar(shades, ax=plane, label="mean training cost on the plane", shrink=0.85)
    ticks = np.geomspace(cost.min(), cost.max(), 6)
    bar.set_ticks(ticks.tolist(), labels=[f"{tick:.2g}" for tick in ticks])
    plane.set_aspect("equal")
    plane.set_title(
        f"plane with {paths.share:.1%} of the squared distance from the start\n"
        f"(two random walks: {paths.null[0]:.0%}, two lines: {paths.null[1]:.0%})",
    )
    plane.set_xlabel("first principal direction")
    plane.set_ylabel("second principal direction")
    plane.plot(*paths.points[0, 0], "k*", ms=12, label="start")
    gradients = (m * paths.steps, n * paths.steps)
    lines, heads, curves = [], [], []
    for number, (name, color) in enumerate(_COLORS.items()):
        lines += plane.plot([], [], "-", color=color, lw=1.6)
        heads += plane.plot([], [], "o", ms=8, color=color, mec="white", label=name)
        curves += curve.plot([], [], ".-", ms=4, lw=1.4, color=color, label=name)
        shown = gradients[number][1:]
        curve.plot(shown, paths.costs[number, 1:], color=color, lw=0.8, alpha=0.3)
    # Where gradient descent stands when it has taken as many gradients as SGD in all.
    equal = int(np.searchsorted(gradients[1], gradients[0][-1], side="right")) - 1
    plane.plot(
        *paths.points[1, equal], "s", ms=8, color=_COLORS["gradient descent"], mec="white",
        label=f"gradient descent after {gradients[1][equal]:,} gradients,\n"
        f"no more than all {gradients[0][-1]:,} of SGD",
    )  # fmt: skip
    style.legend(plane, ncols=1)
    curve.set_xscale("log")
    curve.set_yscale("log")
    curve.set_xlabel("gradients of examples taken")
    curve.set_title("on the paths themselves")
    curve.set_ylabel("mean training cost")
    plane.grid(visible=False)
    style.legend(curve)

    def show(last: int) -> None:
        for number in range(2):
            until = slice(last + 1)
            lines[number].set_data(*paths.points[number, until].T)
            heads[number].set_data(*paths.points[number, last : last + 1].T)
            begun = slice(1, last + 1)  # a log scale has no place for zero gradients
            curves[number].set_data(gradients[number][begun], paths.costs[number, begun])
        figure.suptitle(
            f"{description}: {paths.steps[last]:,} steps, {gradients[0][last]:,} gradients by SGD, "
            f"{gradients[1][last]:,} by gradient descent",
        )

    show(len(paths.steps) - 1)
    return figure, show


def animate(figure: Figure, show: Callable[[int], None], num_points: int, path: Path) -> None:
    """Writes an animation as GIF, played three times: a frame for each point of the paths."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(72)
    images = []
    for last in range(num_points):
        show(last)
        canvas.draw()
        if not images:
            figure.set_layout_engine("none")  # once laid out, nothing moves
            canvas.draw()
        images.append(Image.fromarray(np.array(canvas.buffer_rgba())[:, :, :3]))
    palette = images[-1].quantize(256)  # that of the last, which shows both paths whole
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    times = [_FRAME_MILLISECONDS] * (num_points - 1) + [3000]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=2)


_NUM_FRAMES = flags.DEFINE_integer(
    "num_frames", Config.num_frames, "Points of each path, the frames of the animation."
)
_GRID = flags.DEFINE_integer("grid", Config.grid, "Points along each side of the plane.")
GROUPS = _tabled.groups(
    {"Landscape": (_NUM_FRAMES, _GRID)},
    *("num_seeds", "momentum", "nesterov", "weight_decay", "optimizer"),
    shared=("Data", "Network", "Training", "Seeds", "Run folder"),
)


def find(asked: Asked[Config], show: _tabled.Show) -> _tabled.Answer:
    """Returns what is left in the run folder."""
    result = run(asked, show)
    figure, show_until = draw(
        result, asked.num_examples, asked.training.batch_size, asked.description
    )
    words = (
        "Contours of the cost on a plane of the parameters, with the paths of SGD and of "
        "gradient descent from one start; beside it the cost of both against the gradients of "
        "examples they took."
    )
    last = result.rows[-1]
    summary = {
        "share_of_squared_distance": result.paths.share,
        "share_of_random_walks": result.paths.null[0],
        "share_of_straight_lines": result.paths.null[1],
        "cost_sgd": last["cost_sgd"],
        "cost_gradient_descent": last["cost_full"],
        "gradients_sgd": last["gradients_sgd"],
        "gradients_gradient_descent": last["gradients_full"],
    }
    grid = [
        {"x": a, "y": b, "cost": value}
        for b, values in zip(result.slice.y, result.slice.cost.tolist(), strict=True)
        for a, value in zip(result.slice.x, values, strict=True)
    ]
    write = functools.partial(animate, figure, show_until, len(result.paths.steps))
    pictures = [  # in this order: the animation changes the figure
        _tabled.Picture("Paths", words, figure, "landscape"),
        _tabled.Picture(
            "Animation", f"{words} Both advance step by step.", write, "landscape", ".gif"
        ),
    ]
    title = f"SGD and gradient descent from one start: {asked.description}"
    return _tabled.Answer(title, summary, [(TABLE, result.rows)], pictures, {"plane": grid})


def main() -> int:
    """Reads the flags, trains and looks, leaves the run folder; returns the exit code."""
    return _asked.answer(
        *(Config, GROUPS, __file__, find),
        num_rows=lambda asked: len(frames(asked)), resolve=check,
        smoke=_SMOKE, training=_TRAINING,
    )  # fmt: skip


if __name__ == "__main__":
    _cli.start(main, __doc__ or "", GROUPS, defaults=_TRAINING)
