"""Real processes over loopback: the numbers of one, and any number of them to go on with."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import eight_devices
import jax
import joined
import numpy as np
import pytest
import quick
import streamed_together
from test_experiment_train import assert_same_run

from experiments import _recorded, runs, train
from experiments._config import Config
from experiments._within_epoch import Progress
from sgd_jax import data
from sgd_jax.distributed import processes

ROOT = pathlib.Path(train.__file__).parents[1]
PATIENT = "--peer_timeout=3000"  # a test machine may stand still for a while


def run_together(*commands, folders=()):
    """Runs programs at the same time; returns exit code, stdout and stderr of each.

    Each runs in its own folder, if ``folders`` are given.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": "",
        "XLA_FLAGS": quick.FLAGS,
        "PYTHONPATH": str(ROOT),
    }
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for command, folder in zip(commands, folders or [ROOT] * len(commands), strict=True)
    ]  # fmt: skip
    try:
        texts = [process.communicate(timeout=1800) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_program(name, count, out_dir, *arguments):
    """Runs an experiment in so many processes as a user does; returns what each printed."""
    joining = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}", PATIENT]
    common = ["-m", f"experiments.{name}", "--smoke", "--dtype=float64", f"--out_dir={out_dir}"]
    done = run_together(
        *([*common, *arguments, *joining, f"--process_id={k}"] for k in range(count))
    )
    for code, _, errors in done:
        assert code == 0, errors
    return [output for _, output, _ in done]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run begun by two processes and gone on with by four, and their output."""
    out_dir = tmp_path_factory.mktemp("runs")
    name = "--run_name=shared"
    outputs = run_program("train", 2, out_dir, name, "--epochs=1")
    outputs += run_program("train", 4, out_dir, name, "--epochs=2", "--resume")
    return runs.RunFolder(out_dir / "shared"), outputs


@pytest.fixture(scope="module")
def alone():
    """The records of the same run by this process on one device."""
    return train.run(Config(dtype="float64", smoke=True, epochs=2)).records


def assert_same_records(found, expected):
    assert [line["epoch"] for line in found] == [line["epoch"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        for name in other.keys() - {"seconds", "examples_per_second"}:
            if other[name] is None:  # undetermined
                assert line[name] is None, name
            else:
                assert line[name] == pytest.approx(other[name], rel=1e-11, abs=1e-13), name


@pytest.mark.slow
def test_two_processes_and_then_four_train_as_one_does(trained, alone):
    folder, _ = trained
    assert_same_records(folder.read_metrics(), alone)


@pytest.mark.slow
def test_only_the_first_process_writes_and_prints(trained):
    folder, outputs = trained
    is_said = ["run folder:" in output for output in outputs]
    assert is_said == [True, False, True, False, False, False]
    silent = [output for output, said in zip(outputs, is_said, strict=True) if not said]
    assert silent == [""] * 4
    assert "[Gloo]" not in outputs[0]
    assert "on 4 × cpu in 4 processes" in outputs[2]
    assert [path.name for path in folder.path.parent.iterdir()] == ["shared"]
    assert folder.read_summary()["epochs"] == 2


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_is_read_by_one(trained):
    folder, _ = trained
    config = Config(dtype="float64", smoke=True, epochs=3)
    state = {}

    def restore(like):
        state["snapshot"] = runs.read_checkpoint(folder.checkpoints_path, like)
        return Progress(state["snapshot"].state, state["snapshot"].record)

    gone_on = train.run(config, restore=restore).records
    assert state["snapshot"].epoch == 2
    undisturbed = train.run(config).records
    assert_same_records(gone_on, undisturbed[3:])


@pytest.mark.slow
def test_a_process_that_does_not_see_the_folder_of_the_first_says_what_to_share(
    tmp_path, trained, monkeypatch
):
    folder, _ = trained
    _recorded._check_shared(folder)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(
        FileNotFoundError, match=r"elsewhere, which process 1 does not see; .*share"
    ):
        _recorded._check_shared(runs.RunFolder(tmp_path / "elsewhere"))


@pytest.mark.slow
def test_two_processes_measure_noise_as_one_does(tmp_path, trained):
    run_program("noise_scale", 2, tmp_path, "--run_name=noise", "--epochs=1")
    config = Config(dtype="float64", smoke=True, epochs=1, track_noise=True, noise_examples=200)
    found = runs.RunFolder(tmp_path / "noise").read_metrics()
    assert_same_records(found, train.run(config).records)


@pytest.mark.slow
def test_two_processes_compare_gradients_as_one_does(tmp_path, trained):
    folder, _ = trained
    few = ["--schemes=without_replacement,stratified", "--batch_sizes=10,100", "--num_draws=30"]
    common = [f"--run={folder.path}", *few]
    run_program("compare_gradients", 2, tmp_path, "--run_name=two", *common)
    command = ["-m", "experiments.compare_gradients", "--smoke", "--dtype=float64", *common]
    ((code, _, errors),) = run_together([*command, f"--out_dir={tmp_path}", "--run_name=one"])
    assert code == 0, errors
    tables = [np.genfromtxt(tmp_path / name / "table.csv", delimiter=",", names=True,
                            encoding="utf-8", dtype=None) for name in ("one", "two")]  # fmt: skip
    for name in ("predicted", "measured", "mean_cosine", "cosine_5"):
        np.testing.assert_allclose(tables[1][name], tables[0][name], rtol=1e-10)


# Examples that stay on the disk


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """The runs of `streamed_together`, and what is needed to go on with them."""
    folder, out_dir = (tmp_path_factory.mktemp(name) for name in ("data", "runs"))
    eight_devices.write_images(folder)
    port = free_port()
    done = run_together(*([streamed_together.__file__, port, k, folder, out_dir] for k in range(2)))
    for code, _, errors in done:
        assert code == 0, errors
    return folder, out_dir


@pytest.mark.slow
def test_two_processes_stream_as_one_does(streamed, tmp_path):
    folder, out_dir = streamed
    assert streamed_together.run(*streamed_together.arguments(folder, tmp_path)) == 0
    (alone,) = tmp_path.iterdir()
    records = runs.RunFolder(out_dir / "whole").read_metrics()
    assert_same_records(records, runs.RunFolder(alone).read_metrics())
    assert all(line["noise_trace"] > 0 for line in records)


@pytest.mark.slow
def test_two_processes_go_on_within_an_epoch_bit_for_bit(streamed):
    _, out_dir = streamed
    assert_same_run(out_dir / "whole", out_dir / "two")
    assert not (out_dir / "two" / "checkpoints_within_epoch").exists()


@pytest.mark.slow
def test_one_process_goes_on_within_the_epoch_where_two_were_stopped(streamed, monkeypatch):
    _, out_dir = streamed
    started = []

    def prefetched(source, put, first=0):
        started.append((first, len(source)))
        return prefetch(source, put, first)

    prefetch = data.prefetched
    monkeypatch.setattr(data, "prefetched", prefetched)
    assert streamed_together.run(f"--out_dir={out_dir}", "--run_name=stopped", "--resume") == 0
    assert started[0] == (streamed_together.SAVE_EVERY, streamed_together.NUM_CHUNKS)
    whole, gone_on = (runs.RunFolder(out_dir / name) for name in ("whole", "stopped"))
    assert_same_records(gone_on.read_metrics(), whole.read_metrics())


# The library itself


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What `joined` found in each of two processes."""
    folder, port = tmp_path_factory.mktemp("joined"), free_port()
    paths = [folder / f"{k}.npz" for k in range(2)]
    done = run_together(*([joined.__file__, port, k, path] for k, path in enumerate(paths)))
    for code, _, errors in done:
        assert code == 0, errors
    return [dict(np.load(path)) for path in paths]


@pytest.mark.slow
def test_examples_of_which_each_process_has_half_give_the_numbers_of_all(both):
    examples = jax.tree.map(lambda leaf: leaf[: joined.ROWS], eight_devices.problem()[1])
    expected = eight_devices.flat("", joined.answers(None, examples, examples))
    assert len(expected) > 5
    for found in both:
        for name, value in expected.items():
            scale = 1e-12 * np.abs(value).max()
            np.testing.assert_allclose(found[name], value, rtol=0, atol=scale, err_msg=name)


@pytest.mark.slow
def test_the_first_process_tells_the_others_what_it_found_or_why_not(both):
    first, second = (list(found["told"]) for found in both)
    assert first == [
        "{'by': 0, 'text': '∇C'}",
        "IndexError: list index out of range",
        "OtherProcessError: process 1 failed; see its own output",
        "0",
    ]
    assert second == [
        "{'by': 0, 'text': '∇C'}",
        "OtherProcessError: in process 0: list index out of range",
        "ZeroDivisionError: integer division or modulo by zero",
        "1",
    ]


# Processes that were started differently


def refused(*commands, folders=()):
    """Starts programs that belong together; returns what each says, all being refused."""
    joining = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={len(commands)}"]
    done = run_together(
        *(
            [*command, "--smoke", "--epochs=1", *joining, PATIENT, f"--process_id={k}"]
            for k, command in enumerate(commands)
        ),
        folders=folders,
    )
    assert [code for code, _, _ in done] == [2] * len(commands), done
    errors = [
        [line for line in text.splitlines() if line.startswith("error: ")] for _, _, text in done
    ]
    assert all(lines == errors[0] for lines in errors), done
    (line,) = errors[0]
    return line


def test_what_differs_between_processes_is_named_with_values_and_processes():
    same = {"seed": "0", "m": "10"}
    assert processes.describe_differences([same, dict(same), dict(same)]) == ""
    differing = [same | {"m": "20"}, same, same | {"m": "20", "new": "1"}]
    assert processes.describe_differences(differing) == (
        "m is 20 in processes 0, 2 and 10 in process 1; "
        "new is missing in processes 0, 1 and 1 in process 2"
    )
    many = [same] * 9 + [same | {"seed": "1"}]
    assert processes.describe_differences(many) == (
        "seed is 0 in processes 0, 1, 2, 3 and 5 more and 1 in process 9"
    )


@pytest.mark.slow
def test_processes_need_the_same_number_of_devices():
    processes._check_device_counts({0: 2, 1: 2})
    with pytest.raises(ValueError, match="is 2 in process 0 and 1 in process 1"):
        processes._check_device_counts({1: 1, 0: 2})


def test_what_must_be_equal_everywhere_names_versions_and_settings_of_jax():
    facts = processes._environment()
    assert facts["the version of jax"] == jax.__version__
    assert facts["jax_enable_x64"] is True
    assert {"the version of sgd_jax", "the source of sgd_jax (SHA-256)"} <= facts.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("--learning_rate=1", "--learning_rate=2", "learning_rate is 1.0 in process 0 and 2.0 in"),
        ("--seed=0", "--seed=1", "seed is 0 in process 0 and 1 in process 1"),
    ],
)
def test_processes_with_different_settings_all_end_and_say_what_differs(
    first, second, message, tmp_path
):
    common = ["-m", "experiments.train", f"--out_dir={tmp_path}"]
    line = refused([*common, first], [*common, second])
    assert line.startswith("error: the 2 processes were started differently: ")
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_with_different_data_all_end_and_say_so(tmp_path):
    paths = [tmp_path / str(k) / "mine.npz" for k in range(2)]
    for k, path in enumerate(paths):
        path.parent.mkdir()
        x, y = np.arange(40, dtype=np.float32).reshape(20, 2) / 40 + k, np.arange(20) % 2
        np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    common = ["-m", "experiments.train", f"--out_dir={tmp_path / 'runs'}", "--dataset=mine.npz"]
    line = refused(common, common, folders=[path.parent for path in paths])
    assert "the data of mine (SHA-256) is " in line
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.slow
def test_processes_of_different_programs_all_end_and_say_so(tmp_path):
    out_dir = f"--out_dir={tmp_path}"
    line = refused(["-m", "experiments.train", out_dir], ["-m", "experiments.noise_scale", out_dir])
    assert 'the program is "train" in process 0 and "noise_scale" in process 1' in line


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"coordinator": "here:1"}, ValueError, "coordinator given without num_processes and "
         "process_id; give all three, or coordinator=auto alone"),
        ({"num_processes": 2, "process_id": 0}, ValueError, "given without coordinator"),
        ({"coordinator": "auto", "process_id": 0}, ValueError, "auto, which finds process_id too"),
        ({"coordinator": "here", "num_processes": 2, "process_id": 0}, ValueError,
         "coordinator is 'here'; expected host:port of process 0"),
        ({"coordinator": "here:99999", "num_processes": 2, "process_id": 0}, ValueError,
         "expected host:port of process 0"),
        ({"coordinator": "here:1", "num_processes": 0, "process_id": 0}, ValueError,
         "num_processes must be at least 1"),
        ({"coordinator": "here:1", "num_processes": 2, "process_id": 2}, ValueError,
         "process_id is 2; expected 0 to num_processes − 1 = 1"),
        ({"coordinator": "here:1", "num_processes": 2, "process_id": "a"}, TypeError,
         "process_id must be a whole number"),
        ({"coordinator": "here:1", "num_processes": 2, "process_id": 0, "peer_timeout": 0},
         ValueError, "peer_timeout must be at least 1"),
    ],
)  # fmt: skip
def test_processes_that_cannot_be_joined_are_refused_before_anything_is_tried(
    arguments, error, message
):
    with pytest.raises(error, match=re.escape(message)):
        processes.initialize(**arguments)


def test_a_port_that_is_taken_a_host_that_is_not_known_and_no_process_0_are_told_apart(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)  # called, it would raise
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=rf"{address}, but process 0 cannot have port.*another"):
            processes.initialize(address, 2, 0)
    with pytest.raises(TimeoutError, match=f"no process 0 was found at {address} in 1 s.*refused"):
        processes.initialize(address, 2, 1, join_timeout=1)
    for process_id in range(2):
        with pytest.raises(ValueError, match=r"no host 'nowhere\.invalid' is known here"):
            processes.initialize("nowhere.invalid:1234", 2, process_id)


@pytest.mark.slow
def test_who_waits_in_vain_for_the_others_says_so_and_ends():
    script = (
        "import sys; from sgd_jax.distributed import processes; "
        "processes.initialize(f'127.0.0.1:{sys.argv[1]}', 2, 0, join_timeout=1)"
    )
    ((code, _, errors),) = run_together(["-c", script, free_port()])
    assert code == 1
    assert "process 0 of 2 has waited for the others, and not all came in time. Start" in errors


def test_auto_where_nothing_tells_of_processes_says_what_to_give(monkeypatch):
    def find_nothing(**timeouts):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", find_nothing)
    with pytest.raises(ValueError, match="neither SLURM, Kubernetes, MPI nor a TPU pod"):
        processes.initialize(processes.AUTO)


def test_without_arguments_a_process_computes_alone(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)  # called, it would raise
    processes.initialize()
    assert processes.is_first()
    assert processes.from_first(lambda: (1, 2)) == (1, 2)
    assert processes.in_all(lambda: 3) == 3
