"""The flags of a classification run, by heading: defined once, for every program that trains."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from absl import flags

from experiments import _classifier, _optimizers, _processes
from experiments._cli import HelpGroups
from experiments._config import DTYPES, NOISE_SPLITS, NUM_HIDDEN, SMOKE_EPOCHS, Config
from experiments._recorded import Output
from sgd_jax import data
from sgd_jax.networks import InitScheme

GROUPS: HelpGroups = {
    "Data": (
        flags.DEFINE_string(
            "dataset",
            Config.dataset,
            "digits, mnist, fashion_mnist, or the path of an .npz file or of a folder of shards, "
            "x_train-000.npy and y_train-000.npy, …, x_test.npy and y_test.npy.",
        ),
        flags.DEFINE_string(
            "data_dir",
            None,
            "Folder of the MNIST files; by default a cache of the user, filled by download.",
        ),
    ),
    "Network": (
        flags.DEFINE_string(
            "sizes",
            None,
            f"Neurons per layer, as in 784,30,10; by default inputs,{NUM_HIDDEN},classes.",
        ),
        flags.DEFINE_enum(
            "init",
            Config.init,
            get_args(InitScheme),
            "standard deviation of the first weights: 1 or 1/√inputs. The book starts with normal.",
        ),
        flags.DEFINE_enum("dtype", Config.dtype, DTYPES, "of all computation."),
    ),
    "Training": (
        flags.DEFINE_enum("cost", Config.cost, get_args(_classifier.Cost), "of an example."),
        flags.DEFINE_string(
            "batch_size",
            str(Config.batch_size),
            "Examples per step; 0 or full: all of them, which is gradient descent. "
            "adaptive:norm_test or adaptive:cabs, where an experiment trains as train does: begins "
            f"with {Config.batch_size} and is doubled between epochs while it is below what the "
            "norm test (tr Σ/‖G‖²) or CABS (η tr Σ/C) asks for, as measured along training.",
        ),
        flags.DEFINE_float(
            "learning_rate",
            Config.learning_rate,
            "η, times the mean gradient of a mini-batch; by default "
            f"{_optimizers.ADAPTIVE_LEARNING_RATE:g} for another optimizer than sgd.",
        ),
        flags.DEFINE_integer(
            "epochs",
            Config.epochs,
            f"Passes over the training examples; {SMOKE_EPOCHS} with --smoke.",
        ),
        flags.DEFINE_float("momentum", Config.momentum, "μ in [0, 1)."),
        flags.DEFINE_boolean("nesterov", Config.nesterov, "Look a step ahead; needs momentum."),
        flags.DEFINE_float(
            "weight_decay",
            Config.weight_decay,
            "λ of the book: each step scales the weights, not the biases, by 1 − ηλ/n, n being "
            "the number of training examples.",
        ),
        flags.DEFINE_string(
            "optimizer",
            Config.optimizer,
            "sgd, or an optimizer of optax, such as adam; its other options stay as they are.",
        ),
    ),
    "Larger than memory": (
        flags.DEFINE_boolean(
            "stream",
            Config.stream,
            "Leave the examples on the disk and read them chunk by chunk, shuffled over all of "
            "them, while the chunk before is trained on: a folder of shards, or MNIST unpacked. Of "
            "several processes each reads its own share.",
        ),
        flags.DEFINE_float(
            "chunk_mib",
            Config.chunk_mib,
            "With --stream: size of a chunk in MiB, of all devices together; two are in memory at "
            "a time.",
        ),
        flags.DEFINE_integer(
            "save_every",
            Output.save_every,
            "With --stream: chunks from one checkpoint within an epoch to the next; 0 is none.",
        ),
    ),
    "Gradient noise": (
        flags.DEFINE_boolean(
            "track_noise",
            Config.track_noise,
            "After each epoch measure the noise scale tr Σ/‖∇C‖² by gradients of single examples.",
        ),
        flags.DEFINE_integer(
            "noise_examples",
            Config.noise_examples,
            "Examples that it is measured on, drawn anew each time. All training examples, or "
            "more, give the noise scale of training exactly; fewer an unbiased estimate with a "
            "95 % interval.",
        ),
        flags.DEFINE_enum(
            "noise_split",
            Config.noise_split,
            NOISE_SPLITS,
            "train: the noise scale of the cost that is minimized, that of the training examples. "
            "validation: that of the population, from examples that nothing was fitted to; the two "
            "part as a network overfits. both: both.",
        ),
    ),
    "Seeds": (
        flags.DEFINE_integer(
            "seed", Config.seed, "Decides the first weights and the order of the examples."
        ),
        flags.DEFINE_integer(
            "num_seeds",
            Config.num_seeds,
            "Trains this many networks as one program, from --seed on, and reports the spread.",
        ),
    ),
    **_processes.GROUPS,
    "Run folder": (
        flags.DEFINE_string("out_dir", Output.out_dir, "Folder of all run folders."),
        flags.DEFINE_string(
            "run_name", None, "Name of the run folder; by default data set and time."
        ),
        flags.DEFINE_boolean(
            "resume",
            Output.resume,
            "Go on with --run_name from its last checkpoint. Flags not given stay as they were; "
            "--epochs, counted from the beginning, may grow.",
        ),
        flags.DEFINE_list(
            "log_to",
            list(Output.log_to),
            "Besides jsonl, which is always written: tensorboard, wandb.",
        ),
        flags.DEFINE_boolean("smoke", Config.smoke, "Try everything on a few examples."),
    ),
}

BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes",
    None,
    "Mini-batch sizes m; full is all n. What they are by default is said above.",
)
"""Of the programs that compare several."""


def given_settings(groups: HelpGroups = GROUPS) -> dict[str, Any]:
    """Returns the settings that the command line names, parsed, by name.

    Raises:
      ValueError: a value that cannot be parsed; a flag that is not in ``groups``, which are those
        that the program reads.
    """
    known = {holder.name for group in groups.values() for holder in group}
    holders = [holder for group in (*GROUPS.values(), *groups.values()) for holder in group]
    given = {holder.name: holder.value for holder in holders if holder.present}
    if unread := sorted(given.keys() - known):
        close = difflib.get_close_matches(unread[0], known, n=1)
        remedy = f"did you mean --{close[0]}?" if close else "leave it out."
        raise ValueError(f"--{unread[0]} means nothing to this program; {remedy} See --help")
    if given.get("batch_size", "").startswith("adaptive:"):
        given["adaptive"] = given.pop("batch_size").removeprefix("adaptive:")
    for name, parse in (("sizes", _parse_sizes), ("batch_size", _parse_batch_size)):
        if name in given:
            given[name] = parse(given[name])
    if "log_to" in given:
        given["log_to"] = tuple(given["log_to"])
    if "dataset" in given and given["dataset"] not in data.NAMES:
        path = Path(given["dataset"]).expanduser()
        if path.is_dir() or path.suffix == ".npz":
            given["dataset"] = str(path.absolute())
    if given.get("smoke"):
        given.setdefault("epochs", SMOKE_EPOCHS)
    if "optimizer" in given and "learning_rate" in known and not given.get("resume"):
        default = _optimizers.default_learning_rate(given["optimizer"], Config.learning_rate)
        given.setdefault("learning_rate", default)
    return given


def settings_read(config: Config, groups: HelpGroups) -> dict[str, Any]:
    """Returns the settings of a run that its program reads: those that have a flag in ``groups``.

    ``adaptive`` is among them if ``batch_size`` is, whose flag sets it.
    """
    names = {holder.name for group in groups.values() for holder in group}
    if "batch_size" in names:
        names.add("adaptive")
    return {name: value for name, value in dataclasses.asdict(config).items() if name in names}


def parse_batch_sizes(words: Sequence[str]) -> tuple[int, ...]:
    """Returns the sizes given by `BATCH_SIZES`, 0 for full; raises ValueError."""
    try:
        sizes = tuple(0 if word == "full" else int(word) for word in words)
    except ValueError as error:
        raise ValueError(
            f"batch_sizes is {','.join(words)!r}; expected whole numbers with commas between, or "
            "full"
        ) from error
    if any(word in ("0", "-0") for word in words):
        raise ValueError("batch_sizes holds 0; expected sizes of at least 1, or full for all")
    return sizes


def _parse_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"sizes is {text!r}; expected whole numbers with commas between, as in 784,30,10"
        ) from error


def _parse_batch_size(text: str) -> int:
    try:
        return 0 if text == "full" else int(text)
    except ValueError as error:
        raise ValueError(
            f"batch_size is {text!r}; expected a whole number, full, or adaptive:norm_test or "
            "adaptive:cabs"
        ) from error
