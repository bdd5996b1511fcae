"""Notebooks agree with their scripts, run, and check what they claim.

The scripts end in assertions of what they say, so that running is checking. Nothing is
written back; `python notebooks/make.py` writes.
"""

import base64
import importlib.util
import pathlib

import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"


def load_make():
    spec = importlib.util.spec_from_file_location("make", NOTEBOOKS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_make()
SCRIPTS = make.scripts()


def stored(script):
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def images(notebook):
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                yield base64.b64decode(output["data"]["image/png"])


def test_every_notebook_has_a_script_and_every_script_a_notebook():
    assert SCRIPTS, f"no script in {NOTEBOOKS}"
    notebooks = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    assert [script.stem for script in SCRIPTS] == notebooks


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_and_notebook_agree(script):
    remedy = f"run `python notebooks/make.py {script.stem}`"
    assert make.sources(make.from_script(script)) == make.sources(stored(script)), (
        remedy
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_outputs_are_stored_whole_and_small(script):
    notebook = stored(script)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # Executed from top to bottom, every cell once, none with an error.
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert "error" not in kinds
    assert "assert" in code[-1].source, "a notebook ends by asserting what it claims"
    sizes = [len(image) for image in images(notebook)]
    assert sizes, "a notebook shows a picture"
    assert max(sizes) <= make.LARGEST_IMAGE
    assert script.with_suffix(".ipynb").stat().st_size < 300 * 1024


def test_a_changed_script_is_seen(tmp_path):
    script = tmp_path / "00_example.py"
    script.write_text("# %% [markdown]\n# # Title\n\n# %%\nx = 1\n")
    assert make.is_stale(script)
    nbformat.write(make.from_script(script), script.with_suffix(".ipynb"))
    assert not make.is_stale(script)
    script.write_text("# %% [markdown]\n# # Title\n\n# %%\nx = 2\n")
    assert make.is_stale(script)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_runs(script):
    make.execute(make.from_script(script), timeout=600)
