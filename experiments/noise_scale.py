"""How does the gradient noise scale grow while a network learns?

Trains the textbook network and measures, before the first epoch and after each, two noise scales
B = tr Σ/‖∇C‖², the batch size at which noise and signal of a mini-batch gradient are alike. That of
training is of the cost that is minimized, the mean over the training examples: exact if all of them
are measured. That of the population is estimated from held-out examples, with 95 % intervals. They
part as the network overfits. Leaves table, figure and report in a run folder.

  python -m experiments.noise_scale
  python -m experiments.noise_scale --dataset=mnist --init=normal
  python -m experiments.noise_scale --dataset=mnist --init=normal --num_measured=5000

Expected of the first command with --init=normal, seed 0, in 30 s on two busy cores: B of training
rises from 1.5 untrained over 51 after 3 epochs to 324 after 15, not steadily: 36 after 10. That of
the population goes from 1.6 (1.4 to 1.8) over 65 (42 to 130); from epoch 11 on 297 held-out digits
cannot tell ‖∇C‖² from zero, and it is undetermined: at least 109 after 15. Five seeds have 20 to
74 after 3 epochs and 95 to 247 after 14. Of the second command with --epochs=20, in 95 s: after
the last epoch B of training is 2,807 and that of the population 10,395 (6,066 to 35,723); until
epoch 4 they agree.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from absl import flags
from matplotlib.figure import Figure

import sgd_jax as sj
from experiments import _cli, _processes, _recorded, _starting_point, _tabled, runs, train
from experiments._config import Config
from experiments._tabled import Column, Table
from experiments.runs import style
from sgd_jax import data

_TRAINING = {"epochs": 15}
_LAYER_COLORS = (style.ORANGE, style.PURPLE, style.SKY, style.VERMILION)


@dataclasses.dataclass(frozen=True)
class Own:
    """What is measured; the flag of the same name says what it is."""

    num_measured: int = 0

    def __post_init__(self):
        """Raises ValueError at what is wrong whatever the data are."""
        if self.num_measured != 0 and self.num_measured < 3:
            raise ValueError(
                f"num_measured is {self.num_measured}; expected 0, for all, or at least 3"
            )


_NUM_MEASURED = flags.DEFINE_integer(
    "num_measured",
    0,
    "Training examples measured, drawn anew each time, to estimate B of all n with an interval; "
    "0: all of them, exactly. Of the held-out examples as many are measured, or all.",
)
GROUPS = _tabled.groups(
    {"Noise scale": (_NUM_MEASURED,)},
    "num_seeds",
    shared=("Data", "Network", "Training", "Seeds", _processes.HEADING, "Run folder"),
)


def make_table(num_layers: int) -> Table:
    """Returns the columns of the records of a network of so many layers."""
    undetermined = functools.partial(Column, missing="undetermined")
    return Table(
        (
            Column("epoch", "epoch"),
            undetermined("noise_scale", "B of training", "{:,.1f}"),
            Column("noise_scale_low", "low", "{:,.1f}", missing="∞"),
            Column("noise_scale_high", "high", "{:,.1f}", missing="∞"),
            undetermined("held_out_noise_scale", "B, held out", "{:,.1f}"),
            Column("held_out_noise_scale_low", "low, held out", "{:,.1f}", missing="∞"),
            Column("held_out_noise_scale_high", "high, held out", "{:,.1f}", missing="∞"),
            Column("noise_trace", "tr Σ", "{:.4g}"),
            Column("noise_squared_norm", "‖∇C‖²", "{:.3g}"),
            Column("held_out_noise_trace", "tr Σ, held out", "{:.4g}"),
            Column("held_out_noise_squared_norm", "‖∇C‖², held out", "{:.3g}"),
            Column("cost_train", "cost", "{:.4g}"),
            Column("accuracy_train", "train", "{:.2%}"),
            Column("accuracy_test", "test", "{:.2%}"),
            *(
                undetermined(f"noise_scale_layer{k}", f"B, layer {k}", "{:,.1f}")
                for k in range(1, num_layers + 1)
            ),
        ),
        heading="Noise scale over the epochs",
        legend="B = tr Σ/‖∇C‖² of training, the cost that is minimized: exact if all training "
        "examples are measured. Held out: of the population, estimated from validation examples, "
        "with 95 % intervals.",
    )


def run(config: Config, dataset: data.Dataset | None = None, **callbacks: Any) -> list[runs.Record]:
    """Trains one network and returns the records of `train.run`, noise measured in each.

    Args:
      config: What to train; ``noise_examples`` says how many examples are measured.
      dataset: Of examples; by default what `load` returns.
      **callbacks: As `train.run` takes them, and its mesh.

    Raises:
      ValueError: more than one seed, or what `train.run` raises.
    """
    if config.num_seeds != 1:
        raise ValueError(f"num_seeds is {config.num_seeds}; expected 1")
    config = dataclasses.replace(config, track_noise=True, noise_split="both")
    return train.run(config, dataset, **callbacks).records


def _layers(record: runs.Record) -> list[str]:
    return [name for name in record if name.startswith("noise_scale_layer")]


_ENDS = ("", "_low", "_high")


def _draw_scale(
    axis: Any,
    epochs: np.ndarray,
    value: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    label: str,
    color: str,
) -> None:
    """Draws B with its interval, and a triangle at the lower end if there is no upper one."""
    axis.plot(epochs, value, "o-", ms=4, color=color, label=label)
    axis.fill_between(epochs, low, high, color=color, alpha=0.2, lw=0)
    is_open = ~np.isfinite(high)
    if is_open.any():
        axis.plot(
            epochs[is_open], low[is_open], "^", ms=5, color=color, label=f"{label}:\nat least this"
        )


@style.styled
def draw(records: list[runs.Record], title: str) -> Figure:
    """Returns both noise scales, their parts and the accuracy over the epochs."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    scale, parts, accuracy = figure.subplots(1, 3)
    epochs = np.array([record["epoch"] for record in records])

    def column(name: str) -> np.ndarray:
        return np.array([np.nan if r[name] is None else r[name] for r in records], np.float64)

    for name, color in zip(_layers(records[0]), _LAYER_COLORS * len(records), strict=False):
        label = f"training, layer {name.removeprefix('noise_scale_layer')}"
        scale.plot(epochs, column(name), ":", lw=1, color=color, label=label)
    for prefix, label, color in (
        ("", "training", style.BLUE),
        ("held_out_", "held out", style.VERMILION),
    ):
        _draw_scale(scale, epochs, *(column(f"{prefix}noise_scale{end}") for end in _ENDS),
                    label=label, color=color)  # fmt: skip
        parts.plot(
            epochs, column(f"{prefix}noise_trace"), "o-", ms=4, color=color, label=f"tr Σ, {label}"
        )
        squared_norm = column(f"{prefix}noise_squared_norm")
        squared_norm[squared_norm <= 0] = np.nan
        parts.plot(epochs, squared_norm, "s--", ms=4, color=color, label=f"‖∇C‖², {label}")
    scale.set_title("noise scale")
    scale.set_ylabel("B = tr Σ/‖∇C‖², in examples")
    parts.set_title("its parts")
    parts.set_ylabel("squared length of a gradient")
    for axis in (scale, parts):
        axis.set_yscale("log")
    for split, color in style.SPLITS.items():
        values = 100 * column(f"accuracy_{split}")
        accuracy.plot(epochs, values, "o-", ms=3, color=color, label=split)
    accuracy.set_title("accuracy")
    accuracy.set_ylabel("accuracy in %")
    for axis in (scale, parts, accuracy):
        axis.set_xlabel("epoch (0: before training)")
        style.legend(axis)
    figure.suptitle(title, parse_math=False)
    return figure


def main() -> int:
    """Reads the flags, trains and measures, leaves the run folder; returns the exit code."""
    with _cli.user_errors():
        own, given, output = _tabled.read_settings(Own, GROUPS, {})
        mesh = _processes.make_mesh(given)
        config, dataset = _starting_point.prepare(_TRAINING | given)
        n = len(dataset.train.labels)
        if own.num_measured > n:
            raise ValueError(
                f"num_measured is {own.num_measured}; expected at most {n}, the training examples, "
                "or 0"
            )
        config = dataclasses.replace(
            config, noise_examples=own.num_measured or n, track_noise=True, noise_split="both"
        )
        settings = dataclasses.asdict(config)
        folder, notes = _recorded.open_folder(output, settings, dataset, None, __file__)
    table = make_table(len(config.sizes or ()) - 1)

    def find(show: _tabled.Show) -> _tabled.Answer:
        def on_epoch(state: sj.TrainState, record: runs.Record) -> None:
            del state
            folder.append_metrics(record)
            show(table, record)

        records = run(config, dataset, mesh=mesh, on_epoch=on_epoch)
        title = f"Gradient noise scale in training: {folder.path.name}"
        last = records[-1]
        summary = {
            "epochs": last["epoch"],
            "num_undetermined": sum(record["held_out_noise_scale"] is None for record in records),
            **{name: last[name] for name in last if "noise_" in name},
            "final_test_accuracy": last["accuracy_test"],
        }
        picture = _tabled.Picture(
            "Noise scale",
            "Over the epochs: the noise scale of training and that of held-out examples with its "
            "interval, the traces and squared norms that they are ratios of, and the accuracy.",
            draw(records, title),
            "noise_scale",
        )
        return _tabled.Answer(title, summary, [(table, records)], [picture])

    return _tabled.record(folder, notes, config.epochs, find, unit="epoch")


if __name__ == "__main__":
    _cli.start(main, __doc__ or "", GROUPS, defaults=_TRAINING)
