"""Run folders: never another's, whole at any moment, and resumed from what is complete."""

import base64
import concurrent.futures
import contextlib
import gc
import html.parser
import json
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sgd_jax as sj
from experiments import runs
from experiments.runs import folder as folder_module

SPLITS = ("train", "validation", "test")


def record(epoch, accuracy, **changes):
    """Returns a line of metrics in which every accuracy is the same."""
    line = {"epoch": epoch}
    for split in SPLITS:
        line |= {f"cost_{split}": 1 / (1 + epoch), f"accuracy_{split}": accuracy}
    line |= {"gradient_norm": 0.5, "dead_classes_test": 0}
    return line | {"seconds": 0.25, "examples_per_second": 100.0} | changes


def seeds(epoch, accuracies, dead):
    lists = {name: [value] * len(dead) for name, value in record(epoch, 0.5).items()}
    tests = {"accuracy_test": accuracies, "accuracy_validation": accuracies}
    plain = {"epoch": epoch, "seconds": 2.0, "examples_per_second": 1.0}
    return lists | tests | {"dead_classes_test": dead} | plain


# Names


def test_automatic_names_never_meet_even_in_a_race(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: runs.RunFolder.create(tmp_path, None, "a b"), range(16)))
    assert len({folder.path for folder in made}) == 16
    assert all(folder.path.is_dir() for folder in made)
    for folder in made:  # so that the name can be given to --run_name
        runs.check_name(folder.path.name)


def test_a_name_that_exists_is_refused_and_what_it_holds_is_kept(tmp_path):
    runs.RunFolder.create(tmp_path, "mine", "train").write_config({"kept": True})
    with pytest.raises(FileExistsError, match=r"'mine'.*--run_name.*--resume"):
        runs.RunFolder.create(tmp_path, "mine", "train")
    assert runs.RunFolder.open(tmp_path, "mine").read_config() == {"kept": True}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", ".hidden", "a b", "-x", "a\n"])
def test_a_name_that_is_no_plain_folder_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="run_name is"):
        runs.RunFolder.create(tmp_path, name, "train")
    assert list(tmp_path.iterdir()) == []


def test_opening_what_is_not_there_lists_what_is(tmp_path):
    runs.RunFolder.create(tmp_path, "other", "train").write_config({})
    with pytest.raises(FileNotFoundError, match=r"'mine'.*no such run.*other"):
        runs.RunFolder.open(tmp_path, "mine")


def test_an_unwritable_folder_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"out_dir is .*file/runs.*--out_dir"):
        runs.check_writable(tmp_path / "file" / "runs")
    runs.check_writable(tmp_path / "new" / "runs")
    assert list((tmp_path / "new" / "runs").iterdir()) == []


# JSON files


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = runs.RunFolder.create(tmp_path, "mine", "train")
    assert folder.read_summary() is None
    folder.write_summary({"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_summary({"new": float("nan")})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(folder_module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        folder.write_summary({"new": 2})
    assert folder.read_summary() == {"old": 1}
    assert [path.name for path in folder.path.iterdir()] == ["summary.json"]


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path):
    folder = runs.RunFolder.create(tmp_path, "mine", "train")
    assert folder.read_metrics() == []
    lines = [record(epoch, 0.5) for epoch in range(3)]
    for line in lines:
        folder.append_metrics(line)
    assert folder.read_metrics() == lines
    whole = folder.metrics_path.read_bytes()
    folder.metrics_path.write_bytes(whole[:-7])
    assert folder.read_metrics() == lines[:2]


def test_metrics_are_rewound_to_the_line_of_the_checkpoint(tmp_path):
    folder = runs.RunFolder.create(tmp_path, "mine", "train")
    lines = [record(epoch, 0.5) for epoch in range(4)]
    for line in lines[:3]:
        folder.append_metrics(line)
    assert folder.rewind_metrics(lines[3]) is True  # killed between checkpoint and line
    assert folder.read_metrics() == lines
    assert folder.rewind_metrics(lines[1]) is False
    assert folder.read_metrics() == lines[:2]
    with pytest.raises(ValueError, match=r"before 3.*\[0, 1\]"):
        folder.rewind_metrics(lines[3])


def test_metrics_without_a_checkpoint_are_kept_and_named(tmp_path):
    folder = runs.RunFolder.create(tmp_path, "mine", "train")
    folder.metrics_path.write_text('{"epoch": 0')  # torn: killed before the first was written
    assert folder.rewind_metrics(None) is False
    assert folder.metrics_path.read_text() == ""
    folder.append_metrics(record(0, 0.5))
    before = folder.metrics_path.read_bytes()
    with pytest.raises(ValueError, match=r"line for epoch 0, but there is no whole checkpoint"):
        folder.rewind_metrics(None)
    assert folder.metrics_path.read_bytes() == before


# Summary


def test_one_seed_is_summed_up_by_its_own_numbers():
    validation = [0.2, 0.9, 0.9, 0.8]
    lines = [
        record(epoch, test, accuracy_validation=v)
        for epoch, (test, v) in enumerate(zip([0.1, 0.7, 0.8, 0.6], validation, strict=True))
    ]
    summary = runs.summarize(lines)
    spread = summary.pop("spread")
    assert summary == {
        "epochs": 3,
        "best_test_accuracy": 0.8,
        "best_epoch": 2,
        "final_test_accuracy": 0.6,
        "best_validation_epoch": 1,
        "test_accuracy_at_best_validation": 0.7,
        "num_seeds": 1,
        "num_stuck": 0,
        "stuck_seeds": [],
        "seconds": 1.0,
    }
    best = {"median": 0.8, "min": 0.8, "max": 0.8, "per_seed": [0.8]}
    assert spread["best_test_accuracy"] == best


def test_several_seeds_are_summed_up_by_their_spread_and_the_stuck_are_counted():
    lines = [seeds(0, [0.9, 0.1, 0.2], [0, 9, 9]), seeds(1, [0.7, 0.8, 0.5], [0, 0, 3])]
    summary = runs.summarize(lines, first_seed=5)
    assert summary["best_test_accuracy"] == 0.8  # of [0.9, 0.8, 0.5], each at its own best epoch
    assert summary["final_test_accuracy"] == 0.7
    assert summary["best_epoch"] == 1
    assert summary["spread"]["best_test_accuracy"]["per_seed"] == [0.9, 0.8, 0.5]
    final = summary["spread"]["final_test_accuracy"]
    assert (final["min"], final["max"]) == (0.5, 0.8)
    assert (summary["num_seeds"], summary["num_stuck"], summary["stuck_seeds"]) == (3, 1, [7])


# Checkpoints


def make_state(value):
    """Returns a state with arrays of several dtypes and empty places, as optimizers have them."""
    params = (sj.Layer(jnp.full((2, 3), value, jnp.float32), jnp.full(2, value, jnp.float64)),)
    return sj.init_state(params, optax.chain(optax.adam(0.1), sj.sgd(0.1)))


def accuracy(line):
    return line["accuracy_validation"]


def save_all(path, accuracies):
    checkpoints = runs.Checkpoints(path, accuracy, like=make_state(0.0))
    assert checkpoints.latest is None
    for epoch, value in enumerate(accuracies):
        checkpoints.save(make_state(epoch + 1 / 3), record(epoch, value))
    checkpoints.close()


def reopen(path):
    checkpoints = runs.Checkpoints(path, accuracy, like=make_state(0.0))
    checkpoints.close()
    return checkpoints


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, strict=True)


def test_the_last_checkpoint_comes_back_bit_for_bit_with_its_line(tmp_path):
    save_all(tmp_path, [0.1, 0.3, 0.2])
    latest = reopen(tmp_path).latest
    assert latest.epoch == 2
    assert latest.record == record(2, 0.2)
    assert_same_bits(latest.state, make_state(2 + 1 / 3))


def test_the_last_two_and_the_best_are_kept_the_first_among_equals(tmp_path):
    save_all(tmp_path, [0.1, 0.3, 0.3, 0.2, 0.2])
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3", "4"}
    checkpoints = runs.Checkpoints(tmp_path, accuracy, like=make_state(0.0))
    checkpoints.save(make_state(5.0), record(5, 0.25))  # the best is known after reopening
    checkpoints.save(make_state(6.0), record(6, 0.4))
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {"5", "6"}


def lose_marker(checkpoint):
    (checkpoint / "commit_success.txt").unlink()


def lose_everything(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def lose_arrays(checkpoint):
    shutil.rmtree(checkpoint / "state")


def tear_arrays(checkpoint):
    files = [path for path in (checkpoint / "state" / "d").iterdir() if path.is_file()]
    for file in [*files, checkpoint / "state" / "manifest.ocdbt"]:
        file.write_bytes(file.read_bytes()[:10])


def tear_metrics(checkpoint):
    file = checkpoint / "metrics" / "metrics"
    file.write_text(file.read_text()[:10])


def keep_temporary_name(checkpoint):
    checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.orbax-checkpoint-tmp"))


HALF_WRITTEN = [
    lose_marker,
    lose_everything,
    lose_arrays,
    tear_arrays,
    tear_metrics,
    keep_temporary_name,
]


@pytest.mark.parametrize("damage", HALF_WRITTEN)
def test_a_half_written_checkpoint_is_never_picked_up(tmp_path, damage):
    save_all(tmp_path, [0.1, 0.3, 0.2])  # leaves 1, the best, and 2
    damage(tmp_path / "2")
    checkpoints = runs.Checkpoints(tmp_path, accuracy, like=make_state(0.0))
    assert checkpoints.latest.epoch == 1
    assert_same_bits(checkpoints.latest.state, make_state(1 + 1 / 3))
    if damage is keep_temporary_name:
        assert checkpoints.damaged == []
    else:
        first, second = checkpoints.damaged
        assert "checkpoint 2 is incomplete or damaged" in first
        assert "the last whole checkpoint is 1" in second
    checkpoints.save(make_state(2.0), record(2, 0.2))  # its place is free again
    checkpoints.close()
    assert_same_bits(reopen(tmp_path).latest.state, make_state(2.0))


def wider(state):
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]) if leaf.ndim else leaf, state)


MISFITS = {
    "shapes": (wider, r".params.0..biases is float64.2. in .*2 and float64.4. in `like`"),
    "dtypes": (
        lambda state: jax.tree.map(lambda leaf: leaf.astype(jnp.float16), state),
        r".step is int32.. in .*2 and float16.. in `like`",
    ),
    "structure": (
        lambda state: {"state": state},
        r".step is int32.. in .*2 and missing in `like`",
    ),
}


@pytest.mark.parametrize("change", MISFITS)
def test_a_good_checkpoint_of_another_model_is_an_error_and_stays_as_it_is(tmp_path, change):
    save_all(tmp_path, [0.1, 0.3, 0.2])
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    like = MISFITS[change][0](make_state(0.0))
    match = f"2 does not fit `like`: .*{MISFITS[change][1]}; "
    with pytest.raises(ValueError, match=match):
        runs.Checkpoints(tmp_path, accuracy, like=like)
    with pytest.raises(ValueError, match=match):
        runs.read_checkpoint(tmp_path, like)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert reopen(tmp_path).latest.epoch == 2


def test_a_record_may_hold_scalars_of_jax_and_numpy_and_the_path_be_text(tmp_path):
    with runs.Checkpoints(str(tmp_path), accuracy, like=make_state(0.0)) as checkpoints:
        line = record(np.int64(1), jnp.float32(0.5), cost_train=np.arange(3))
        checkpoints.save(make_state(1.0), line)
    assert reopen(tmp_path).latest.record == record(1, 0.5, cost_train=[0, 1, 2])
    assert runs.read_checkpoint(str(tmp_path), make_state(0.0)).epoch == 1
    assert runs.RunFolder.create(str(tmp_path), "new", "train").path == tmp_path / "new"


BAD_SAVES = {
    "no epoch": ({"accuracy_validation": 0.5}, TypeError, r"record\['epoch'\] is None; expected a"),
    "half an epoch": (record(1.5, 0.5), TypeError, r"record\['epoch'\] is 1.5; expected a whole"),
    "what is not JSON": (
        record(2, 0.5, a={1}),
        TypeError,
        r"record\['a'\] is \{1\}; expected what",
    ),
    "an epoch twice": (record(1, 0.5), ValueError, "a checkpoint of epoch 1 already; expected"),
}


@pytest.mark.parametrize("what", BAD_SAVES)
def test_a_save_that_is_refused_names_what_was_expected_and_leaves_nothing(tmp_path, what):
    line, error, message = BAD_SAVES[what]
    with runs.Checkpoints(tmp_path, accuracy, like=make_state(0.0)) as checkpoints:
        checkpoints.save(make_state(1.0), record(1, 0.5))
        with pytest.raises(error, match=message):
            checkpoints.save(make_state(2.0), line)
        with pytest.raises(ValueError, match="state does not fit `like`"):
            checkpoints.save(wider(make_state(2.0)), record(2, 0.5))
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        checkpoints.save(make_state(2.0), record(2, 0.5))
    assert reopen(tmp_path).latest.epoch == 2


def test_a_save_that_fails_or_is_interrupted_can_be_tried_again(tmp_path, monkeypatch):
    with runs.Checkpoints(tmp_path, accuracy, like=make_state(0.0)) as checkpoints:
        manager = checkpoints._manager
        save = manager.save

        def fail(epoch, **options):
            (tmp_path / f"{epoch}.orbax-checkpoint-tmp").mkdir()
            raise KeyboardInterrupt

        monkeypatch.setattr(manager, "save", fail)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(make_state(1.0), record(1, 0.5))
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setattr(manager, "save", save)
        checkpoints.save(make_state(1.0), record(1, 0.5))
    assert_same_bits(reopen(tmp_path).latest.state, make_state(1.0))


def test_a_state_that_does_not_hold_arrays_alone_is_refused_by_the_name_of_the_leaf(tmp_path):
    with pytest.raises(TypeError, match=r"like\['a'\] is 1.0; expected arrays alone"):
        runs.Checkpoints(tmp_path, accuracy, like={"a": 1.0})


@pytest.mark.slow
def test_saving_leaves_no_objects_behind(tmp_path):
    state = make_state(0.0)
    with contextlib.closing(runs.Checkpoints(tmp_path, accuracy, like=state)) as checkpoints:

        def objects_after(epochs):
            for epoch in epochs:
                checkpoints.save(state, record(epoch, 0.5))
            gc.collect()
            return len(gc.get_objects())

        before = objects_after(range(5))
        assert objects_after(range(5, 15)) - before < 150  # 300 as orbax has it


def test_where_no_checkpoint_is_complete_there_is_none(tmp_path):
    save_all(tmp_path, [0.1])
    for _ in range(2):
        lose_marker(tmp_path / "0")
        checkpoints = runs.Checkpoints(tmp_path, accuracy, like=make_state(0.0))
        assert checkpoints.latest is None
        assert "checkpoint 0 is incomplete" in checkpoints.damaged[0]
        checkpoints.save(make_state(0.0), record(0, 0.1))
        checkpoints.close()


# Loggers


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    folder = runs.RunFolder.create(tmp_path, "mine", "train")
    logger = runs.LOGGERS["tensorboard"](folder, {})
    logger.log(record(0, 0.5, examples_per_second=None))
    logger.log(seeds(1, [0.7, 0.8, 0.5], [0, 0, 3]))
    logger.close()
    (path,) = (folder.path / "tensorboard").iterdir()
    assert read_events(path) == pytest.approx(
        {("accuracy_test", 0): 0.5, ("accuracy_test/median", 1): 0.7, ("accuracy_test/max", 1): 0.8}
        | {("accuracy_test/min", 1): 0.5, ("seconds", 0): 0.25, ("seconds", 1): 2.0}
    )


def read_events(path):
    """Returns what an event file says of accuracy_test and seconds, by tag and step."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    return {
        (value.tag, event.step): float(make_ndarray(value.tensor))
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag.startswith(("accuracy_test", "seconds"))
    }


def test_wandb_gets_every_line_under_the_name_of_the_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values["accuracy_test"]))

        def finish(self):
            calls.append("finished")

    def init(**arguments):
        calls.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    folder = runs.RunFolder.create(tmp_path, "mine", "train")
    logger = runs.LOGGERS["wandb"](folder, {"epochs": 2})
    logger.log(record(0, 0.5))
    logger.log(record(1, 0.6))
    logger.close()
    start, *rest = calls
    assert (start["id"], start["config"], start["dir"]) == ("mine", {"epochs": 2}, folder.path)
    assert rest == [(0, 0.5), (1, 0.6), "finished"]


def test_wandb_itself_writes_offline_what_it_is_given(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = runs.RunFolder.create(tmp_path, "mine", "train")
    logger = runs.LOGGERS["wandb"](folder, {"epochs": 1})
    logger.log(record(0, 0.5))
    logger.log(seeds(1, [0.7, 0.8, 0.5], [0, 0, 3]))
    logger.close()
    (path,) = (folder.path / "wandb").glob("offline-run-*-mine/run-mine.wandb")
    written = path.read_bytes()
    assert b"accuracy_test" in written
    assert b"accuracy_test/median" in written


def test_loggers_that_are_unknown_or_missing_are_named(monkeypatch):
    runs.check_loggers(("jsonl", "tensorboard"))
    with pytest.raises(ValueError, match=r"'csv'.*jsonl.*tensorboard, wandb"):
        runs.check_loggers(("jsonl", "csv"))
    for name in runs.LOGGERS:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf"sgd_jax\[{name}\]"):
            runs.check_loggers((name,))


# Environment


def test_the_environment_names_versions_device_and_a_dirty_commit(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    source = tmp_path / "train.py"
    source.write_text("1")
    assert runs.describe_environment(source)["git"] is None
    git("init")
    assert runs.describe_environment(source)["git"] is None  # not tracked
    git("add", "train.py")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert runs.describe_environment(source)["git"] == {"commit": commit, "dirty": False}
    source.write_text("2")
    environment = runs.describe_environment(source)
    assert environment["git"] == {"commit": commit, "dirty": True}
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["versions"]["sgd_jax"] == sj.__version__
    assert environment["device"]["platform"] == jax.devices()[0].platform
    json.dumps(environment)


# Picture and report


def test_the_picture_shows_the_band_of_several_seeds(tmp_path):
    alike = [seeds(0, [0.1] * 2, [0] * 2), seeds(1, [0.5] * 2, [0] * 2)]
    apart = [seeds(0, [0.1] * 2, [0] * 2), seeds(1, [0.2, 0.8], [0] * 2)]  # of the same median
    pictures = []
    for lines in (alike, apart):
        path = tmp_path / "figures" / "curve.png"
        runs.draw_learning_curve(path, lines, "mine with $ and _")
        pictures.append(path.read_bytes())
        assert [child.name for child in path.parent.iterdir()] == ["curve.png"]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] != pictures[1]


@pytest.fixture
def write_report(tmp_path):
    """Returns a function that writes the report of a run called by a name; returns its file."""

    def write(name, title="mine", config=None):
        folder = runs.RunFolder.create(tmp_path, name, "")
        folder.write_config({"experiment": "train"} | (config or {}))
        folder.figure_path.parent.mkdir()
        folder.figure_path.write_bytes(f"\x89PNG of {name}".encode("latin-1"))
        runs.write_report(
            folder.report_path,
            title=title,
            header={"best test accuracy": "90.00%"},
            settings=folder.read_config(),
            records=[record(0, 0.125), seeds(1, [0.7, 0.8, 0.5], [0, 0, 3])],
            figure=folder.figure_path,
        )
        return folder

    return write


def held(picture):
    """Returns a picture as a report holds it."""
    return f"base64,{base64.b64encode(picture.read_bytes()).decode()}"


EVIL = "<script>alert('&')</script>"


def test_the_report_is_one_escaped_file_with_its_picture(write_report):
    folder = write_report("a", title=EVIL, config={EVIL: EVIL, "versions": {"jax": EVIL}})
    text = folder.report_path.read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;") == 5
    assert held(folder.figure_path) in text
    assert "12.50%" in text
    assert "70.00%" in text  # the median
    assert "http" not in text


def test_the_table_of_epochs_shows_noise_scale_and_batch_size_if_they_were_measured():
    plain = record(0, 0.5)
    assert runs.column_labels(plain)[-2:] == ["‖∇C‖", "seconds"]
    noisy = record(0, 0.5, noise_scale=123.456, batch_size=20)
    assert runs.column_labels(noisy)[-3:] == ["B", "m", "seconds"]
    assert runs.format_record(noisy)[-3:] == ["123.5", "20", "0.250"]
    assert runs.format_record(noisy | {"noise_scale": None})[-3] == "–"
    assert runs.format_record(noisy | {"noise_scale": [5.0, None, 7.0]})[-3] == "7"
    assert runs.format_record(noisy | {"noise_scale": [5.0, None, None]})[-3] == "–"


@pytest.mark.parametrize(("num_rows", "is_folded"), [(32, False), (33, True)])
def test_a_long_table_is_folded_and_says_how_long_it_is(num_rows, is_folded):
    table = runs.html_table(["m"], [["1"]] * num_rows)
    assert ("<details><summary>33 rows</summary>" in table) == is_folded
    assert Outline(table).faults == []


class Outline(html.parser.HTMLParser):
    """Tags with their attributes, in order, and what is not closed or closed twice."""

    VOID = frozenset({"meta", "link", "img"})

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.faults = [], [], []
        self.feed(text)
        self.close()
        self.faults += self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open[-1:] == [tag]:
            self.open.pop()
        else:
            self.faults.append(f"/{tag}")

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_a_screen_reader_finds_language_title_headings_headers_and_descriptions(write_report):
    outline = Outline(write_report("a").report_path.read_text(encoding="utf-8"))
    assert outline.faults == []
    assert outline.all("html") == [{"lang": "en"}]
    assert len(outline.all("title")) == len(outline.all("main")) == len(outline.all("h1")) == 1
    assert len(outline.all("h2")) == 3
    assert all(header.get("scope") in ("row", "col") for header in outline.all("th"))
    (picture,) = outline.all("img")
    assert "from epoch 0 to 1" in picture["alt"]
    assert "on the test examples from 12.50% to 70.00%" in picture["alt"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in outline.all(
        "meta"
    )
    wide = [box for box in outline.all("div") if box["class"] == "wide"]
    assert len(wide) == 2
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in wide)


def test_a_report_can_be_read_back_and_written_again_with_the_pictures_as_they_are_now(
    write_report,
):
    folder = write_report("a")
    before = folder.report_path.read_bytes()
    folder.report_path.unlink()
    runs.write_page(folder.report_path, *runs.read_page(folder.report_path))
    assert folder.report_path.read_bytes() == before
    folder.figure_path.write_bytes(b"\x89PNG, drawn anew")
    runs.write_page(folder.report_path, *runs.read_page(folder.report_path))
    assert held(folder.figure_path) in folder.report_path.read_text(encoding="utf-8")


def test_a_moving_picture_is_held_as_what_it_is(tmp_path):
    for name in ("a.gif", "b.png"):
        (tmp_path / name).write_bytes(b"picture")
    both = "".join(runs.html_figure(tmp_path / name, name) for name in ("a.gif", "b.png"))
    runs.write_page(tmp_path / "report.html", "Pictures", {"": both})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/gif;base64,") == text.count("data:image/png;base64,") == 1


def test_reports_of_a_folder_that_was_moved_still_find_their_pictures(write_report, tmp_path):
    folder = write_report("a")
    before = folder.report_path.read_bytes()
    moved = runs.RunFolder(folder.path.rename(tmp_path / "elsewhere"))
    runs.write_page(moved.report_path, *runs.read_page(moved.report_path))
    assert moved.report_path.read_bytes() == before


def test_joined_reports_hold_every_part_under_its_own_title(write_report, tmp_path):
    folders = [write_report("a", title="one"), write_report("b", title=EVIL)]
    path = tmp_path / "joined.html"
    runs.write_joined_page(path, "both", [runs.read_page(f.report_path) for f in folders])
    text = path.read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.faults == []
    assert len(outline.all("h1")) == 1
    assert [heading["id"] for heading in outline.all("h2")] == ["part-1", "part-2"]
    assert [link["href"] for link in outline.all("a")] == ["#part-1", "#part-2"]
    assert len(outline.all("h3")) == 6
    assert all(held(folder.figure_path) in text for folder in folders)
    assert "<script" not in text


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"title": "mine"}', '{"sections": {}}'])
def test_what_is_no_report_is_refused_by_name(write_report, content):
    folder = write_report("a")
    (folder.path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"report\.json is not what a report is made of"):
        runs.read_page(folder.report_path)
