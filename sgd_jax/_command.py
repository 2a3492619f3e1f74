"""The command sgd-jax: finds the experiments that came with this package and starts them.

They lie beside this package in a clone, and inside of it in a wheel, which so adds no other name to
an environment.
"""

import importlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).parent


def main() -> int:
    """Runs the program that the command line names; returns the exit code."""
    return load_experiments().main()


def load_experiments() -> ModuleType:
    """Returns the module of the command, of this package's experiments and of no others.

    The process is the command's own, so they take the name `experiments` in it, whatever else of
    that name is on the path.
    """
    folders = (_PACKAGE / "experiments", _PACKAGE.parent / "experiments")
    folder = next(path for path in folders if (path / "__main__.py").is_file())
    spec = spec_from_file_location(
        "experiments", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["experiments"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["experiments"])
    return importlib.import_module("experiments.__main__")
