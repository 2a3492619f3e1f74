"""The program report: one page of one run, or of several."""

import json

import pytest
from absl import flags

from experiments import report, runs


def line(epoch, accuracy):
    values = {f"accuracy_{split}": accuracy for split in ("train", "validation", "test")}
    costs = {f"cost_{split}": 1 - accuracy for split in ("train", "validation", "test")}
    rest = {"gradient_norm": 0.5, "dead_classes_test": 0, "seconds": 0.1}
    return {"epoch": epoch, **values, **costs, **rest}


@pytest.fixture
def interrupted(tmp_path):
    """A run of train that was killed in its third epoch."""
    folder = runs.RunFolder.create(tmp_path / "runs", "killed", "")
    folder.write_config({"experiment": "train", "seed": 0})
    for epoch, accuracy in enumerate((0.1, 0.6, 0.8)):
        folder.append_metrics(line(epoch, accuracy))
    return folder


@pytest.fixture
def other(tmp_path):
    """A run of another program, which wrote its page itself."""
    folder = runs.RunFolder.create(tmp_path / "runs", "other", "")
    folder.write_config({"experiment": "compare_gradients"})
    runs.write_page(folder.report_path, "Other", {"": "<p>a result</p>"})
    return folder


def test_a_run_of_train_that_was_killed_has_a_report_of_what_it_did(interrupted):
    path = report.run([interrupted.path])
    assert path == interrupted.report_path
    text = path.read_text()
    assert "killed: best test accuracy 80.00%" in text
    assert "not finished" in text
    assert "data:image/png" in text
    assert not interrupted.summary_path.exists()


def test_the_report_of_another_program_is_made_anew(other):
    before = other.report_path.read_bytes()
    other.report_path.unlink()
    assert report.run([other.path]).read_bytes() == before


def test_several_runs_come_on_one_page(interrupted, other, tmp_path):
    output = tmp_path / "new" / "both.html"
    assert report.run([interrupted.path, other.path], output, "Both") == output
    text = output.read_text()
    assert text.index("<h1>Both</h1>") < text.index("80.00%") < text.index("<p>a result</p>")
    report.run([other.path, interrupted.path], output)  # a report may be replaced
    assert "Reports of 2 runs" in output.read_text()
    assert [path.name for path in output.parent.iterdir()] == ["both.html"]


def test_one_run_can_be_written_elsewhere(other, tmp_path):
    output = report.run([other.path], tmp_path / "mine.html")
    assert output.read_bytes() == other.report_path.read_bytes()
    assert not (tmp_path / "mine.json").exists()


def test_a_file_that_is_no_report_is_not_overwritten(other, tmp_path):
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html> by hand")
    with pytest.raises(FileExistsError, match="exists and is no report; expected a new file"):
        report.run([other.path], mine)
    assert mine.read_text() == "<!doctype html> by hand"


def test_what_cannot_be_reported_is_refused(interrupted, other, tmp_path):
    with pytest.raises(ValueError, match="output is not given"):
        report.run([interrupted.path, other.path])
    with pytest.raises(ValueError, match="a page of one run has the title that the run gave"):
        report.run([other.path], title="Mine")
    with pytest.raises(FileNotFoundError, match=r"no such run. Runs in .*: (killed, o|other, k)"):
        report.run([tmp_path / "runs" / "nobody"])
    fresh = runs.RunFolder.create(tmp_path / "runs", "fresh", "")
    fresh.write_config({"experiment": "train"})
    with pytest.raises(FileNotFoundError, match="holds no results yet"):
        report.run([fresh.path])
    (other.path / "report.json").write_text(json.dumps({"title": "x"}))
    with pytest.raises(ValueError, match=r"report\.json is not what a report is made of"):
        report.run([other.path])


@pytest.fixture
def shown(monkeypatch):
    """Returns what a browser was asked to show; there is one."""
    addresses = []
    monkeypatch.setattr(report.webbrowser, "open", lambda url: addresses.append(url) or True)
    return addresses


def start(folders, *arguments):
    """Runs the program in this process; returns its exit code."""
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["report", *arguments])
    return report.main(*map(str, folders))


def test_open_shows_the_page_in_a_browser(other, tmp_path, shown, capsys):
    assert start([other.path], "--noopen") == 0
    assert shown == []
    assert start([other.path], "--open", f"--output={tmp_path}/mine.html") == 0
    assert shown == [(tmp_path / "mine.html").as_uri()]
    assert capsys.readouterr().out.endswith(f"report: {tmp_path}/mine.html\n")


def test_a_user_error_is_one_line_with_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        start([tmp_path / "nobody"], "--noopen", "--output=")
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith("error: run_name is 'nobody', but")
