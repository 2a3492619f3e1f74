"""The house: a module imports only from the rooms before its own, and none names a function."""

import ast
import graphlib
import pathlib
import re

import pytest

import sgd_jax

PACKAGE = pathlib.Path(sgd_jax.__file__).parent
ROOF = ("benchmarks", "experiments", "scripts", "tests")
ROOMS = (  # modules and folders of the package: each imports only from those before it
    "typing",
    "_version",
    "_validate",
    "_tree",
    "_chunks",
    "costs",
    "networks",
    "sampling",
    "distributed",
    "per_example",
    "estimation",
    "training",
    "data",
    "_command",
)


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def place(module):
    """Returns the position in ROOMS of the room a module is in; the public surface comes last."""
    room = module.partition(".")[2].partition(".")[0]
    return ROOMS.index(room) if room else len(ROOMS)


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
    """Returns a sentence for every import from a later room, and for every unplaced module."""
    modules = set(sources)
    strays = {name for name in sources if name.partition(".")[2].split(".")[0] not in ("", *ROOMS)}
    found = [f"{name} is in no room" for name in sorted(strays)]
    for name, source in sources.items():
        for target in imports(source, modules) - strays:
            if target.split(".")[0] in ROOF:
                found.append(f"{name} imports {target} from above the roof")
            inside = target.split(".")[0] == "sgd_jax" and name not in strays
            if inside and place(target) > place(name):
                found.append(f"{name} imports {target} from a later room")
    return found


def import_order(sources):
    """Returns the modules, imported ones first; raises graphlib.CycleError where there is none."""
    modules = set(sources)
    graph = {name: imports(source, modules) & modules - {name} for name, source in sources.items()}
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_every_module_is_in_a_room_and_imports_only_from_earlier_ones():
    assert violations(SOURCES) == []


def test_there_is_no_import_cycle():
    assert set(import_order(SOURCES)) == set(SOURCES)


def test_no_module_shares_its_name_with_what_is_in_it():
    for name, source in SOURCES.items():
        last = name.rpartition(".")[2]
        defined = {getattr(node, "name", None) for node in ast.parse(source).body}
        assert last not in defined, name


def test_the_page_on_design_lists_the_rooms_in_this_order():
    page = (PACKAGE.parent / "docs" / "design.md").read_text()
    table = page.partition("## The house")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `(\w+)(?:\.py|/)`", table, re.MULTILINE)
    assert named == [room for room in ROOMS if not room.startswith("_")]


@pytest.mark.parametrize(
    ("module", "source", "sentence"),
    [
        ("sgd_jax.costs", "from sgd_jax import training", "from a later room"),
        ("sgd_jax.costs", "import sgd_jax.training", "from a later room"),
        ("sgd_jax.costs", "def f():\n    from sgd_jax.training import sgd", "from a later room"),
        ("sgd_jax.costs", "from sgd_jax import Layer", "from a later room"),
        ("sgd_jax.costs", "from sgd_jax.networks import Layer", "from a later room"),
        ("sgd_jax.per_example.sites", "from sgd_jax.training import sgd", "from a later room"),
        ("sgd_jax.data._mnist", "from experiments import train", "from above the roof"),
        ("sgd_jax.training._step", "import benchmarks.epoch", "from above the roof"),
        ("sgd_jax.utils", "", "sgd_jax.utils is in no room"),
    ],
)
def test_a_planted_import_is_caught(module, source, sentence):
    (found,) = violations(SOURCES | {module: source})
    assert sentence in found


def test_a_planted_cycle_is_caught():
    cycle = {
        "sgd_jax.costs": "import sgd_jax.training._sgd",
        "sgd_jax.training._sgd": "import sgd_jax.costs",
    }
    with pytest.raises(graphlib.CycleError):
        import_order(cycle)
