"""Where JAX computes: --platform, the extras that bring JAX for it, and a fall back to the CPU."""

import os
import pathlib
import subprocess
import sys
import tomllib
from importlib import metadata

import jax
import pytest

from experiments import _cli, _platform, _recorded, runs, train
from experiments._config import Config, load

ROOT = pathlib.Path(train.__file__).parents[1]


@pytest.mark.parametrize("extra", ["cuda12", "cuda13", "tpu"])
def test_an_extra_brings_jax_with_its_own_extra_of_that_name(extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"][extra] == [f"jax[{extra}]>=0.10"]
    assert extra in metadata.metadata("jax").get_all("Provides-Extra")


# --platform


@pytest.fixture(autouse=True)
def _platforms_as_they_were():
    before = jax.config.jax_platforms
    yield
    jax.config.update("jax_platforms", before)


def start(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "experiments.train", "--smoke", "--epochs=0", *arguments],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": ""} | environment,
    )  # fmt: skip


@pytest.mark.slow
def test_the_flag_decides_before_jax_starts_and_the_run_names_the_device(tmp_path):
    done = start("--platform=cpu", f"--out_dir={tmp_path}", "--run_name=r", JAX_PLATFORMS="tpu")
    assert done.returncode == 0, done.stderr
    config = runs.RunFolder.open(tmp_path, "r").read_config()
    assert config["device"] == {"platform": "cpu", "kind": "cpu", "count": 1}
    assert "; on 1 × cpu\n" in done.stdout


def test_an_unknown_platform_is_refused_with_those_there_are():
    done = start("--platform=npu")
    assert done.returncode == 2
    assert "--platform=npu" in done.stderr
    assert "<cpu|gpu|tpu>" in done.stderr


@pytest.mark.parametrize(
    ("platform", "sign"), [("gpu", "an NVIDIA GPU (/dev/nvidia0)"), ("tpu", "a TPU (/dev/accel0)")]
)
def test_a_platform_that_jax_cannot_use_is_refused_with_what_is_there_and_a_remedy(
    monkeypatch, platform, sign
):
    if jax.default_backend() == platform:
        pytest.skip(f"there is a {platform} here")
    monkeypatch.setattr(runs, "find_accelerators", lambda: [sign])
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        _platform.choose(platform)
    message = str(caught.value)
    assert message.startswith(f"platform is {platform!r}, but the best that JAX finds is cpu, alth")
    assert f"seems to have {sign}; expected a {platform.upper()}" in message
    assert "pip install 'sgd_jax[" in message
    assert message.endswith("or leave out --platform")


def test_a_plugin_that_fails_is_quoted(monkeypatch):
    def fail():
        raise RuntimeError("CUDA_ERROR_NO_DEVICE")

    monkeypatch.setattr(jax, "default_backend", fail)
    with pytest.raises(ValueError, match=r"finds is none that works \(CUDA_ERROR_NO_DEVICE\)"):
        _platform.choose("gpu")


def test_without_the_flag_nothing_is_changed():
    jax.config.update("jax_platforms", "cpu,tpu")
    _platform.choose(None)
    assert jax.config.jax_platforms == "cpu,tpu"


def test_every_program_shows_the_flag_in_its_help():
    assert "\nMachine:\n  --platform\n      <cpu|gpu|tpu>: Where JAX" in _cli.help_text("does", {})


# Falling back to the CPU


def test_accelerators_are_told_by_their_device_files(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("experiments.runs.environment.find_spec", lambda name: None)
    assert runs.find_accelerators(tmp_path) == []
    (tmp_path / "dev").mkdir()
    for name in ("nvidia1", "nvidia0", "nvidiactl", "kfd", "accel0", "accel"):
        (tmp_path / "dev" / name).touch()
    assert runs.find_accelerators(tmp_path) == [
        "an NVIDIA GPU (/dev/nvidia0)", "an AMD GPU (/dev/kfd)", "a TPU (/dev/accel0)",
    ]  # fmt: skip


def test_accelerators_are_told_by_the_programs_and_libraries_of_their_makers(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", {"nvidia-smi": "/usr/bin/nvidia-smi"}.get)
    monkeypatch.setattr("experiments.runs.environment.find_spec", {"libtpu": "there"}.get)
    assert runs.find_accelerators(tmp_path) == [
        "an NVIDIA GPU (nvidia-smi is installed)", "a TPU (libtpu is installed)",
    ]  # fmt: skip


def device(found=("an NVIDIA GPU (/dev/nvidia0)",)):
    return runs.describe_environment(__file__, lambda: list(found))["device"]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="needs JAX on the CPU")
def test_an_unused_accelerator_is_in_the_config_only_where_jax_took_the_cpu_unbidden():
    jax.config.update("jax_platforms", None)
    assert device()["unused"] == ["an NVIDIA GPU (/dev/nvidia0)"]
    assert "unused" not in device(found=())
    jax.config.update("jax_platforms", "cpu")  # as --platform=cpu and JAX_PLATFORMS=cpu do
    assert "unused" not in device()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="needs JAX on the CPU")
def test_a_run_on_the_cpu_beside_an_unused_accelerator_says_so(tmp_path, monkeypatch, capsys):
    jax.config.update("jax_platforms", None)
    found = runs.describe_environment(__file__, lambda: ["a TPU (/dev/accel0)"])
    monkeypatch.setattr(runs, "describe_environment", lambda source: found)
    output, config = _recorded.Output(str(tmp_path), "r"), Config(smoke=True)
    folder, notes = _recorded.open_folder(output, {}, load(config), None, train.__file__)
    assert notes[0].endswith("; on 1 × cpu; unused: a TPU (/dev/accel0)")
    assert folder.read_config()["device"]["unused"] == ["a TPU (/dev/accel0)"]
    assert capsys.readouterr().err == (
        "warning: JAX computes on the CPU, although this machine seems to have a TPU "
        "(/dev/accel0). Install a JAX made for it, pip install 'sgd_jax[tpu]', or say "
        "--platform=cpu\n"
    )
