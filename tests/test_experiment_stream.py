"""Training on examples that stay on the disk: what is trained in memory, and can go on anywhere."""

import dataclasses
import os
import re
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest
from test_experiment_train import assert_same_run, main, start
from test_streams import write_shards

from experiments import _classifier, _recorded, runs, train
from experiments._config import Config, load
from sgd_jax import data

N, M = 23, 2
NUM_CHUNKS = 4
CHUNK_MIB = 3 * M * (6 + 4) / 2**20  # of three mini-batches: six bytes an input, four a label


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    random = np.random.default_rng(0)
    made = {}
    for part, n in (("train", N), ("validation", 9), ("test", 10)):
        labels = np.arange(n) % 3
        pixels = random.integers(0, 200, (n, 2, 3), np.uint8)
        made[f"x_{part}"], made[f"y_{part}"] = pixels, labels
    return write_shards(tmp_path_factory.mktemp("data") / "mine", made)


@pytest.fixture
def config(folder):
    return Config(
        dataset=str(folder),
        stream=True,
        chunk_mib=CHUNK_MIB,
        sizes=(6, 4, 3),
        batch_size=M,
        learning_rate=0.5,
        epochs=2,
        seed=7,
        dtype="float64",
    )


def command_line(folder, out_dir, *more):
    return [
        f"--dataset={folder}",
        f"--out_dir={out_dir}",
        "--sizes=6,4,3",
        f"--batch_size={M}",
        "--learning_rate=0.5",
        "--stream",
        f"--chunk_mib={CHUNK_MIB}",
        "--epochs=2",
        *more,
    ]


def order_of(epoch, seed=7):
    """Returns the mini-batches of an epoch, as in memory: (steps, m)."""
    order = data.index_shuffle(np.arange(N), N, (seed, epoch))
    return np.append(order, np.full(-N % M, -1)).reshape(-1, M).astype(np.int32)


# --- The same as in memory ----------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_trained_and_measured_is_that_in_memory_on_the_same_mini_batches(
    config, monkeypatch
):
    monkeypatch.setattr(_classifier, "CHUNK_SIZE", 4)  # so that a part is measured block by block
    config = dataclasses.replace(config, track_noise=True, noise_examples=6)
    orders = np.stack([order_of(epoch) for epoch in range(config.epochs + 1)])

    def draw(key, number, n, batch_size):
        return jax.numpy.asarray(orders)[number]

    streamed = train.run(config)
    monkeypatch.setattr(_classifier, "draw_reshuffled", draw)
    in_memory = train.run(dataclasses.replace(config, stream=False))
    assert [line["epoch"] for line in streamed.records] == [0, 1, 2]
    for line, expected in zip(streamed.records, in_memory.records, strict=True):
        assert line.keys() == expected.keys()
        for name in line.keys() - {"seconds", "examples_per_second"}:
            if expected[name] is None:
                assert line[name] is None
            else:
                assert line[name] == pytest.approx(expected[name], rel=1e-9)
    for leaf, expected in zip(
        jax.tree.leaves(streamed.state), jax.tree.leaves(in_memory.state), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, rtol=1e-11, atol=1e-13)
    assert streamed.state.step.tolist() == [2 * len(orders[0])]


@pytest.mark.slow
def test_seeds_that_are_streamed_together_do_what_each_does_alone(config):
    together = train.run(dataclasses.replace(config, num_seeds=2, epochs=1))
    alone = train.run(dataclasses.replace(config, seed=8, epochs=1))
    for name in ("cost_train", "gradient_norm", "accuracy_test"):
        values = [line[name] for line in alone.records]
        assert [line[name][1] for line in together.records] == pytest.approx(values, rel=1e-9)


def test_data_on_the_disk_are_known_by_the_digest_they_have_in_memory(config):
    streamed, in_memory = load(config), load(dataclasses.replace(config, stream=False))
    assert isinstance(streamed.train.inputs, data.Rows)
    assert _recorded.digest_of(streamed) == _recorded.digest_of(in_memory)


# --- Going on within an epoch -------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("runs")
    assert main(*command_line(folder, out_dir, "--run_name=whole", "--seed=7")) == 0
    return out_dir / "whole"


@pytest.mark.slow
@pytest.mark.parametrize(("save_every", "stop", "goes_on"), [(2, 3, 2)])
def test_a_run_stopped_within_an_epoch_goes_on_there_bit_for_bit(
    folder, whole, tmp_path, monkeypatch, capsys, save_every, stop, goes_on
):
    saved = _recorded.PartCheckpoints.save
    started = []

    def stop_in_epoch_2(self, progress):
        saved(self, progress)
        if (progress.record["epoch"], progress.num_parts) == (1, stop):
            raise KeyboardInterrupt

    def prefetched(source, put, first=0):
        if isinstance(source[0][0], data.Chunk):
            started.append((first, len(source)))
        return prefetch(source, put, first)

    prefetch = data.prefetched
    monkeypatch.setattr(data, "prefetched", prefetched)
    monkeypatch.setattr(_recorded.PartCheckpoints, "save", stop_in_epoch_2)
    arguments = [*command_line(folder, tmp_path, "--seed=7"), f"--save_every={save_every}"]
    assert main(*arguments, "--run_name=parts") == 130
    monkeypatch.setattr(_recorded.PartCheckpoints, "save", saved)
    run = tmp_path / "parts"
    assert (run / "checkpoints_within_epoch").is_dir() == (save_every > 0)
    assert main(f"--out_dir={tmp_path}", "--run_name=parts", "--resume") == 0
    assert started == [(0, NUM_CHUNKS), (0, NUM_CHUNKS), (goes_on, NUM_CHUNKS)]
    assert_same_run(whole, run)
    assert not (run / "checkpoints_within_epoch").exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_within_an_epoch_is_not_used(folder, whole, tmp_path, capsys):
    """Everything but the states is as after the second epoch: only the damage keeps them out."""
    arguments = command_line(folder, tmp_path, "--seed=7", "--run_name=mine")
    assert main(*arguments, "--epochs=1") == 0
    torn = tmp_path / "mine" / "checkpoints_within_epoch" / "13"
    (torn / "state").mkdir(parents=True)
    (torn / "state" / "manifest.ocdbt").write_bytes(b"half")
    resume = [f"--out_dir={tmp_path}", "--run_name=mine", "--resume", "--epochs=2"]
    assert main(*resume) == 0
    assert "warning: checkpoint 13 is incomplete" in capsys.readouterr().out
    assert_same_run(whole, tmp_path / "mine")


@pytest.mark.slow
def test_a_run_killed_within_an_epoch_goes_on_bit_for_bit(folder, whole, tmp_path):
    arguments = command_line(folder, tmp_path, "--seed=7", "--run_name=killed", "--save_every=1")
    process = start(*arguments)
    run = tmp_path / "killed"
    within = run / "checkpoints_within_epoch"
    while not (within.is_dir() and any(child.name.isdecimal() for child in within.iterdir())):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(runs.RunFolder(run).read_metrics()) < 3
    assert main(f"--out_dir={tmp_path}", "--run_name=killed", "--resume") == 0
    assert_same_run(whole, run)


# --- What can go wrong --------------------------------------------------------------------------


def test_a_divergence_in_a_later_chunk_names_its_step_in_the_epoch():
    costs = np.ones((1, 6))
    costs[0, 4] = np.nan
    part = _classifier.Part(None, costs, range(6, 12), 12)
    with pytest.raises(_recorded.DivergenceError, match="epoch 2, step 11 of 12"):
        train._check_costs(costs, 2, Config(), 60, part)


BAD_FLAGS = {
    "--dataset=digits": "which cannot be streamed; expected mnist",
    "--dataset=mine.npz": r"which cannot be streamed; .*np.save",
    "--batch_size=full": "batch_size is full, which needs all examples at once",
    "--batch_size=9": r"a mini-batch of 9 examples .* 90 bytes .* at most 60; .*chunks larger",
    "--chunk_mib=0": "chunk_mib is 0.0; expected a finite number above 0",
    "--save_every=-1": "save_every is -1",
    "--track_noise": "noise_examples is 1000; expected fewer than the 23",
}


@pytest.mark.parametrize("bad", BAD_FLAGS)
def test_bad_input_is_one_clear_error_and_leaves_no_folder(folder, tmp_path, capsys, bad):
    assert main(*command_line(folder, tmp_path), bad) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert re.search(BAD_FLAGS[bad], printed.err)
    assert list(tmp_path.iterdir()) == []


def test_without_grain_streaming_says_what_to_install(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "grain", None)
    assert main(*command_line(folder, tmp_path)) == 2
    assert "pip install 'sgd_jax[experiments]'" in capsys.readouterr().err


# --- Data that change while they are trained on ---------------------------------------------------


@pytest.mark.slow
def test_a_data_file_that_shrinks_names_the_sizes_and_the_last_checkpoint(
    folder, tmp_path, monkeypatch, capsys
):
    copied = shutil.copytree(folder, tmp_path / "mine")
    file = copied / "x_train-2.npy"
    size = file.stat().st_size
    append_metrics = runs.RunFolder.append_metrics

    def shrink_after_epoch_1(self, record):
        append_metrics(self, record)
        if record["epoch"] == 1:
            os.truncate(file, size - 10)

    monkeypatch.setattr(runs.RunFolder, "append_metrics", shrink_after_epoch_1)
    arguments = command_line(copied, tmp_path / "runs", "--run_name=shrunk")
    assert main(*arguments, "--epochs=9") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(
        rf"x_train-2\.npy has changed .*expected {size} bytes .*, found {size - 10} bytes .*"
        r"The last checkpoint is of epoch 1, in .*shrunk.checkpoints\. Put the file back, then "
        r"continue with --resume --run_name=shrunk",
        line,
    )


def test_memory_that_runs_out_while_data_are_loaded_is_a_sentence(
    folder, tmp_path, monkeypatch, capsys
):
    def take(self, indices):
        raise MemoryError("Unable to allocate 192. MiB")

    monkeypatch.setattr(data.Rows, "take", take)
    assert main(*command_line(folder, tmp_path, "--run_name=large")) == 1
    error = capsys.readouterr().err
    assert "error: out of memory (Unable to allocate 192. MiB). Use fewer examples" in error
    assert "a smaller --chunk_mib" in error
    assert "continue with --resume --run_name=large" in error
    assert "Traceback" not in error
