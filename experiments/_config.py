"""What a classification run is asked to do, checked before any work starts."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import optax

from experiments import _classifier, _optimizers
from sgd_jax import data
from sgd_jax.networks import InitScheme

NUM_HIDDEN = 30
SMOKE_EPOCHS = 2
_SMOKE_EXAMPLES = 200
ADAPTIVE_RULES = ("norm_test", "cabs")
NOISE_SPLITS = ("train", "validation", "both")
DTYPES = ("float32", "float64")


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides what is trained; the flags of the same names say what each is."""

    dataset: str = "digits"
    data_dir: str | None = None
    stream: bool = False
    chunk_mib: float = 64.0
    sizes: tuple[int, ...] | None = None
    cost: _classifier.Cost = "quadratic"
    init: InitScheme = "scaled"
    batch_size: int = 10
    adaptive: str | None = None
    learning_rate: float = 3.0
    epochs: int = 30
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    optimizer: str = "sgd"
    seed: int = 0
    num_seeds: int = 1
    dtype: str = "float32"
    track_noise: bool = False
    noise_examples: int = 1000
    noise_split: str = "train"
    smoke: bool = False

    def __post_init__(self):
        """Raises ValueError at what is wrong whatever the data are."""
        costs, schemes = get_args(_classifier.Cost), get_args(InitScheme)
        sizes_are_good = self.sizes is None or (len(self.sizes) >= 2 and min(self.sizes) >= 1)
        check_fields(
            self,
            ("sizes", sizes_are_good, "two or more whole numbers of at least 1, as in 784,30,10"),
            ("cost", self.cost in costs, f"one of {', '.join(costs)}"),
            ("init", self.init in schemes, f"one of {', '.join(schemes)}"),
            ("chunk_mib", 0 < self.chunk_mib < math.inf, "a finite number above 0"),
            ("batch_size", self.batch_size >= 0, "at least 1, or 0 (full) for gradient descent"),
            (
                "adaptive",
                self.adaptive in (None, *ADAPTIVE_RULES),
                f"one of {', '.join(ADAPTIVE_RULES)}",
            ),
            ("learning_rate", 0 < self.learning_rate < math.inf, "a finite number above 0"),
            ("epochs", self.epochs >= 0, "a whole number of at least 0"),
            ("momentum", 0 <= self.momentum < 1, "a number in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0"),
            ("num_seeds", self.num_seeds >= 1, "a whole number of at least 1"),
            ("seed", 0 <= self.seed <= 2**32 - self.num_seeds, "seeds from 0 to 2³² − 1"),
            ("noise_examples", self.noise_examples >= 3, "a whole number of at least 3"),
            (
                "noise_split",
                self.noise_split in NOISE_SPLITS,
                f"one of {', '.join(NOISE_SPLITS)}",
            ),
            ("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        )
        if self.adaptive and self.num_seeds > 1:
            raise ValueError(
                f"num_seeds is {self.num_seeds}; expected 1 with an adaptive batch size, which is "
                "that of one network"
            )
        if self.stream and self.batch_size == 0:
            raise ValueError(
                "batch_size is full, which needs all examples at once; expected a number with "
                "stream, which reads few of them at a time"
            )
        make_optimizer(self, num_examples=1)

    @property
    def chunk_bytes(self) -> int:
        """The size of a chunk of streamed examples."""
        return int(self.chunk_mib * 2**20)


def check_fields(settings: Any, *rules: tuple[str, bool, str]) -> None:
    """Raises ValueError at the first rule that settings do not keep.

    Args:
      settings: Any that have a ``repr``, by name.
      *rules: Name, whether its value is good, and what was expected.
    """
    for name, is_good, expected in rules:
        if not is_good:
            raise ValueError(f"{name} is {getattr(settings, name)!r}; expected {expected}")


def fill_batch_sizes(batch_sizes: Sequence[int], n: int) -> tuple[int, ...]:
    """Returns mini-batch sizes in order, each once, 0 being all n; raises ValueError above n."""
    if max(batch_sizes) > n:
        raise ValueError(
            f"batch_sizes holds {max(batch_sizes)}; expected at most {n}, the training examples. "
            "All of them are called full"
        )
    return tuple(sorted({m or n for m in batch_sizes}))


def read_config(stored: dict[str, Any]) -> Config:
    """Returns the settings that `config.json` of a run holds; what it lacks has its default.

    Raises:
      ValueError: a setting is of another type than it was written with, or is none that is allowed.
    """
    kinds = get_type_hints(Config)
    given = {name: stored[name] for name in kinds if name in stored}
    for name, value in ({"sizes": None} | given).items():
        if not _is_of(value, kinds[name] if name != "sizes" else tuple[int, ...]):
            raise ValueError(
                f"config.json of the run is damaged: {name} is {value!r:.40}; expected what it was "
                "written with. Put the file back, or start a new run"
            )
    return Config(**{**given, "sizes": tuple(stored["sizes"])})


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of the kind that a field is declared as."""
    if kind in (int, float):
        return type(value) is int or type(value) is kind
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_is_of(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is Literal:
        return isinstance(value, str)  # which one, the field checks itself
    if get_args(kind):
        return any(_is_of(value, option) for option in get_args(kind))
    return type(value) is kind


def load(config: Config) -> data.Dataset:
    """Returns the data set that ``config`` names; of each part the first few with ``smoke``."""
    if config.stream:
        data.import_grain()
        dataset = data.open_dataset(config.dataset, config.data_dir)
    else:
        dataset = data.load(config.dataset, config.data_dir)
    if not config.smoke:
        return dataset
    few = slice(_SMOKE_EXAMPLES)
    parts = {
        name: data.Examples(*(leaf[few] for leaf in getattr(dataset, name)))
        for name in ("train", "validation", "test")
    }
    return dataset._replace(**parts)


def resolve(config: Config, dataset: data.Dataset) -> Config:
    """Returns ``config`` with the sizes of the network filled in.

    Raises:
      ValueError: sizes or batch size do not fit the data, or the inputs do not fit the dtype.
    """
    n, num_inputs = dataset.train.inputs.shape
    ends = (num_inputs, dataset.num_classes)
    sizes = config.sizes or (num_inputs, NUM_HIDDEN, dataset.num_classes)
    if (sizes[0], sizes[-1]) != ends:
        fitting = ",".join(map(str, (num_inputs, *sizes[1:-1], dataset.num_classes)))
        raise ValueError(
            f"sizes is {','.join(map(str, sizes))}; expected {num_inputs} first, the inputs of an "
            f"example of {dataset.name}, and {dataset.num_classes} last, its classes: "
            f"--sizes={fitting}"
        )
    if config.batch_size > n:
        raise ValueError(
            f"batch_size is {config.batch_size}; expected at most {n}, the training examples of "
            f"{dataset.name}. Gradient descent on all of them is --batch_size=full"
        )
    if config.stream:
        orders = range(config.num_seeds)
        data.ShuffledChunks(
            dataset.train, config.batch_size, orders, chunk_bytes=config.chunk_bytes
        )
    if config.stream and (config.track_noise or config.adaptive):
        for split in ("train", "validation"):
            num_examples = len(getattr(dataset, split).labels)
            is_measured = config.noise_split in (split, "both") or (
                config.adaptive and split == "train"
            )
            if is_measured and config.noise_examples >= num_examples:
                raise ValueError(
                    f"noise_examples is {config.noise_examples}; expected fewer than the "
                    f"{num_examples} {split}{'ing' if split == 'train' else ''} examples with "
                    "stream, which are not all read at once"
                )
    for part in (dataset.train, dataset.validation, dataset.test):
        if largest_input(part.inputs, config.dtype) > float(np.finfo(config.dtype).max):
            raise ValueError(
                f"dtype is {config.dtype}, in which inputs of {dataset.name} are infinite; "
                "expected one that holds them: use --dtype=float64, or scale the data"
            )
    return dataclasses.replace(config, sizes=sizes)


def largest_input(inputs: Any, dtype: str) -> float:
    """Returns the largest absolute value of inputs wider than ``dtype``; of others 0."""
    if inputs.dtype.kind != "f" or inputs.dtype.itemsize <= np.dtype(dtype).itemsize:
        return 0.0
    return max(float(abs(block).max()) for block in data.blocks(inputs))


def make_optimizer(
    config: Config, num_examples: int, learning_rate: Any = None
) -> optax.GradientTransformation:
    """Returns the optimizer; raises ValueError where name and options do not go together.

    A ``learning_rate``, which may be traced, stands in for that of ``config``.
    """
    return _optimizers.make_optimizer(
        config.optimizer,
        learning_rate=config.learning_rate if learning_rate is None else learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay / num_examples,
    )
