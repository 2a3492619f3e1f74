"""The experiment: trains as the book says, resumes bit for bit, and says clearly what is wrong."""

import dataclasses
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import in_process
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from absl import flags
from rich.console import Console

import sgd_jax as sj
from experiments import __main__ as command
from experiments import _classifier, _cli, _flags, _processes, _recorded, runs, train
from experiments._config import Config, make_optimizer, resolve
from experiments._console import TrainingDisplay
from sgd_jax import data

ROOT = pathlib.Path(train.__file__).parents[1]
N = 22  # training examples of the tiny data set: no multiple of the batch size 4 or of a chunk


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Returns the path of a data set of 3 classes with 5 features, apart but for some noise."""
    random = np.random.default_rng(0)
    centers = random.normal(size=(3, 5))
    arrays = {}
    for part, n in (("train", N), ("validation", 9), ("test", 10)):
        labels = np.arange(n) % 3
        arrays[f"x_{part}"] = centers[labels] + 0.5 * random.normal(size=(n, 5))
        arrays[f"y_{part}"] = labels
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **arrays)
    return path


def command_line(path, out_dir, *more):
    return [f"--dataset={path}", f"--out_dir={out_dir}", "--sizes=5,4,3", "--batch_size=4", *more]


def main(*arguments):
    """Runs the program in this process, in float64, and returns its exit code."""
    return in_process.run(train, "--dtype=float64", *arguments)


def start(*arguments):
    """Starts the program as a user does."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", "--dtype=float64", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def metrics(path):
    """Returns the lines of metrics of a run without the times."""
    lines = runs.RunFolder(path).read_metrics()
    for line in lines:
        del line["seconds"], line["examples_per_second"]
    return lines


def last_arrays(path):
    """Returns the bytes of every array in the last checkpoint of a run."""
    import orbax.checkpoint as ocp
    from etils import epath

    epoch = max(int(child.name) for child in (path / "checkpoints").iterdir())
    state = (path / "checkpoints" / str(epoch) / "state").absolute()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # wherever they were saved
    saved = ocp.StandardCheckpointHandler().metadata(epath.Path(state)).tree
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
        for name, leaf in saved.items()
    }
    with ocp.StandardCheckpointer() as reader:
        arrays = reader.restore(state, like)
    return epoch, {name: (a.dtype, np.asarray(a).tobytes()) for name, a in arrays.items()}


def line(epoch, *, with_times=True):
    """Returns a line of metrics made up."""
    names = [f"{n}_{s}" for n in ("cost", "accuracy") for s in ("train", "validation", "test")]
    values = dict.fromkeys(names, 0.5) | {"epoch": epoch, "gradient_norm": 0.25}
    times = {"seconds": 0.125, "examples_per_second": 8.0} if with_times else {}
    return values | {"dead_classes_test": 0} | times


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    assert last_arrays(a) == last_arrays(b)


# What it reaches


def test_the_default_command_learns_digits():
    result = train.run(Config())
    summary = runs.summarize(result.records)
    assert summary["final_test_accuracy"] >= 0.95
    assert summary["num_stuck"] == 0
    assert [record["epoch"] for record in result.records] == list(range(31))


# What it measures


def as_reference(params):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def pairs(examples):
    return list(zip(examples.inputs, np.eye(3)[examples.labels], strict=True))


def count_dead(network, examples):
    right, size = np.zeros(3), np.bincount(examples.labels)
    for x, label in zip(*examples, strict=True):
        right[label] += np.argmax(reference.feedforward(network, x)) == label
    return sum(right / size < 0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("cost", "chunk_size"), [("quadratic", 8), ("cross_entropy", 2048)])
def test_what_is_measured_is_of_all_examples_in_chunks_or_at_once(
    tiny, monkeypatch, cost, chunk_size
):
    monkeypatch.setattr(_classifier, "CHUNK_SIZE", chunk_size)
    dataset = data.load(tiny)
    config = Config(dataset=str(tiny), cost=cost, epochs=0, num_seeds=2, dtype="float64")
    result = train.run(config, dataset)
    (record,) = result.records
    cost_fn, delta = getattr(reference, f"{cost}_cost"), getattr(reference, f"{cost}_delta")
    for seed in range(2):
        network = [leaf[seed] for leaf in as_reference(result.state.params)]
        for split in ("train", "validation", "test"):
            examples = getattr(dataset, split)
            value = reference.mean_cost(network, pairs(examples), cost_fn)
            assert record[f"cost_{split}"][seed] == pytest.approx(value, rel=1e-12)
            accuracy = reference.accuracy(network, *examples)
            assert record[f"accuracy_{split}"][seed] == accuracy
        gradient = reference.mean_gradient(network, pairs(dataset.train), delta)
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient))
        assert record["gradient_norm"][seed] == pytest.approx(norm, rel=1e-12)
        assert record["dead_classes_test"][seed] == count_dead(network, dataset.test)


def trained_from(config, dataset):
    """Returns the result of a run, and its first seed's network before and after each epoch."""
    seen = []

    def keep(state, record):
        seen.append([leaf[0].copy() for leaf in as_reference(state.params)])

    return train.run(config, dataset, on_epoch=keep), seen


@pytest.mark.slow
def test_a_full_batch_is_gradient_descent(tiny):
    dataset = data.load(tiny)
    config = Config(dataset=str(tiny), batch_size=0, learning_rate=0.5, epochs=2, dtype="float64")
    result, seen = trained_from(config, dataset)
    assert result.state.step.tolist() == [2]
    network, velocities = seen[0], [np.zeros_like(w) for w in seen[0]]
    for after in seen[1:]:
        delta, batches = reference.quadratic_delta, [range(N)]
        network, velocities = reference.epoch(
            network, velocities, pairs(dataset.train), batches, delta, learning_rate=0.5
        )
        for w, expected in zip(after, network, strict=True):
            np.testing.assert_allclose(w, expected, rtol=1e-12, atol=1e-14)


def test_an_epoch_is_that_of_the_book_in_an_order_of_its_own(tiny):
    dataset = data.load(tiny)
    config = Config(dataset=str(tiny), batch_size=4, seed=7, epochs=2, dtype="float64")
    _, seen = trained_from(config, dataset)
    _, key = jax.random.split(jax.random.key(7))
    network, velocities = seen[0], [np.zeros_like(w) for w in seen[0]]
    for number in (1, 2):
        order = sj.sampling.epoch(jax.random.fold_in(key, number), N, 4, keep_last=True)
        batches = [batch[batch >= 0] for batch in np.asarray(order)]
        assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 2]
        network, velocities = reference.epoch(
            network,
            velocities,
            pairs(dataset.train),
            batches,
            reference.quadratic_delta,
            learning_rate=3.0,
        )
        for w, expected in zip(seen[number], network, strict=True):
            np.testing.assert_allclose(w, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_seeds_trained_together_do_what_each_does_alone(tiny):
    config = Config(dataset=str(tiny), batch_size=4, epochs=3, seed=5, num_seeds=3, dtype="float64")
    together = train.run(config)
    alone = train.run(dataclasses.replace(config, seed=6, num_seeds=1))
    for line, expected in zip(together.records, alone.records, strict=True):
        for name, value in expected.items():
            if name not in ("epoch", "seconds", "examples_per_second"):
                assert line[name][1] == pytest.approx(value, rel=1e-10)
    first, second, _ = together.records[-1]["cost_train"]
    assert first != second


# The optimizer


def one_update(**options):
    """Returns the update of weights 2 and biases 3 at gradients of 1, of a data set of 10."""
    config = Config(learning_rate=0.5, **options)
    params = (sj.Layer(jnp.full((1, 1), 2.0), jnp.full(1, 3.0)),)
    optimizer = make_optimizer(config, num_examples=10)
    gradient = jax.tree.map(jnp.ones_like, params)
    ((weights, biases),), _ = optimizer.update(gradient, optimizer.init(params), params)
    return float(weights[0, 0]), float(biases[0])


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_weight_decay_is_that_of_the_book_and_spares_the_biases(name):
    plain = one_update(optimizer=name)
    decayed = one_update(optimizer=name, weight_decay=4.0)
    assert decayed[0] - plain[0] == pytest.approx(-0.5 * 4.0 / 10 * 2.0)  # −ηλ/n · w
    assert decayed[1] == plain[1]


def test_momentum_is_handed_on_to_optimizers_that_take_it():
    assert one_update(momentum=0.5, nesterov=True) == (-0.75, -0.75)  # −η(g + μv), v = g
    ours = make_optimizer(Config(optimizer="rmsprop", momentum=0.5, nesterov=True), num_examples=1)
    theirs = optax.rmsprop(Config.learning_rate, momentum=0.5, nesterov=True)
    w = jnp.ones(2)
    updates = [o.update(w, o.init(w))[0] for o in (ours, theirs, optax.rmsprop(3.0))]
    assert updates[0].tolist() == updates[1].tolist() != updates[2].tolist()
    with pytest.raises(ValueError, match=r"momentum is set, but optax.adam takes none"):
        Config(optimizer="adam", momentum=0.5)
    Config(optimizer="adam", nesterov=True)  # which optax.adam takes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("addam", "Did you mean adam"),
        ("l2_loss", "There are adabelief, .* sgd"),
        ("lbfgs", "needs more than a learning rate and gradients"),
        ("noam", "optimizer is 'noam'"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Config(optimizer=name)


# Run folder


def test_a_run_leaves_everything_behind(tiny, tmp_path, capsys):
    assert main(*command_line(tiny, tmp_path, "--epochs=2", "--log_to=tensorboard")) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("train-tiny-")
    folder = runs.RunFolder(path)
    config = folder.read_config()
    of_settings = _flags.GROUPS.keys() - _processes.GROUPS.keys()
    assert {holder.name for name in of_settings for holder in _flags.GROUPS[name]} <= config.keys()
    assert config["sizes"] == [5, 4, 3]
    assert config["versions"].keys() >= {"python", "jax", "jaxlib", "optax", "sgd_jax"}
    assert config["device"]["platform"] == jax.devices()[0].platform
    lines = folder.read_metrics()
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[2]["examples_per_second"] == pytest.approx(N / lines[2]["seconds"])
    summary = folder.read_summary()
    assert summary["status"] == "complete"
    assert summary["final_test_accuracy"] == lines[2]["accuracy_test"]
    assert summary["device"] == config["device"]
    assert folder.figure_path.read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64" in folder.report_path.read_text()
    assert list((path / "tensorboard").iterdir())
    printed = capsys.readouterr().out
    assert f"test accuracy: {summary['final_test_accuracy']:.2%}" in printed
    assert f"run folder: {path}" in printed


@pytest.mark.slow
def test_smoke_takes_few_examples_and_epochs(tmp_path, capsys):
    assert main("--smoke", f"--out_dir={tmp_path}", "--num_seeds=2") == 0
    (path,) = tmp_path.iterdir()
    assert len(metrics(path)) == 3
    assert len(metrics(path)[0]["accuracy_test"]) == 2
    printed = capsys.readouterr().out
    assert "200 examples to train on" in printed
    assert "best test accuracy of 2 seeds: median" in printed


def test_two_epochs_and_two_more_equal_four(tiny, tmp_path, capsys):
    options = ["--learning_rate=0.1", "--num_seeds=2", "--optimizer=adam"]
    arguments = command_line(tiny, tmp_path, *options)
    assert main(*arguments, "--run_name=whole", "--epochs=4") == 0
    assert main(*arguments, "--run_name=parts", "--epochs=2") == 0
    resume = [f"--out_dir={tmp_path}", "--run_name=parts", "--resume", "--epochs=4"]
    assert main(*resume) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    summaries = [runs.RunFolder(tmp_path / name).read_summary() for name in ("whole", "parts")]
    for name in ("seconds", "seconds_in_all"):
        assert [summary.pop(name) > 0 for summary in summaries] == [True, True]
    assert summaries[0] == summaries[1]

    def everything():
        files = [path for path in (tmp_path / "parts").rglob("*") if path.is_file()]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = everything()
    capsys.readouterr()
    assert main(*resume) == 0
    assert "complete: parts has trained its 4 epochs already" in capsys.readouterr().out
    assert everything() == before
    assert main(*resume[:-1], "--epochs=3") == 2
    assert "has trained 4 already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(tiny, tmp_path):
    arguments = command_line(tiny, tmp_path, "--epochs=30", "--momentum=0.5")
    whole = start(*arguments, "--run_name=whole")
    killed = start(*arguments, "--run_name=killed")
    folder = runs.RunFolder(tmp_path / "killed")
    while len(folder.read_metrics()) < 5:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    time.sleep(0.0137)
    killed.kill()
    killed.communicate()
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    done = len(folder.read_metrics())
    assert 5 <= done < 31
    assert folder.read_summary() is None
    checkpoints = folder.checkpoints_path
    last = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
    assert last >= done - 1  # what metrics say is saved
    torn = checkpoints / str(last + 1)  # and one that is only half there
    (torn / "state").mkdir(parents=True)
    (torn / "state" / "manifest.ocdbt").write_bytes(b"half")
    resumed = start(f"--out_dir={tmp_path}", "--run_name=killed", "--resume")
    output, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    assert f"checkpoint {last + 1} is incomplete" in output
    shutil.rmtree(checkpoints / f"damaged-{last + 1}")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    names = [path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()]
    assert sorted(names) == sorted(path.name for path in checkpoints.iterdir())


def record_with(run, tmp_path):
    """Records what ``run`` does, as `main` does, without training."""
    folder = runs.RunFolder.create(tmp_path, "mine", "train")
    folder.write_config({"device": "a device"})
    output = _recorded.Output(out_dir=str(tmp_path), run_name="mine")
    return folder, _recorded.record(folder, output, 2, 0, ["a note"], run)


def test_what_metrics_say_is_saved_before(tmp_path, monkeypatch):
    def killed(folder, record):
        raise RuntimeError("killed")

    def run(restore, on_epoch, on_part):
        assert restore({"w": jnp.zeros(2)}) is None
        on_epoch({"w": jnp.ones(2)}, line(0))
        monkeypatch.setattr(runs.RunFolder, "append_metrics", killed)
        on_epoch({"w": jnp.full(2, 2.0)}, line(1))

    with pytest.raises(RuntimeError, match="killed"):
        record_with(run, tmp_path)
    assert metrics(tmp_path / "mine") == [line(0, with_times=False)]
    assert last_arrays(tmp_path / "mine")[0] == 1


def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys):
    def run(restore, on_epoch, on_part):
        restore({"w": jnp.zeros(2)})
        on_epoch({"w": jnp.ones(2)}, line(0))
        raise KeyboardInterrupt

    folder, exit_code = record_with(run, tmp_path)
    assert exit_code == 130
    assert "--resume --run_name=mine" in capsys.readouterr().err
    assert folder.read_summary()["status"] == "interrupted"
    assert folder.report_path.is_file()


# Divergence


@pytest.mark.slow
def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path, capsys):
    arguments = ["--cost=cross_entropy", "--learning_rate=1e308", "--epochs=3", "--run_name=mine"]
    assert main(*command_line(tiny, tmp_path, *arguments)) == 1
    errors = capsys.readouterr().err
    assert "epoch 1, step" in errors
    assert "learning rate that is too large, 1e+308: try --learning_rate=1e+307" in errors
    folder = runs.RunFolder(tmp_path / "mine")
    assert [line["epoch"] for line in folder.read_metrics()] == [0]
    assert folder.read_summary()["status"] == "diverged"
    assert last_arrays(tmp_path / "mine")[0] == 0


def test_a_divergence_names_epoch_step_and_seed():
    costs = np.ones((3, 6))
    costs[2, 4] = np.nan
    costs[1, 5] = np.inf
    message = r"nan at epoch 7, step 5 of 6 \(seed 12\).*try --learning_rate=0.3"
    with pytest.raises(_recorded.DivergenceError, match=message):
        train._check_costs(costs, 7, Config(seed=10, num_seeds=3), 60, part(range(6), 6))
    with pytest.raises(_recorded.DivergenceError, match=r"cost_test is inf .*epoch 7 \(seed 11\)"):
        train._check_measured({"cost_test": [1.0, np.inf]}, 7, Config(seed=10, num_seeds=2), 60)


def part(steps, num_steps):
    return _classifier.Part(None, None, steps, num_steps)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({}, r"a learning rate that is too large, 3: try --learning_rate=0.3"),
        ({"weight_decay": 1e9}, r"a weight decay .* 1 − ηλ/n = -3e\+06. Try --weight_decay=33,"),
        ({"weight_decay": 100.0}, "a learning rate that is too large"),
        ({"momentum": 0.99}, r"3 with momentum 0.99 moves as far as 300 .*--learning_rate=0.03"),
    ],
)
def test_the_likely_cause_of_a_divergence_is_judged_by_the_settings(settings, cause):
    assert re.search(f"The likely cause is (that the learning rate )?{cause}",
                     train.likely_cause(Config(**settings), n=1000))  # fmt: skip


def test_a_weight_decay_that_makes_weights_grow_is_named_by_the_program(tmp_path, capsys):
    assert in_process.call(train, f"--out_dir={tmp_path}", "--weight_decay=1e9", "--epochs=1") == 1
    printed = capsys.readouterr()
    assert "The likely cause is a weight decay that is too large" in printed.err
    assert "test accuracy before it diverged: " in printed.out


# Bad input

BAD_FLAGS = {
    "--batch_size=23": r"batch_size is 23; expected at most 22.*--batch_size=full",
    "--batch_size=-1": "batch_size is -1; expected at least 1",
    "--batch_size=half": "batch_size is 'half'",
    "--learning_rate=0": "learning_rate is 0.0; expected a finite number above 0",
    "--learning_rate=-1": "learning_rate is -1.0",
    "--learning_rate=nan": "learning_rate is nan",
    "--learning_rate=inf": "learning_rate is inf",
    "--epochs=-1": "epochs is -1",
    "--momentum=1": "momentum is 1.0",
    "--momentum=nan": "momentum is nan",
    "--nesterov": "nesterov=True needs momentum",
    "--weight_decay=-1": "weight_decay is -1.0",
    "--seed=-1": "seed is -1",
    "--num_seeds=0": "num_seeds is 0",
    "--sizes=6,4,3": r"sizes is 6,4,3; expected 5 first.*--sizes=5,4,3",
    "--sizes=5,4,2": r"sizes is 5,4,2; expected 5 first.*3 last.*--sizes=5,4,3",
    "--sizes=5": r"sizes is \(5,\)",
    "--sizes=5,0,3": r"sizes is \(5, 0, 3\)",
    "--sizes=5;3": "sizes is '5;3'",
    "--dataset=cifar": "dataset is 'cifar'",
    "--dataset=mnits": "dataset is 'mnits'; .* Did you mean mnist",
    "--dataset=mnits --stream": "dataset is 'mnits', which .* Did you mean mnist",
    "--dataset=mnist --data_dir=/nowhere": "data_dir is '/nowhere', but there is no such folder",
    "--num_devices=99": "num_devices is 99; expected .*there is 1 device .*JAX_NUM_CPU_DEVICES=99",
    "--dataset=none.npz": "none.npz",
    "--optimizer=addam": "Did you mean adam",
    "--log_to=csv": "log_to names 'csv'",
    "--run_name=a/b": "run_name is 'a/b'",
    "--resume": "expected --run_name",
    "--resume --run_name=absent": "no such run",
}


def test_a_run_that_is_not_there_names_the_one_of_a_similar_name_or_the_latest(tmp_path):
    for k in range(12):
        runs.RunFolder.create(tmp_path, f"run{k}", "").write_config({})
        os.utime(tmp_path / f"run{k}" / "config.json", (k, k))
    with pytest.raises(FileNotFoundError, match=r"no such run. Did you mean run1\?"):
        runs.RunFolder.open(tmp_path, "rum1")
    with pytest.raises(FileNotFoundError, match=r"latest first: run11, run10, .*, run4 and 4 more"):
        runs.RunFolder.open(tmp_path, "zzzz")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optimizer=adam"], 0.01),
        (["--optimizer=adam", "--learning_rate=2"], 2.0),
        (["--optimizer=sgd"], 3.0),
        ([], None),
        (["--optimizer=adam", "--resume"], None),
    ],
)
def test_the_default_of_the_learning_rate_is_that_of_the_optimizer(words, expected):
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["program", *words])
    assert _flags.given_settings().get("learning_rate") == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--epochs=1.5", "--epochs=1.5: expected a whole number"),
        ("--learning_rate=fast", "--learning_rate=fast: expected a number"),
        ("--smoke=3", "--smoke=3: expected true or false"),
        ("--cost=best", "flag --cost=best: value should be one of <quadratic|cross_entropy"),
    ],
)
def test_a_flag_that_cannot_be_parsed_says_what_was_expected(word, message):
    flags.FLAGS.unparse_flags()
    with pytest.raises(flags.Error) as raised:
        flags.FLAGS(["program", word])
    assert _cli.describe_flag_error(raised.value).startswith(message)


class ClosedPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("show", [_cli.print_or_leave, command._show])
def test_a_text_that_nobody_reads_ends_the_program_as_sigpipe_does(monkeypatch, show):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    show("help")
    assert codes == [141]


def test_a_run_whose_output_nobody_reads_ends_quietly_and_can_be_resumed(tmp_path, capsys):
    display = TrainingDisplay(2, TrainingDisplay(2)._console.__class__(file=ClosedPipe()))
    with pytest.raises(BrokenPipeError):
        display.say("nobody reads this")
    arguments = [f"--out_dir={tmp_path}", "--run_name=piped", "--epochs=2"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stdout", ClosedPipe())
        with pytest.raises(BrokenPipeError):
            in_process.call(train, *arguments)
    assert capsys.readouterr().err == ""
    assert in_process.call(train, *arguments, "--resume") == 0


@pytest.mark.slow
@pytest.mark.parametrize("word", ["--help", "--smoke"])
def test_a_closed_pipe_ends_a_program_with_the_code_of_sigpipe(tmp_path, word):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "train", word, f"--out_dir={tmp_path}"],
        cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_report_shows_named_numbers_the_settings_used_and_a_command_to_paste(tmp_path):
    arguments = [f"--out_dir={tmp_path}", "--run_name=mine", "--epochs=1", "--track_noise"]
    assert in_process.call(train, *arguments) == 0
    folder = runs.RunFolder(tmp_path / "mine")
    sections = runs.read_page(folder.report_path).sections
    best = folder.read_summary()["best_test_accuracy"]
    assert f">best test accuracy</th><td>{best:.2%} (epoch " in sections[""]
    assert ">noise scale B at the end</th>" in sections[""]
    assert f">{folder.read_summary()['seconds_in_all']:.1f} in all, " in sections[""]
    assert ">noise examples<" in sections["Settings"]
    for unused in ("chunk mib", "save every", "resume", "None"):
        assert unused not in sections["Settings"]
    assert ">B</th>" in sections["Epochs"]


def test_the_command_of_a_run_is_a_line_for_a_shell():
    path = str(pathlib.Path(train.__file__))
    line = _recorded.pasteable([path, "--run_name=a", "--dataset=my data.npz"])
    assert line == "sgd-jax train --run_name=a '--dataset=my data.npz'"
    assert _recorded.pasteable(["sgd-jax train", "--smoke"]) == "sgd-jax train --smoke"


@pytest.mark.parametrize("bad", BAD_FLAGS)
def test_bad_input_is_one_clear_error_and_leaves_no_folder(tiny, tmp_path, capsys, bad):
    assert main(*command_line(tiny, tmp_path, *bad.split())) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert re.search(BAD_FLAGS[bad], printed.err)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_out_dir_is_named_before_the_data_are_read(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(*command_line("absent.npz", tmp_path / "file" / "runs")) == 2
    assert "out_dir is" in capsys.readouterr().err


def test_resuming_with_other_settings_names_each_with_both_values(tiny, tmp_path, capsys):
    settings = {"dataset": "digits", "learning_rate": 3.0, "cost": "quadratic", "data_dir": None}
    given = {"learning_rate": 0.5, "cost": "cross_entropy", "data_dir": "x", "dataset": "digits"}
    with pytest.raises(ValueError, match="settings differ") as caught:
        _recorded.merge_settings(settings, given, frozenset({"data_dir"}))
    assert "learning_rate is 3.0 there and 0.5 now" in str(caught.value)
    assert "cost is 'quadratic' there and 'cross_entropy' now" in str(caught.value)
    assert "data" not in str(caught.value)
    del given["learning_rate"], given["cost"]
    merged = _recorded.merge_settings(settings, given, frozenset({"data_dir"}))
    assert merged == settings | {"data_dir": "x"}


def test_resuming_on_other_data_is_refused(tiny, tmp_path, capsys):
    copy = tmp_path / "tiny.npz"
    copy.write_bytes(tiny.read_bytes())
    assert main(*command_line(copy, tmp_path, "--epochs=0", "--run_name=mine")) == 0
    arrays = dict(np.load(copy))
    arrays["x_test"][0, 0] += 1
    np.savez(copy, **arrays)
    resume = [f"--out_dir={tmp_path}", "--run_name=mine", "--resume", "--epochs=1"]
    assert main(*resume) == 2
    assert "holds other data than when" in capsys.readouterr().err
    assert main(*resume, "--sizes=5,3", "--batch_size=2") == 2
    errors = capsys.readouterr().err
    assert "sizes is (5, 4, 3) there and (5, 3) now; batch_size is 4 there and 2 now" in errors


def test_inputs_too_large_for_float32_are_refused(tiny):
    dataset = data.load(tiny)
    dataset.test.inputs[0, 0] = 1e39
    with pytest.raises(ValueError, match="--dtype=float64"):
        resolve(Config(), dataset)
    resolve(Config(dtype="float64"), dataset)


def test_faults_of_our_own_keep_their_traceback():
    with pytest.raises(KeyError), _cli.user_errors():
        raise KeyError("bug")


# Command line and display


def test_an_unknown_value_of_a_flag_is_one_line_with_exit_code_2(tmp_path):
    process = start("--cost=hinge", f"--out_dir={tmp_path}")
    output, errors = process.communicate()
    assert (process.returncode, output) == (2, "")
    assert "flag --cost=hinge: value should be one of <quadratic|cross_entropy>" in errors
    assert errors.count("\n") == 1


def test_every_setting_is_a_flag_and_help_shows_it_once_with_its_default():
    names = [holder.name for group in _flags.GROUPS.values() for holder in group]
    of_processes = {holder.name for group in _processes.GROUPS.values() for holder in group}
    settings = dataclasses.fields(Config) + dataclasses.fields(_recorded.Output)
    spelled = [*set(names) - of_processes, "adaptive"]  # the latter as --batch_size=adaptive:RULE
    assert sorted(spelled) == sorted(field.name for field in settings)
    text = _cli.help_text(train.__doc__, _flags.GROUPS)
    for name in names:
        assert text.count(f"\n  --{name}") == 1
    assert "--learning_rate=3.0" in text
    other = _cli.help_text("", _flags.GROUPS, {"learning_rate": 0.5, "sizes": (2, 1)})
    assert "--learning_rate=0.5\n" in other
    assert "--sizes=2,1\n" in other
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_a_bar_and_a_file_plain_lines(is_terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=60, highlight=False)
    with TrainingDisplay(2, console) as display:
        display.show(line(0))
        display.show(line(1))
    text = file.getvalue()
    assert ("1/2" in text) == is_terminal
    assert ("\x1b[" in text) == is_terminal
    assert text.count("validation") == 1
    assert text.count("50.00%") == 6
    if not is_terminal:
        assert len(text.splitlines()) == 3  # no line is broken, however narrow the screen
