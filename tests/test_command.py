"""The command sgd-jax: from the wheel, in an environment of its own, and each of its programs."""

import email
import errno
import importlib
import io
import os
import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

import sgd_jax as sj
from experiments import __main__ as command
from experiments import _cli

ROOT = pathlib.Path(__file__).parent.parent
SHORT = {"compare": "compare_gradients", "noise": "noise_scale"} | {
    name: name for name in ("train", "sweep", "report")
}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Wheel and sdist, as hatchling builds them."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder, "wheel", "sdist")
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return wheel, sdist


def build(source, folder, *targets):
    words = [word for target in targets for word in ("--target", target)]
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--directory", folder, *words],
        cwd=source, check=True, capture_output=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def environment(distributions, tmp_path_factory):
    """A clean environment with the wheel; dependencies are those of this one, this package not."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install",
         "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", distributions[0]],
        check=True,
    )  # fmt: skip
    (site,) = folder.glob("lib/python*/site-packages")
    # A path that a .pth file adds is searched, but its own .pth files, ours among them, are not.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(environment, *words, program="sgd-jax"):
    """Runs a program of the environment in a folder where this repository is not on the path."""
    return subprocess.run(
        [environment / "bin" / program, *words],
        cwd=environment, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": "", "JAX_COMPILATION_CACHE_DIR": ""},
    )  # fmt: skip


@pytest.mark.slow
def test_the_wheel_is_typed_and_small_and_adds_one_name_alone(distributions):
    wheel, _ = distributions
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith("/METADATA")]
        fields = email.message_from_bytes(archive.read(metadata))
    assert "sgd_jax/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"sgd_jax", metadata.split("/")[0]}
    assert fields["Version"] == sj.__version__
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sgd_jax").rglob("*.py")}
    assert sources <= set(names)


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(distributions, tmp_path):
    wheel, sdist = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert {"tests", "docs", "README.md", "LICENSE"} <= {path.name for path in source.iterdir()}
    build(source, tmp_path, "wheel")
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


@pytest.mark.slow
def test_the_installed_command_shows_its_version_help_and_an_unknown_word(environment):
    assert run(environment, "--version").stdout == f"sgd_jax {sj.__version__}\n"
    shown = run(environment, "--help")
    assert shown.returncode == 0
    assert shown.stdout == command.help_text() + "\n"
    wrong = run(environment, "trian")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: 'trian' names no program; expected one of")
    assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_installed_command_trains_and_reports(environment):
    trained = run(environment, "train", "--smoke", "--epochs=1", "--run_name=mine")
    assert trained.returncode == 0, trained.stderr
    folder = environment / "runs" / "mine"
    (folder / "report.html").unlink()
    reported = run(environment, "report", "runs/mine")
    assert reported.stdout == "report: runs/mine/report.html\n", reported.stderr
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_without_the_extra_help_works_and_a_program_says_what_to_install(environment):
    without = (
        "import sys; sys.modules['matplotlib'] = None; import sgd_jax._command as command; "
        "main = command.load_experiments().main"
    )
    shown = run(environment, "-c", f"{without}; main(['--help'])", program="python")
    assert shown.stdout == command.help_text() + "\n"
    refused = run(environment, "-c", f"{without}; sys.exit(main(['train']))", program="python")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: Run folders need orbax-checkpoint, matplotlib")
    assert refused.stderr.rstrip().endswith("Run: pip install 'sgd_jax[experiments]'")


def test_experiments_of_your_own_do_not_get_in_the_way(environment):
    folder = environment / "own"
    (folder / "experiments").mkdir(parents=True)
    (folder / "experiments" / "__init__.py").write_text("")
    (folder / "experiments" / "mine.py").write_text("print('mine')\n")
    for program, words in (("python", ["-m", "experiments.mine"]), ("sgd-jax", ["--version"])):
        done = subprocess.run(
            [environment / "bin" / program, *words],
            cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."},
        )  # fmt: skip
        assert done.stdout in ("mine\n", f"sgd_jax {sj.__version__}\n"), done.stderr


def test_in_a_clone_the_command_finds_the_experiments_beside_the_package():
    source = (
        "import sys; sys.argv = ['sgd-jax', '--help']; from sgd_jax._command import main; "
        "main(); print(sys.modules['experiments'].__path__)"
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{command.help_text()}\n{[str(ROOT / 'experiments')]}\n", done.stderr


def test_help_shows_the_command_that_was_typed(environment):
    shown = run(environment, "train", "--help").stdout
    assert "sgd-jax train" in shown
    assert "python -m" not in shown


def test_help_and_version_need_no_jax():
    source = (
        "import sys; from experiments.__main__ import main; main(['--help']); main(['--version']); "
        "main(['nothing']); print(sorted({'jax', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n")


def test_every_program_asks_a_question_and_has_a_main():
    for name, question in command.programs().items():
        assert question.endswith("?"), name
        module = importlib.import_module(f"experiments.{name}")
        assert callable(module.main)


@pytest.mark.parametrize(("word", "program"), SHORT.items())
def test_the_beginning_of_a_name_is_enough(word, program):
    assert command.find_program(word) == program
    assert command.find_program(program.replace("_", "-")) == program


def test_a_mistyped_program_is_named_and_help_is_a_word(capsys):
    assert command.main(["trian"]) == 2
    assert capsys.readouterr().err.endswith("Did you mean train?\n")
    assert command.main(["help"]) == 0
    assert capsys.readouterr().out == command.help_text() + "\n"
    assert command.main(["help", "trian"]) == 2
    assert capsys.readouterr().err.endswith("Did you mean train?\n")


@pytest.mark.parametrize("word", ["", "_cli", "__main__", "trainer", "../train", "train.py"])
def test_a_word_that_names_no_program_is_refused(word):
    with pytest.raises(ValueError, match="names no program; expected one of"):
        command.find_program(word)


def test_a_word_that_begins_several_names_is_refused(tmp_path, monkeypatch):
    for name in ("sample", "sampling"):
        (tmp_path / f"{name}.py").write_text('"""Which?"""\n')
    monkeypatch.setattr(command, "__file__", str(tmp_path / "__main__.py"))
    with pytest.raises(ValueError, match="'samp' may be sample or sampling; expected one of"):
        command.find_program("samp")
    assert command.find_program("sampl" + "e") == "sample"


def test_a_letter_that_the_output_cannot_encode_is_replaced(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", output)
    _cli.print_what_can_be_printed()
    print("‖∇C‖", flush=True)
    assert output.buffer.getvalue() == b"??C?\n"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError("checkpoint 3 could not be saved"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
    ],
)
def test_a_full_disk_is_told_from_faults_of_ours(error, expected):
    assert _cli.is_of_disk(error) == expected


def test_ctrl_c_while_a_program_is_imported_ends_it_with_one_line():
    source = (
        "import os, signal; from experiments import __main__ as command\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "command.importlib.import_module = lambda name: os.kill(os.getpid(), signal.SIGINT)\n"
        "command.main(['train'])"
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "error: stopped by SIGINT\n")
