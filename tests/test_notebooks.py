"""The notebooks: each converts to one that Jupyter reads, and its cells run in order."""

import pathlib

import jax
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_converts_and_its_cells_run(path, monkeypatch):
    import jupytext  # each takes a while, and every collection of tests would wait for them
    import matplotlib as mpl
    import matplotlib.pyplot as plt
    import nbformat

    notebook = nbformat.reads(jupytext.writes(jupytext.read(path), fmt="ipynb"), as_version=4)
    nbformat.validate(notebook)
    cells = notebook.cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    monkeypatch.setattr(plt, "show", lambda: None)
    names, number_before = {}, len(plt.get_fignums())
    with (
        jax.enable_x64(False),  # what a reader has
        mpl.rc_context({"backend": "agg"}),
    ):
        for number, cell in enumerate(cells):
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{path.name}, cell {number}", "exec"), names)
        figures = len(plt.get_fignums()) - number_before
        plt.close("all")
    assert figures >= 1
