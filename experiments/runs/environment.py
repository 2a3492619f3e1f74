"""Where and with what a run was made: versions, device, source."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "optax", "numpy", "orbax-checkpoint", "sgd_jax")

_DEVICE_FILES = {
    "an NVIDIA GPU": "dev/nvidia[0-9]*",
    "an AMD GPU": "dev/kfd",
    "a TPU": "dev/accel[0-9]*",
}


def find_accelerators(root: Path = Path("/")) -> list[str]:
    """Returns the accelerators that seem to be there, whether or not JAX can use them.

    Each is named with what it was told by: a device file, or a program or library of its maker.

    Args:
      root: The folder that holds `dev/`.
    """
    found = {}
    for name, pattern in _DEVICE_FILES.items():
        if files := sorted(root.glob(pattern)):
            found[name] = f"/{files[0].relative_to(root)}"
    if shutil.which("nvidia-smi"):
        found.setdefault("an NVIDIA GPU", "nvidia-smi is installed")
    if find_spec("libtpu"):
        found.setdefault("a TPU", "libtpu is installed")
    return [f"{name} ({sign})" for name, sign in found.items()]


def describe_environment(
    source: str | Path, find_accelerators: Callable[[], list[str]] = find_accelerators
) -> dict[str, Any]:
    """Returns what is needed to make a run again, ready for JSON.

    Args:
      source: A file of the program that runs; its git repository is the one described.
      find_accelerators: Asked where JAX fell back to the CPU, that is, took it unbidden.

    Returns:
      A dict with `command`, `versions` (of Python and of packages), `device` (`platform`, `kind`,
      `count`, and, where JAX fell back to the CPU although accelerators seem to be there, `unused`,
      a list of these) and `git` (`commit`, and `dirty`: whether tracked files differ from it; None
      where the source is not tracked by git, as in an installed package).
    """
    devices = jax.devices()
    device: dict[str, Any] = {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
    }
    # JAX's setting holds what the user asked for, by JAX_PLATFORMS or otherwise.
    asked_for = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if device["platform"] == "cpu" and not asked_for and (unused := find_accelerators()):
        device["unused"] = unused
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        "device": device,
        "git": _describe_git(Path(source).resolve()),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _describe_git(source: Path) -> dict[str, Any] | None:
    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(source.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):  # no git here, or a file system that hangs
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", source.name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": changes != ""}
