"""What an experiment of the gallery is asked, and how its program answers."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple

import numpy as np

from experiments import _classifier, _cli, _flags, _recorded, _starting_point, _tabled
from experiments._cli import HelpGroups
from experiments._config import Config as Training
from experiments._tabled import Answer, Own, Row, Show, Table
from sgd_jax import data
from sgd_jax.typing import Array, CostFn, Params


class Asked(NamedTuple, Generic[Own]):
    """The settings of an experiment, checked against its data."""

    config: Own
    """Its own."""
    training: Training
    """Of the network."""
    dataset: data.Dataset
    """Of examples."""

    @property
    def num_examples(self) -> int:
        """n, the training examples."""
        return len(self.dataset.train.labels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Neurons per layer."""
        return self.training.sizes or ()

    @property
    def seeds(self) -> range:
        """Of the networks."""
        return range(self.training.seed, self.training.seed + self.training.num_seeds)

    @property
    def dtype(self) -> np.dtype:
        """Of all computation."""
        return np.dtype(self.training.dtype)

    @property
    def description(self) -> str:
        """Such as "digits, 64-30-10"."""
        return f"{self.dataset.name}, {'-'.join(map(str, self.sizes))}"

    def examples(self) -> Any:
        """Returns the training examples, on the device."""
        return _classifier.to_device(self.dataset.train, self.dtype)

    def functions(
        self, cost: _classifier.Cost | None = None
    ) -> tuple[CostFn, Callable[[Params, Array], Array]]:
        """Returns what `_classifier.example_functions` does; with another cost, if given."""
        kind = cost or self.training.cost
        return _classifier.example_functions(
            kind, self.dataset.num_classes, self.dataset.scale, self.dtype
        )

    def first_networks(self, sizes: tuple[int, ...] | None = None) -> tuple[Params, Array]:
        """Returns what `_classifier.first_networks` does; of other sizes, if given."""
        return _classifier.first_networks(
            self.sizes if sizes is None else sizes, self.training.init, self.seeds, self.dtype
        )


def with_one_batch_size(asked: Asked[Own]) -> Asked[Own]:
    """Returns what is asked with n for a batch size of full; raises ValueError at an adaptive one.

    For experiments whose mini-batches all have one size.
    """
    training = asked.training
    if training.adaptive:
        raise ValueError(
            f"batch_size is adaptive:{training.adaptive}; expected one size for all of training, "
            "which this experiment needs. It grows in experiments.train"
        )
    m = training.batch_size or asked.num_examples
    return asked._replace(training=dataclasses.replace(training, batch_size=m))


def show_nothing(table: Table, row: Row) -> None:
    """Default of ``show``: discards the row."""


def answer(
    kind: Callable[..., Own],
    groups: HelpGroups,
    source: str,
    find: Callable[[Asked[Own], Show], Answer],
    *,
    num_rows: Callable[[Asked[Own]], int],
    resolve: Callable[[Asked[Own]], Asked[Own]] = lambda asked: asked,
    smoke: Mapping[str, Any],
    training: Mapping[str, Any] = {},
    unit: str = "row",
) -> int:
    """Reads the flags, finds the answer, leaves the run folder; returns the exit code.

    Args:
      kind: The dataclass of the experiment's own settings.
      groups: The flags that the program reads.
      source: File of the program.
      find: From what is asked, and what shows a row, to the answer.
      num_rows: How many rows it will show.
      resolve: Returns what is asked with all that hangs on the data filled in; raises ValueError
        where settings and data do not fit. Called before the run folder is made.
      smoke: The experiment's own settings with --smoke, where they are not given.
      training: Settings of training where they are not given, if not those of `Config`.
      unit: What a row is.
    """
    with _cli.user_errors():
        config, given, output = _tabled.read_settings(kind, groups, smoke)
        asked = resolve(Asked(config, *_starting_point.prepare({**training, **given})))
        own = {Path(source).stem: dataclasses.asdict(asked.config)}  # pyright: ignore[reportArgumentType]
        settings = {**_flags.settings_read(asked.training, groups), **own}
        folder, notes = _recorded.open_folder(output, settings, asked.dataset, None, source)
    total = num_rows(asked)
    return _tabled.record(folder, notes, total, functools.partial(find, asked), unit)
