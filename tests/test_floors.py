"""A module of the package imports only from lower floors: DESIGN's table, checked."""

import ast
import graphlib
import pathlib

import pytest

import sgd_jax

PACKAGE = pathlib.Path(sgd_jax.__file__).parent
ROOF = ("experiments", "scripts", "tests")
FLOORS = {  # of a module, or of a sub-package and all that is in it
    "sgd_jax._typing": 0,
    "sgd_jax._validate": 0,
    "sgd_jax._tree": 0,
    "sgd_jax._version": 0,
    "sgd_jax.sharding": 0,
    "sgd_jax.processes": 0,
    "sgd_jax.costs": 1,
    "sgd_jax.networks": 1,
    "sgd_jax._chunks": 1,
    "sgd_jax._intervals": 1,
    "sgd_jax.sampling": 1,
    "sgd_jax.quadratic": 1,
    "sgd_jax.allocation": 1,
    "sgd_jax.moments": 1,
    "sgd_jax.per_example": 2,
    "sgd_jax.mean_gradient": 3,
    "sgd_jax.sgd": 3,
    "sgd_jax.moment_streams": 3,
    "sgd_jax.estimates": 4,
    "sgd_jax.noise_scale": 4,
    "sgd_jax.subsets": 4,
    "sgd_jax.control_variate": 4,
    "sgd_jax.training": 4,
    "sgd_jax.sweeps": 5,
    "sgd_jax.noise_tracking": 5,
    "sgd_jax.data": 5,
    "sgd_jax.runs": 5,
    "sgd_jax": 6,  # the public surface
}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def room(module):
    """Returns the entry of FLOORS that a module belongs to: itself or its sub-package."""
    parts = module.split(".")
    return ".".join(parts[:2])


def imports(source, modules):
    """Returns the modules named by import statements, anywhere in a source, function bodies too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"line {node.lineno}: relative import; the house writes them out"
            )
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = members & modules
            names |= inner
            if inner != members:
                names.add(node.module)
    return names


def violations(sources):
    """Returns a sentence for every import that does not go down, and for every unplaced module."""
    modules = set(sources)
    found = [f"{name} has no floor" for name in sources if room(name) not in FLOORS]
    for name, source in sources.items():
        for target in imports(source, modules):
            if target.split(".")[0] in ROOF:
                found.append(f"{name} imports {target} from above the roof")
            inside = target.split(".")[0] == "sgd_jax" and room(target) != room(name)
            if inside and FLOORS.get(room(target), 0) > FLOORS.get(room(name), 0):
                found.append(f"{name} imports {target} from a higher floor")
            if inside and FLOORS.get(room(target), 0) == FLOORS.get(room(name), 0) > 0:
                found.append(f"{name} imports {target} from its own floor")
    return found


def import_order(sources):
    """Returns the modules, imported ones first; raises graphlib.CycleError where there is none."""
    modules = set(sources)
    graph = {name: imports(source, modules) & modules - {name} for name, source in sources.items()}
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_every_module_has_a_floor_and_imports_only_from_lower_ones():
    assert violations(SOURCES) == []


def test_there_is_no_import_cycle():
    assert set(import_order(SOURCES)) == set(SOURCES)


@pytest.mark.parametrize(
    ("module", "source", "sentence"),
    [
        ("sgd_jax.costs", "from sgd_jax import training", "from a higher floor"),
        ("sgd_jax.costs", "import sgd_jax.training", "from a higher floor"),
        ("sgd_jax.costs", "def f():\n    from sgd_jax.sgd import sgd", "from a higher floor"),
        ("sgd_jax.costs", "from sgd_jax import Layer", "from a higher floor"),
        ("sgd_jax.costs", "from sgd_jax.networks import Layer", "from its own floor"),
        ("sgd_jax.per_example.sites", "from sgd_jax.sgd import sgd", "from a higher floor"),
        ("sgd_jax.data.mnist", "from experiments import train", "from above the roof"),
        ("sgd_jax.training", "import scripts.benchmark", "from above the roof"),
        ("sgd_jax.utils", "", "sgd_jax.utils has no floor"),
    ],
)
def test_a_planted_import_is_caught(module, source, sentence):
    (found,) = violations(SOURCES | {module: source})
    assert sentence in found


def test_a_planted_cycle_is_caught():
    cycle = {"sgd_jax.costs": "import sgd_jax.sgd", "sgd_jax.sgd": "import sgd_jax.costs"}
    with pytest.raises(graphlib.CycleError):
        import_order(cycle)
