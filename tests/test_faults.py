"""Faults, one by one: a run that is killed, stopped, doubled, or out of room loses nothing."""

import collections
import contextlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags

import sgd_jax as sj
from experiments import _recorded, _signals, runs, train
from experiments._config import Config
from scripts.robustness import faults
from sgd_jax import data

# Programs are started by a fork of one process that has imported them, which takes a fifth of the
# time; all else, signals and exit codes, is as a shell would have it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["experiments.train", "sklearn.datasets"])
PARTS = ("train", "validation", "test")
SETTINGS = ["--sizes=64,8,10", "--batch_size=100", "--momentum=0.5"]


def child(arguments, log, cache, limit):
    """Is the program, in a process of its own."""
    from absl import flags

    from experiments import _cli, _flags

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background ignores it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    flags.FLAGS.unparse_flags()
    sys.argv = ["train", *arguments]
    _cli.start(train.main, "", _flags.GROUPS)


class Program:
    """`experiments.train` in a process of its own, as `subprocess.Popen` would have it."""

    def __init__(self, folder, *arguments, limit=0):
        self.log = folder / f"log{len(list(folder.glob('log*')))}"
        cache = str(folder / "compiled")
        given = ([f"--out_dir={folder / 'runs'}", *arguments], self.log, cache, limit)
        self.process = FORKS.Process(target=child, args=given)
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def send(self, number):
        os.kill(self.process.pid, number)

    def wait(self):
        self.process.join(300)
        return self.process.exitcode

    def printed(self):
        return self.log.read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Returns a folder whose programs share what they compiled, with an undisturbed run of 60."""
    folder = tmp_path_factory.mktemp("faults")
    program = Program(folder, *SETTINGS, "--run_name=undisturbed", "--epochs=60")
    assert program.wait() == 0, program.printed()
    return folder


def wait_for(condition, program):
    while not condition():
        assert program.poll() is None, program.printed()
        time.sleep(0.002)


# Killed


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_as_if_undisturbed(place):
    def start(resume):
        how = ["--resume"] if resume else [*SETTINGS, "--epochs=60"]
        return Program(place, "--run_name=killed", *how)

    path = place / "runs" / "killed"
    struck = faults.kill_again_and_again(start, path, num_kills=20, seed=0, longest=0.03)
    print(collections.Counter(struck))
    assert len(struck) == 20
    assert faults.last_state(path)[0] == 60
    assert faults.last_state(path) == faults.last_state(place / "runs" / "undisturbed")
    assert faults.metrics(path) == faults.metrics(place / "runs" / "undisturbed")
    assert runs.RunFolder(path).read_summary()["status"] == "complete"


def start_pair(place, *arguments):
    """Starts two processes that train as one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    joined = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--peer_timeout=600"]
    return [Program(place, *arguments, *joined, f"--process_id={k}") for k in range(2)]


@pytest.mark.slow
def test_two_processes_stopped_and_then_one_of_them_killed_say_so_and_the_run_goes_on(place):
    folder = runs.RunFolder(place / "runs" / "pair")
    pair = start_pair(place, *SETTINGS, "--run_name=pair", "--epochs=100000")
    wait_for(lambda: faults.num_lines(folder) > 3, pair[0])
    for program in pair:
        program.send(signal.SIGTERM)
    assert pair[0].wait() == 143, pair[0].printed()
    assert pair[1].wait() in (143, 1), pair[1].printed()  # stopped, or told by the other's end
    assert "error: stopped by SIGTERM; every epoch" in pair[0].printed()
    assert folder.read_summary()["status"] == "interrupted"
    done = faults.num_lines(folder)
    first, second = start_pair(place, "--run_name=pair", "--resume")
    wait_for(lambda: faults.num_lines(folder) > done + 1, first)
    second.kill()
    assert first.wait() == 1, first.printed()
    assert "error: process 0 has lost another process of its run" in first.printed()
    epochs = f"--epochs={faults.num_lines(folder) + 1}"
    for arguments in (["--run_name=pair", "--resume"], ["--run_name=pair_undisturbed", *SETTINGS]):
        for program in start_pair(place, *arguments, epochs):
            assert program.wait() == 0, program.printed()
    assert faults.metrics(folder.path) == faults.metrics(place / "runs" / "pair_undisturbed")


# Stopped


@pytest.mark.slow
def test_sigterm_and_sigint_leave_with_143_and_130_and_the_run_goes_on(place):
    folder = runs.RunFolder(place / "runs" / "stopped")
    first = Program(place, *SETTINGS, "--run_name=stopped", "--epochs=60")
    for number, code, resumed in ((signal.SIGTERM, 143, False), (signal.SIGINT, 130, True)):
        before = faults.num_lines(folder)
        program = Program(place, "--run_name=stopped", "--resume") if resumed else first
        wait_for(lambda before=before: faults.num_lines(folder) > before + 2, program)
        program.send(number)
        assert program.wait() == code, program.printed()
        message = f"stopped by {number.name}; every epoch that was finished is saved: continue with"
        assert f"error: {message} --resume --run_name=stopped" in program.printed()
        assert folder.read_summary()["status"] == "interrupted"
        assert folder.read_summary()["epochs"] == faults.num_lines(folder) - 1
        assert faults.last_state(folder.path)[0] == faults.num_lines(folder) - 1
    last = Program(place, "--run_name=stopped", "--resume")
    assert last.wait() == 0, last.printed()
    assert faults.last_state(folder.path) == faults.last_state(place / "runs" / "undisturbed")
    assert faults.metrics(folder.path) == faults.metrics(place / "runs" / "undisturbed")


@pytest.fixture(scope="module")
def long_epochs(place):
    """Starts a run whose epochs take minutes, and waits until one is under way."""
    random = np.random.default_rng(0)
    arrays = {f"x_{part}": random.integers(0, 256, (9, 2), np.uint8) for part in ("train", "test")}
    arrays |= {f"y_{part}": np.arange(9, dtype=np.int32) % 2 for part in ("train", "test")}
    many = {name: np.tile(arrays[name], (1_000_000, 1)[: arrays[name].ndim]) for name in arrays}
    np.savez(place / "many.npz", **(arrays | {n: many[n] for n in ("x_train", "y_train")}))
    settings = ["--sizes=2,3,2", "--batch_size=1", f"--dataset={place / 'many.npz'}"]
    program = Program(place, *settings, "--run_name=long", "--epochs=3")
    folder = runs.RunFolder(place / "runs" / "long")
    wait_for(lambda: faults.num_lines(folder) == 1, program)
    yield program, folder
    program.kill()
    program.wait()


@pytest.mark.slow
def test_a_second_process_on_a_folder_is_refused_and_the_first_named(place, long_epochs):
    program, folder = long_epochs
    second = Program(place, "--run_name=long", "--resume")
    assert second.wait() == 2
    owner = f"is in use by process {program.process.pid} on {socket.gethostname()}, since"
    assert owner in second.printed()
    assert second.printed().count("\n") == 1
    third = Program(place, "--run_name=long")
    assert third.wait() == 2
    assert "exists and is never overwritten" in third.printed()
    with pytest.raises(BlockingIOError, match="is in use by process"):
        folder.lock.acquire()
    assert program.poll() is None


@pytest.mark.slow
def test_a_signal_in_the_middle_of_an_epoch_does_not_wait_for_its_end(place, long_epochs):
    program, folder = long_epochs
    program.send(signal.SIGTERM)
    assert program.wait() == 143, program.printed()
    assert faults.num_lines(folder) == 1
    assert faults.last_state(folder.path)[0] == 0
    assert folder.read_summary()["status"] == "interrupted"
    both = [Program(place, "--run_name=long", "--resume") for _ in range(2)]
    while all(one.poll() is None for one in both):
        time.sleep(0.01)
    refused, other = sorted(both, key=lambda one: one.poll() is None)
    assert refused.poll() == 2, refused.printed()
    assert "is in use by" in refused.printed() or "has gone on with" in refused.printed()
    assert other.poll() is None
    other.kill()
    other.wait()
    folder.lock.acquire()  # that of a killed process is free
    folder.lock.release()


def in_the_midst(log, shielded):
    """Is a program that is saving, or in a computation that no signal interrupts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background ignores it
    _signals.install()
    with contextlib.suppress(KeyboardInterrupt), _signals.shielded():
        log.write_text("begun")
        if shielded:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            log.write_text("saved")
        else:
            forever = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 1, lambda x: x * 0.5, x))
            jax.block_until_ready(forever(0.0))
        return
    log.write_text(log.read_text() + " and stopped")


@pytest.mark.slow
def test_a_signal_waits_for_what_is_being_saved_and_a_second_one_for_nothing(tmp_path):
    saving = FORKS.Process(target=in_the_midst, args=(tmp_path / "saving", True))
    hung = FORKS.Process(target=in_the_midst, args=(tmp_path / "hung", False))
    saving.start()
    hung.start()
    saving.join()
    assert (tmp_path / "saving").read_text() == "saved and stopped"
    while not (tmp_path / "hung").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(hung.pid, signal.SIGTERM)
    hung.join(0.5)
    assert hung.exitcode is None
    os.kill(hung.pid, signal.SIGTERM)
    hung.join()
    assert hung.exitcode == 143


class Swallower:
    """Takes a signal where Python swallows what its handler raises."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass


def swallowing(log):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _signals.install()
    try:
        Swallower()
        log.write_text("swallowed")
        time.sleep(30)
    except KeyboardInterrupt:
        with _signals.shielded():
            log.write_text(log.read_text() + ", then stopped")
        log.write_text(log.read_text() + " once")


@pytest.mark.slow
def test_a_signal_that_python_swallows_stops_the_program_all_the_same_and_once(tmp_path):
    process = FORKS.Process(target=swallowing, args=(tmp_path / "log",))
    process.start()
    process.join()
    assert (tmp_path / "log").read_text() == "swallowed, then stopped once"


# No room


@pytest.fixture
def small_disk(place):
    """Returns a file system of its own, and what changes its size."""
    path = place / "runs" / "small"
    path.mkdir(parents=True)

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", *options, "tmpfs", str(path)]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    made = mount("size=300k")
    if made.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield path, lambda size: mount(f"remount,size={size}")
    subprocess.run(["umount", str(path)], check=True)


BIGGER = ["--sizes=64,100,10", "--batch_size=100", "--epochs=4"]


@pytest.mark.slow
def test_a_full_disk_is_an_error_the_last_checkpoint_is_intact_and_the_run_goes_on(
    place, small_disk
):
    disk, resize = small_disk
    full = Program(place, *BIGGER, f"--out_dir={disk}", "--run_name=full")
    assert full.wait() == 1, full.printed()
    folder = runs.RunFolder(disk / "full")
    done = faults.num_lines(folder) - 1
    assert 0 <= done < 4
    (error,) = [line for line in full.printed().splitlines() if line.startswith("error: ")]
    if faults.last_state(folder.path)[0] == done:
        assert f"checkpoint {done + 1} could not be saved in" in error
        assert "No space left on device. Those before it are as they were" in error
    else:  # the disk was full just after it
        assert faults.last_state(folder.path)[0] == done + 1
        assert f"checkpoint {done + 1} is whole, but the digests" in error
        assert "No space left on device" in error
    assert "continue with --resume --run_name=full" in error
    assert "Traceback" not in full.printed()
    resize("20m")
    resumed = Program(place, f"--out_dir={disk}", "--run_name=full", "--resume")
    assert resumed.wait() == 0, resumed.printed()
    whole = Program(place, *BIGGER, "--run_name=whole")
    assert whole.wait() == 0, whole.printed()
    assert faults.last_state(folder.path) == faults.last_state(place / "runs" / "whole")
    assert faults.metrics(folder.path) == faults.metrics(place / "runs" / "whole")


@pytest.mark.slow
def test_a_file_that_may_not_grow_is_an_error_and_the_run_goes_on(place):
    limited = Program(place, *SETTINGS, "--epochs=60", "--run_name=limited", limit=10_000)
    assert limited.wait() == 1, limited.printed()
    assert "File too large. When there is room again, continue with --resume" in limited.printed()
    assert "Traceback" not in limited.printed()
    path = place / "runs" / "limited"
    assert 5 < faults.num_lines(runs.RunFolder(path)) < 60
    resumed = Program(place, "--run_name=limited", "--resume")
    assert resumed.wait() == 0, resumed.printed()
    assert faults.last_state(path) == faults.last_state(place / "runs" / "undisturbed")
    assert faults.metrics(path) == faults.metrics(place / "runs" / "undisturbed")


# Flipped bytes


def accuracy(line):
    return line["accuracy"]


def make_state(seed):
    params = {"w": jax.random.normal(jax.random.key(seed), (40, 30)), "b": jnp.zeros(3)}
    return sj.init_state(params, sj.sgd(0.1, momentum=0.5))


@pytest.fixture
def three_epochs(tmp_path):
    """Returns a folder with the checkpoints of epochs 1 and 2; that of epoch 0 is gone."""
    checkpoints = runs.Checkpoints(tmp_path / "checkpoints", accuracy, like=make_state(0))
    for epoch in range(3):
        checkpoints.save(make_state(epoch), {"epoch": epoch, "accuracy": epoch / 4})
    checkpoints.close()
    return tmp_path / "checkpoints"


def test_no_flipped_byte_of_a_checkpoint_goes_unseen(three_epochs):
    last, count = three_epochs / "2", 0
    assert_last_is(runs.read_checkpoint(three_epochs, make_state(0)), 2)
    for file in (path for path in sorted(last.rglob("*")) if path.is_file()):
        whole = file.read_bytes()
        for position in {*range(0, len(whole), 101), *range(min(8, len(whole))), len(whole) - 1}:
            flipped = bytearray(whole)
            if not flipped:
                continue
            flipped[position] ^= 1 << position % 8
            file.write_bytes(flipped)
            with pytest.raises(ValueError, match=r"2 is damaged.*continues from that of epoch 1"):
                runs.read_checkpoint(three_epochs, make_state(0))
            count += 1
        file.write_bytes(whole)
    assert count > 200
    assert_last_is(runs.read_checkpoint(three_epochs, make_state(0)), 2)


def assert_last_is(snapshot, epoch):
    assert snapshot.epoch == epoch
    for found, saved in zip(
        jax.tree.leaves(snapshot.state), jax.tree.leaves(make_state(epoch)), strict=True
    ):
        np.testing.assert_array_equal(found, saved, strict=True)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_offered(three_epochs):
    (big, *_) = sorted((three_epochs / "2" / "state").rglob("d/*"), key=lambda f: -f.stat().st_size)
    data_ = bytearray(big.read_bytes())
    data_[len(data_) // 2] ^= 1  # in the midst of compressed numbers
    big.write_bytes(data_)
    opened = runs.Checkpoints(three_epochs, accuracy, like=make_state(0))
    opened.close()
    assert_last_is(opened.latest, 1)
    first, second = opened.damaged
    assert f"{big.name} has not the SHA-256" in first
    assert "damaged-2" in first
    assert second == "the last whole checkpoint is 1"
    assert (three_epochs / "damaged-2").is_dir()


def test_a_checkpoint_that_was_killed_before_its_digests_is_still_good(three_epochs):
    (three_epochs / "2" / "sha256.json").unlink()
    assert_last_is(runs.read_checkpoint(three_epochs, make_state(0)), 2)


# NaN


def poisoned(steps):
    """Returns SGD whose update of step ``steps[seed]``, counted from 0, is NaN."""
    first_weights = {
        seed: sj.init_network(jax.random.split(jax.random.key(seed))[0], (64, 5, 10), "scaled")[0]
        for seed in steps
    }

    def init(params):
        matches = [jnp.allclose(params[0].weights, w.weights) for w in first_weights.values()]
        return jnp.sum(jnp.where(jnp.array(matches), jnp.array(list(steps.values())), 0)), 0

    def update(grads, state, params=None):
        when, step = state
        scale = jnp.where(step == when, jnp.nan, -0.1).astype(jnp.float32)
        return jax.tree.map(lambda g: scale * g, grads), (when, step + 1)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(
    ("step", "where"),
    [
        (3, r"the cost became nan at epoch 1, step 5 of 6 \(seed 8\)"),
        pytest.param(
            7, r"the cost became nan at epoch 2, step 3 of 6 \(seed 8\)", marks=pytest.mark.slow
        ),
        pytest.param(  # the last step of the epoch
            5, r"cost_train is nan at the end of epoch 1 \(seed 8\)", marks=pytest.mark.slow
        ),
    ],
)
def test_nan_from_step_k_stops_at_k_and_names_it_and_the_first_seed(monkeypatch, step, where):
    """A NaN update shows in the cost of the next mini-batch, or else at the end of the epoch."""
    steps = {7: 1000, 8: step, 9: step + 1}
    monkeypatch.setattr(train, "make_optimizer", lambda config, num_examples: poisoned(steps))
    digits = data.load("digits")
    few = {part: data.Examples(*(x[:23] for x in getattr(digits, part))) for part in PARTS}
    config = Config(sizes=(64, 5, 10), batch_size=4, num_seeds=3, seed=7, epochs=3)
    kept = []
    with pytest.raises(_recorded.DivergenceError, match=where):
        train.run(config, digits._replace(**few), on_epoch=lambda s, line: kept.append(line))
    assert [line["epoch"] for line in kept] == list(range(1 + step // 6))


# What lies in a run folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def garble(path):
    path.write_bytes(path.read_bytes().replace(b": ", b";", 1))


def blind(path):
    path.write_bytes(
        path.read_bytes().replace(b'"accuracy_test": ', b'"accuracy_test": "x", "a": ')
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", cut, r"config.json is damaged: .*; expected a JSON object"),
        ("config.json", garble, r"config.json is damaged: .*; expected a JSON object"),
        ("summary.json", cut, r"summary.json is damaged: .*; expected a JSON object"),
        ("metrics.jsonl", garble, r"metrics.jsonl, line 1, is damaged: .*; expected a JSON object"),
        ("metrics.jsonl", blind, r"line 1, is damaged \(TypeError: accuracy_test is 'x'\)"),
    ],
)
def test_a_damaged_file_of_a_run_is_named_when_it_is_resumed(
    place, tmp_path, capsys, name, damage, message
):
    shutil.copytree(place / "runs" / "undisturbed", tmp_path / "copy")
    damage(tmp_path / "copy" / name)
    before = (tmp_path / "copy" / name).read_bytes()
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["train", f"--out_dir={tmp_path}", "--run_name=copy", "--resume", "--epochs=61"])
    with pytest.raises(SystemExit) as leaving:
        train.main()
    assert leaving.value.code == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed)
    assert printed.count("\n") == 1
    assert (tmp_path / "copy" / name).read_bytes() == before
