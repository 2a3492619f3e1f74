"""Where and with what a run was made: versions, device, source."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "optax", "numpy", "orbax-checkpoint", "sgd_jax")


def describe_environment(source: str | Path) -> dict[str, Any]:
    """Returns what is needed to make a run again, ready for JSON.

    Args:
      source: A file of the program that runs; its git repository is the one described.

    Returns:
      A dict with `command`, `versions` (of Python and of packages), `device` (`platform`, `kind`,
      `count`) and `git` (`commit`, and `dirty`: whether tracked files differ from it; None where
      the source is not tracked by git, as in an installed package).
    """
    devices = jax.devices()
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        "device": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
        },
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
