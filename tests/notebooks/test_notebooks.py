"""Notebooks run from top to bottom in a fresh kernel, at tiny settings, and are committed without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
TINY = {
    "01_quickstart": """
WORKDIR = "run"
LIBRARY = "[a-c]*.py"
VOCAB_SIZE = 1024
HIDDEN_SIZE = 32
SEQ_LEN = 64
BATCH_SIZE = 4
NUM_STEPS = 12
""",
    "02_optimizers": """
WIDTH = 16
DEPTH = 1
NUM_STEPS = 12
RATES = (1e-3, 3e-3)
SEQ_LEN = 16
BATCH_SIZE = 4
""",
}

# Plots, words among what is printed, and files.
MADE = {
    "01_quickstart": (5, ("bits per byte", "step 12, 'def'"), ("run/evaluation.json",)),
    "02_optimizers": (3, ("all of muon", "block_0/up/kernel [16, 64]", "averaged  weights"), ()),
}


def tiny(path: Path):
    """The notebook with its parameters followed by tiny ones."""
    notebook = nbformat.read(path, as_version=4)
    (place,) = [
        number
        for number, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", ())
    ]
    names = [line.split(" = ")[0] for line in TINY[path.stem].split("\n") if line]
    assert all(f"{name} = " in notebook.cells[place].source for name in names)
    notebook.cells.insert(place + 1, new_code_cell(TINY[path.stem]))
    return notebook


def execute(notebook, folder: Path):
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    # Ranks may differ in a reader's kernel, and in a model that is not ours they do.
    client.execute(env=os.environ | {"JAX_NUMPY_RANK_PROMOTION": "allow"})
    return notebook


@pytest.fixture(scope="module", params=[path.stem for path in NOTEBOOKS])
def executed(request, tmp_path_factory):
    (path,) = [path for path in NOTEBOOKS if path.stem == request.param]
    folder = tmp_path_factory.mktemp(path.stem)
    return execute(tiny(path), folder), folder, path.stem


def test_every_notebook_has_tiny_settings():
    assert {path.stem for path in NOTEBOOKS} == set(TINY)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_not_committed(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_it_draws_its_plots_and_leaves_its_work(executed):
    notebook, folder, path = executed
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    images = [out for out in outputs if "image/png" in out.get("data", {})]
    assert not [out for out in outputs if out.output_type == "error"]
    text = "".join(out.get("text", "") for out in outputs)
    number, words, files = MADE[path]
    assert len(images) == number
    for word in words:
        assert word in text
    for name in files:
        assert (folder / name).exists()


def test_nothing_is_installed_where_smoljax_is(executed):
    notebook, _, _ = executed
    (install,) = [cell for cell in notebook.cells if "%pip install" in cell.source]
    assert install.outputs == []


def test_a_broken_notebook_would_be_noticed(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(notebook, tmp_path)
