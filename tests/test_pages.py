"""What the README and the pages of docs/ show is what happens."""

import contextlib
import inspect
import io
import pathlib
import pkgutil
import re

import jax
import matplotlib as mpl
import pytest
import yaml

import sgd_jax as sj
from scripts import fenced_doctests, mathml

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(
    r"^(?P<mark><!-- not run: .+ -->\n)?```(?P<language>python|text)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
TOLERANCE = 0.05
"""Training amplifies the rounding of another machine: beyond this a number shown is wrong."""


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def has_code(page):
    return any(
        b["language"] == "python" and not b["mark"] for b in BLOCK.finditer(page.read_text())
    )


def differences(printed, shown):
    """Returns what differs but for rounding: the words of two texts, or pairs of numbers."""
    if NUMBER.sub("0", printed) != NUMBER.sub("0", shown):
        return [(printed, shown)]
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    return [(a, b) for a, b in pairs if not is_close(a, b)]


def is_close(a, b):
    unit = 10.0 ** -len(b.partition(".")[2])
    a, b = (float(number.replace(",", "")) for number in (a, b))
    return abs(a - b) <= max(unit * 1.001 if unit < 1 else 0, TOLERANCE * abs(b))


def code_pages():
    for page in filter(has_code, PAGES):
        marks = [] if name_of(page) == "README.md" else [pytest.mark.slow]
        yield pytest.param(page, marks=marks, id=name_of(page))


@pytest.mark.parametrize("page", list(code_pages()))
def test_the_code_of_a_page_runs_and_prints_what_stands_below_it(page):
    names, printed = {}, io.StringIO()
    with (
        jax.enable_x64(False),  # what a reader has
        jax.numpy_rank_promotion("allow"),
        mpl.rc_context({"backend": "agg"}),
    ):
        for block in BLOCK.finditer(page.read_text()):
            if block["mark"]:
                continue
            if block["language"] == "python":
                assert not printed.getvalue(), f"{printed.getvalue()!r} is printed and not shown"
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(block["text"], name_of(page), "exec"), names)
            else:
                assert differences(printed.getvalue(), block["text"]) == []
                printed = io.StringIO()
    assert not printed.getvalue(), f"{printed.getvalue()!r} is printed and not shown"


@pytest.mark.parametrize(
    "wrong", ["cost 0.90, 1,204 right", "cost 0.80, 1,304 right", "costs 0.80, 1,204 right", ""]
)
def test_a_wrong_number_or_word_is_a_difference(wrong):
    assert differences("cost 0.81, 1,210 right", "cost 0.80, 1,204 right") == []
    assert differences(wrong, "cost 0.80, 1,204 right") != []


def test_the_two_commands_are_targets_of_the_makefile():
    (commands,) = re.findall(r"^```sh\n(make.*?)^```", README, re.MULTILINE | re.DOTALL)
    targets = re.findall(r"^make (\w+)", commands, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["train", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 110


def test_every_test_that_the_map_of_claims_names_exists():
    names = set(re.findall(r"`(test_\w+\*?)`", (DOCS / "measured.md").read_text()))
    assert names
    for name in names:
        assert list((ROOT / "tests").glob(f"{name}.py")), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_figures_of_a_page_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def names_in(path):
    """Returns the name an entry of the reference stands for, or the public names of a module."""
    value = pkgutil.resolve_name(path)
    if not inspect.ismodule(value):
        return {path.rpartition(".")[2]}
    defined = {
        name
        for name, member in vars(value).items()
        if not name.startswith("_") and getattr(member, "__module__", None) == value.__name__
    }
    return set(getattr(value, "__all__", defined))


def test_the_reference_holds_every_public_name_once():
    found = [
        name
        for page in (DOCS / "api").glob("*.md")
        for path in re.findall(r"^::: ([\w.]+)", page.read_text(), re.MULTILINE)
        for name in names_in(path)
    ]
    modules = {name for name in sj.__all__ if inspect.ismodule(getattr(sj, name))}
    public = {*sj.__all__, *names_in("experiments.runs")} - modules - {"__version__"}
    public |= {name for module in modules for name in names_in(f"sgd_jax.{module}")}
    twice = {name for name in found if found.count(name) > 1}
    assert twice == {"Examples"}  # of data: images and labels; of typing: any pytree
    assert public - set(found) == set(), "give each a line in a page of docs/api/"
    assert set(found) - public == set()


def test_every_page_is_in_the_navigation():
    def leaves(node):
        for value in node.values() if isinstance(node, dict) else node:
            yield from [value] if isinstance(value, str) else leaves(value)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    named = list(leaves(site["nav"]))
    assert len(named) == len(set(named))
    assert pages - set(named) == set(), "name each in the navigation of mkdocs.yml"
    assert set(named) - pages == set()


def test_the_site_shows_examples_of_docstrings_in_fences():
    docstring = "Doubles::\n\n    y = 2x\n\n>>> x = 3\n>>> 2 * x\n6\n\nSource: Euclid."
    shown = "Doubles:\n\n    y = 2x\n\n```pycon\n>>> x = 3\n>>> 2 * x\n6\n```\n\nSource: Euclid."
    assert fenced_doctests.fence(docstring) == shown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_formula_of_a_page_is_read_as_a_cross_reference(page):
    outside_code = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    assert re.findall(r"\[[^\]\n]*\] ?\[[^\]\n]+\]", outside_code) == []


def test_a_block_of_math_becomes_mathml_and_loads_nothing():
    html = mathml.to_mathml(r"\frac{1}{n}", "math", "math", {}, None)
    assert "<mfrac>" in html
    assert "<script" not in html
    assert "src=" not in html
