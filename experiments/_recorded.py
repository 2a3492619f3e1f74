"""A run that leaves a folder behind: settings, metrics, checkpoints, picture, report."""

import contextlib
import dataclasses
import hashlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sgd_jax as sj
from experiments import _cli, _platform, _signals, runs
from experiments._console import TrainingDisplay
from experiments._within_epoch import PartCheckpoints, Progress
from sgd_jax import data
from sgd_jax.distributed import processes


class DivergenceError(ArithmeticError):
    """A cost that is not finite: nothing after it can be trusted."""


@dataclasses.dataclass(frozen=True)
class Output:
    """Where a run goes; the flags of the same names say what each is."""

    out_dir: str = "runs"
    run_name: str | None = None
    resume: bool = False
    log_to: tuple[str, ...] = ("jsonl",)
    save_every: int = 64

    def __post_init__(self):
        """Raises ValueError at what is wrong."""
        if self.save_every < 0:
            raise ValueError(
                f"save_every is {self.save_every}; expected a number of chunks, or 0 for none"
            )


def read_stored(output: Output, experiment: str = "train") -> dict[str, Any] | None:
    """Checks that the run can be written; returns `config.json` of the one to resume, or None.

    Args:
      output: Where the run goes.
      experiment: The name of the program, whose runs alone it can resume.

    Raises:
      ValueError: no name to resume, a bad name, an unknown logger, a damaged `config.json`.
      FileNotFoundError, FileExistsError: there is no such run, or, not resuming, there is one.
      OSError: the folder cannot be written to, or another process works on it.
      ImportError: the library of a logger is missing.
    """
    runs.check_loggers(output.log_to)
    out_dir = Path(output.out_dir)
    if not output.resume:
        if output.run_name is not None:
            runs.check_new_name(out_dir, output.run_name)
        runs.check_writable(out_dir)
        return None
    if output.run_name is None:
        raise ValueError("resume is set; expected --run_name to say which run to go on with")
    folder = runs.RunFolder.open(out_dir, output.run_name)
    runs.check_writable(folder.path)
    folder.lock.acquire()  # so that who comes second is refused before the data are read
    folder.lock.release()
    stored = folder.read_config()
    if stored.get("experiment") != experiment:
        raise ValueError(
            f"{folder.config_path} is of experiment {stored.get('experiment')!r}; expected a run "
            f"of {experiment}: only these can be resumed by it"
        )
    for name, kind in (("data_sha256", str), ("versions", dict), ("device", dict)):
        if not isinstance(stored.get(name), kind):
            raise ValueError(f"{folder.config_path} is damaged: {name} is {stored.get(name)!r:.40}")
    return stored


def merge_settings(
    stored: dict[str, Any], given: dict[str, Any], free: frozenset[str], flag: str = "resume"
) -> dict[str, Any]:
    """Returns the settings of a run to go on with: those stored, and those given now.

    Raises:
      ValueError: a setting that is not ``free`` is given and differs; names each, with both values,
        and ``flag``, which asks for that run.
    """
    differing = [
        f"{name} is {stored[name]!r} there and {value!r} now"
        for name, value in given.items()
        if name not in free and stored[name] != value
    ]
    if differing:
        raise ValueError(
            f"{flag} is set, but settings differ from those of the run: {'; '.join(differing)}. "
            "Leave these flags out to go on as before, or start a new run"
        )
    return stored | given


def is_complete(output: Output, epochs: int) -> bool:
    """Whether the run to resume has nothing left to do; raises ValueError if it went further."""
    folder = runs.RunFolder.open(Path(output.out_dir), output.run_name or "")
    records = folder.read_metrics()
    _check_metrics(folder, records)
    done = max((record["epoch"] for record in records), default=0)
    if done > epochs:
        raise ValueError(
            f"epochs is {epochs}, but {folder.path} has trained {done} already; expected at least "
            "as many. --epochs counts from the beginning of the run"
        )
    summary = folder.read_summary()
    if summary is None:
        return False
    return (summary.get("status"), summary.get("epochs")) == ("complete", epochs)


def _check_metrics(folder: runs.RunFolder, records: list[runs.Record]) -> None:
    """Raises ValueError, with its number, at a line of metrics that cannot be summed up."""
    for number, line in enumerate(records, start=1):
        try:
            if _layout(line) != _layout(records[0]):
                raise ValueError("it measures other things than the first line")
            runs.summarize([line])
            runs.format_record(line)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{folder.metrics_path}, line {number}, is damaged ({type(error).__name__}: "
                f"{error}); expected what the run wrote. Put it back, or start a new run"
            ) from error


def _layout(line: runs.Record) -> dict[str, int]:
    """Returns the number of seeds that each name of a line has a value for."""
    for name, value in line.items():
        numbers = runs.per_seed(value)
        if not numbers or not all(isinstance(number, int | float | None) for number in numbers):
            raise TypeError(f"{name} is {value!r:.40}")
    return {name: len(runs.per_seed(value)) for name, value in line.items()}


def open_folder(
    output: Output,
    settings: dict[str, Any],
    dataset: data.Dataset,
    stored: dict[str, Any] | None,
    source: str,
) -> tuple[runs.RunFolder, list[str]]:
    """Makes the run folder, or opens it again, locks it, and writes `config.json`.

    Of several processes the first does it; all must see the folder.

    Returns:
      The folder, locked until it is released or the process ends, and notes for the user: what the
      run works on and, where it is resumed, what may keep it from being the same to the last bit.

    Raises:
      ValueError: the data are not those that the run began with, or not the same in all processes.
      BlockingIOError: another process works on the run.
      FileNotFoundError: a process does not see the folder that the first has made.
    """
    made = []
    digest = processes.in_all(lambda: digest_of(dataset))
    contents = {f"the data of {dataset.name} (SHA-256)": digest[:12]}
    places = ("dataset", "data_dir")  # what lies there is compared instead
    others = {name: value for name, value in settings.items() if name not in places}
    processes.check_same(contents | others, "data and settings")

    def make() -> tuple[str, list[str]]:
        folder, notes = _make_folder(output, settings, dataset, digest, stored, source)
        made.append(folder)
        return str(folder.path.absolute()), notes

    path, notes = processes.from_first(make)
    folder = made[0] if made else runs.RunFolder(Path(path))
    processes.in_all(lambda: _check_shared(folder))
    return folder, notes


def _check_shared(folder: runs.RunFolder) -> None:
    if not folder.config_path.is_file():
        raise FileNotFoundError(
            f"process 0 has made {folder.path}, which process {jax.process_index()} does not see; "
            "expected an --out_dir on a file system that all processes share"
        )


def _make_folder(
    output: Output,
    settings: dict[str, Any],
    dataset: data.Dataset,
    digest: str,
    stored: dict[str, Any] | None,
    source: str,
) -> tuple[runs.RunFolder, list[str]]:
    """See `open_folder`; ``digest`` is that of the data set."""
    experiment = Path(source).stem
    environment = runs.describe_environment(source)
    device = environment["device"]
    num_train, num_validation, num_test = (len(part.labels) for part in dataset[1:4])
    notes = [
        f"{dataset.name}: {num_train:,} examples to train on, {num_validation:,} to validate, "
        f"{num_test:,} to test; on {device['count']} × {device['kind']}"
        + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else "")
        + "".join(f"; unused: {name}" for name in device.get("unused", ()))
    ]
    if warning := _platform.warning_of_fallback(device):
        print(warning, file=sys.stderr)
    if stored is None:
        prefix = f"{experiment}-{dataset.name}"
        folder = runs.RunFolder.create(Path(output.out_dir), output.run_name, prefix)
        folder.lock.acquire()
    else:
        folder = runs.RunFolder.open(Path(output.out_dir), output.run_name or "")
        folder.lock.acquire()
        if folder.read_config() != stored:
            raise BlockingIOError(
                f"another process has gone on with {folder.path} just now; expected nobody else "
                "to work on it. Try again"
            )
        if stored["data_sha256"] != digest:
            raise ValueError(
                f"dataset {dataset.name} holds other data than when {folder.path} began; expected "
                "the same examples in the same order. Put them back, or start a new run"
            )
        notes += [
            f"warning: {name} was {stored[name]} and is {environment[name]}: results may differ in "
            "the last bits from those of a run that was not interrupted"
            for name in ("versions", "device")
            if stored[name] != environment[name]
        ]
    everything = {"experiment": experiment, **settings, **dataclasses.asdict(output)}
    folder.write_config({**everything, "data_sha256": digest, **environment})
    return folder, notes


def record(
    folder: runs.RunFolder,
    output: Output,
    epochs: int,
    first_seed: int,
    notes: list[str],
    run: Callable[..., Any],
) -> int:
    """Runs, recording each epoch; shows a table and what came out; returns the exit code.

    A checkpoint is complete before its line of metrics is written, and holds that line, so nothing
    that `metrics.jsonl` says can be lost.

    Args:
      folder: Of the run.
      output: As given.
      epochs: When the run ends.
      first_seed: Of the seeds trained.
      notes: Shown first.
      run: Called with `restore`, `on_epoch` and `on_part`.
    """
    began = time.perf_counter()
    config = folder.read_config()
    try:
        status, exit_code, message = _train(folder, output, epochs, notes, config, run)
        if not processes.is_first():
            return exit_code
        if message:
            print(f"error: {message}", file=sys.stderr)
        records = folder.read_metrics()
        if records and status != "failed":
            with _signals.shielded():
                seconds = time.perf_counter() - began
                _conclude(folder, config, records, status, first_seed, seconds)
            print(f"{seconds:.1f} s in all")
        print(f"run folder: {folder.path}")
    finally:
        folder.lock.release()
    return exit_code


def _train(
    folder: runs.RunFolder,
    output: Output,
    epochs: int,
    notes: list[str],
    config: dict[str, Any],
    run: Callable[..., Any],
) -> tuple[str, int, str]:
    """Runs, recording each epoch; returns status, exit code and, where it ended early, why."""
    with contextlib.ExitStack() as stack:
        display = stack.enter_context(TrainingDisplay(epochs))
        for note in notes:
            display.say(note)
        loggers = [
            stack.enter_context(contextlib.closing(runs.LOGGERS[name](folder, config)))
            for name in dict.fromkeys(output.log_to)
            if name in runs.LOGGERS and processes.is_first()
        ]
        checkpoints: list[runs.Checkpoints] = []
        within = PartCheckpoints(folder.path / "checkpoints_within_epoch", output.save_every)
        stack.enter_context(contextlib.closing(within))

        def restore(state: sj.TrainState) -> Progress | None:
            opened = runs.Checkpoints(folder.checkpoints_path, _validation_accuracy, like=state)
            checkpoints.append(stack.enter_context(contextlib.closing(opened)))
            for warning in opened.damaged:
                display.say(f"warning: {warning}")
            latest = opened.latest
            with _cli.user_errors():
                last = latest.record if latest else None
                was_missing = processes.from_first(lambda: folder.rewind_metrics(last))
            if latest:
                for logger in loggers if was_missing else []:
                    logger.log(latest.record)
                display.show(latest.record)
                progress, warnings = within.restore(latest)
                for warning in warnings:
                    display.say(f"warning: {warning}")
                return progress
            return None

        def on_epoch(state: sj.TrainState, record: runs.Record) -> None:
            with _signals.shielded():
                checkpoints[0].save(state, record)
                folder.append_metrics(record)
                for logger in loggers:
                    logger.log(record)
                display.show(record)
                within.clear()

        def on_part(progress: Progress) -> None:
            with _signals.shielded():
                within.save(progress)

        go_on = f"continue with --resume --run_name={folder.path.name}"
        try:
            run(restore=restore, on_epoch=on_epoch, on_part=on_part)
        except DivergenceError as error:
            return "diverged", 1, str(error)
        except KeyboardInterrupt as error:
            why = f"{str(error) or 'interrupted'}; every epoch that was finished is saved: {go_on}"
            return "interrupted", _signals.exit_code(error), why
        except BrokenPipeError:
            raise
        except data.ChangedFileError as error:
            why = f"{error}. {_name_last(folder)}. Put the file back, then {go_on}"
            return "failed", 1, why
        except OSError as error:
            return "failed", 1, f"{error}. When there is room again, {go_on}"
        except (MemoryError, RuntimeError) as error:
            if not _cli.is_out_of_memory(error):
                raise
            return "failed", 1, f"{_cli.out_of_memory(error)}. Then {go_on}"
    return "complete", 0, ""


def _name_last(folder: runs.RunFolder) -> str:
    """Returns a sentence that names the last checkpoint of a run."""
    records = folder.read_metrics()
    if not records:
        return "There is no checkpoint yet"
    return f"The last checkpoint is of epoch {records[-1]['epoch']}, in {folder.checkpoints_path}"


def _conclude(
    folder: runs.RunFolder,
    config: dict[str, Any],
    records: list[runs.Record],
    status: str,
    first_seed: int,
    seconds: float,
) -> None:
    """Writes picture, report and, last of all, `summary.json`; prints what came out."""
    summary = {"status": status, **runs.summarize(records, first_seed), "device": config["device"]}
    summary["seconds_in_all"] = round(seconds, 1)
    _write_report(folder, config, records, summary)
    folder.write_summary(summary)
    when = " before it diverged" if status == "diverged" else ""
    if summary["num_seeds"] == 1:
        print(
            f"test accuracy{when}: {summary['final_test_accuracy']:.2%} at the end, "
            f"{summary['best_test_accuracy']:.2%} at best (epoch {summary['best_epoch']}), "
            f"{summary['test_accuracy_at_best_validation']:.2%} where validation was best "
            f"(epoch {summary['best_validation_epoch']})"
        )
    else:
        for name, spread in summary["spread"].items():
            low, middle, high = (spread[key] for key in ("min", "median", "max"))
            print(
                f"{name.replace('_', ' ')}{when} of {summary['num_seeds']} seeds: "
                f"median {middle:.2%}, least {low:.2%}, largest {high:.2%}"
            )
    if summary["num_stuck"]:
        seeds = ", ".join(map(str, summary["stuck_seeds"]))
        print(f"stuck, with a class hardly ever right: {summary['num_stuck']} (seed {seeds})")


def renew_report(folder: runs.RunFolder) -> None:
    """Writes the report of a run again, from what lies in its folder.

    That of a run of `train` comes from its lines of metrics, so it may have been interrupted; that
    of any other run from what was kept of its report.

    Raises:
      FileNotFoundError: the run has left nothing to report yet.
    """
    config, summary, records = folder.read_config(), folder.read_summary(), folder.read_metrics()
    if config["experiment"] == "train" and records:
        if summary is None or summary["epochs"] != records[-1]["epoch"]:
            summary = {"status": "not finished", **runs.summarize(records, config["seed"])}
        _write_report(folder, config, records, summary)
    elif folder.report_path.with_suffix(".json").is_file():
        runs.write_page(folder.report_path, *runs.read_page(folder.report_path))
    else:
        raise FileNotFoundError(
            f"{folder.path} holds no results yet; expected a run that has come to an end, or one "
            "of experiments.train that has trained an epoch"
        )


def _write_report(
    folder: runs.RunFolder,
    config: dict[str, Any],
    records: list[runs.Record],
    summary: dict[str, Any],
) -> None:
    """Writes picture and report."""
    title = f"{folder.path.name}: best test accuracy {summary['best_test_accuracy']:.2%}"
    runs.draw_learning_curve(folder.figure_path, records, title)
    runs.write_report(
        folder.report_path,
        title=title,
        settings=shown_settings(config),
        header=_header(summary, records),
        records=records,
        figure=folder.figure_path,
    )


def _header(summary: dict[str, Any], records: list[runs.Record]) -> dict[str, str]:
    """Returns what stands at the head of a report of `train`: a few named numbers."""

    def accuracy(name: str) -> str:
        spread = summary["spread"][name]
        if summary["num_seeds"] == 1:
            return f"{spread['median']:.2%}"
        return (
            f"{spread['median']:.2%}, the median of {summary['num_seeds']} seeds; "
            f"{spread['min']:.2%} to {spread['max']:.2%}"
        )

    epoch, validated = summary["best_epoch"], summary["best_validation_epoch"]
    chosen = f"{summary['test_accuracy_at_best_validation']:.2%}"
    final = accuracy("final_test_accuracy")
    header = {
        "best test accuracy": f"{accuracy('best_test_accuracy')} (epoch {epoch})",
        "test accuracy at the end": f"{final} (epoch {summary['epochs']})",
        "where validation was best": f"{chosen} (epoch {validated})",
    }
    if records[-1].get("noise_scale") is not None and summary["num_seeds"] == 1:
        low, high = (records[-1][f"noise_scale_{end}"] for end in ("low", "high"))
        upper = "no upper bound" if high is None else f"{high:.4g}"
        header["noise scale B at the end"] = (
            f"{records[-1]['noise_scale']:.4g} examples ({low:.4g} to {upper}, 95 %)"
        )
    if "batch_size" in records[-1]:
        first, last = (records[i]["batch_size"] for i in (0, -1))
        header["batch size m"] = f"{first} at the beginning, {last} at the end"
    if summary["num_stuck"]:
        seeds = ", ".join(map(str, summary["stuck_seeds"]))
        header["stuck"] = f"{summary['num_stuck']} of {summary['num_seeds']} seeds: {seeds}"
    seconds = f"{summary['seconds']:.3g} of training"
    if "seconds_in_all" in summary:
        seconds = f"{summary['seconds_in_all']:.1f} in all, {seconds}"
    return header | {"seconds": seconds, "status": summary["status"]}


def named_numbers(summary: dict[str, Any]) -> dict[str, Any]:
    """Returns a summary with names to read: words for underscores, nested ones side by side."""
    named = {}
    for name, value in summary.items():
        label = name.replace("_", " ")
        if isinstance(value, dict):
            named |= {f"{label}: {inner}": of for inner, of in named_numbers(value).items()}
        else:
            named[label] = value
    return named


_ONLY_WITH = {
    "chunk_mib": ("stream",),
    "save_every": ("stream",),
    "noise_examples": ("track_noise", "adaptive"),
    "nesterov": ("momentum",),
}
"""Settings that nothing reads unless one of others is set."""

_NOT_SHOWN = ("resume", "log_to", "run_name", "out_dir", "data_sha256")


def shown_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings for a report: those that were used, and the command as one line."""
    shown = {}
    for name, value in config.items():
        conditions = _ONLY_WITH.get(name, ())
        is_used = not conditions or any(config.get(other) for other in conditions)
        if value is None or name in _NOT_SHOWN or not is_used:
            continue
        shown[name.replace("_", " ")] = value
    command = config.get("command")
    return shown | ({"command": pasteable(command)} if command else {})


def pasteable(command: list[str]) -> str:
    """Returns the command of a run as a line for a shell; `sgd-jax NAME` for its programs."""
    if command[0].startswith("sgd-jax "):
        return " ".join([command[0], *map(shlex.quote, command[1:])])
    path = Path(command[0])
    is_ours = path.suffix == ".py" and path.parent.name == Path(__file__).parent.name
    first = f"sgd-jax {path.stem}" if is_ours else shlex.quote(command[0])
    return " ".join([first, *map(shlex.quote, command[1:])])


def _validation_accuracy(record: runs.Record) -> float:
    return statistics.median(runs.per_seed(record["accuracy_validation"]))


def digest_of(dataset: data.Dataset) -> str:
    """Returns what tells one data set from another: the SHA-256 of all its examples, in order."""
    digest = hashlib.sha256()
    for part in (dataset.train, dataset.validation, dataset.test):
        for leaf in part:
            digest.update(f"{leaf.dtype} {leaf.shape}".encode())
            for block in data.blocks(leaf):
                digest.update(np.ascontiguousarray(block).data)
    return digest.hexdigest()
