"""The notebook runs from the top on a bare CPU, and the outputs kept in it are whole. `python tests/test_colab.py` runs it and keeps new ones."""
import os
import pathlib
import re
import tempfile

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "colab").glob("*.ipynb"))
LOCAL = re.compile(r"(?<![\w.])/(root|home|Users|work|tmp|usr|opt|content)/")          # what only the machine that ran it has


def texts(notebook):
    """Every text among the outputs."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            yield from [output["text"]] if "text" in output else [v for k, v in output.get("data", {}).items() if k.startswith("text/")]


def execute(file: pathlib.Path, folder: str | pathlib.Path):
    """The notebook run from the top in `folder`. A cell that fails raises."""
    notebook = nbformat.read(file, as_version=4)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    NotebookClient(notebook, timeout=600, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": str(folder)}}).execute(env=env)
    return notebook


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_kept_outputs(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run from the top, every cell once"
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert not [text for text in texts(notebook) if LOCAL.search(text)]
    assert any("image/png" in o.get("data", {}) for cell in code for o in cell.outputs)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.stem)
def test_runs_from_the_top(file, tmp_path):
    notebook = execute(file, tmp_path)
    said = "\n".join(texts(notebook))
    assert (tmp_path / "runs" / "tour" / "hf" / "model.safetensors").is_file()
    before, after = map(float, re.search(r"loss on the module: ([\d.]+) before, ([\d.]+) after", said).groups())
    assert after < before - 0.5
    assert "every weight equal: True" in said


if __name__ == "__main__":
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as scratch:
            made = execute(path, scratch)
        for number, cell in enumerate(made.cells):
            cell.metadata.pop("execution", None)
            cell["id"] = f"cell-{number:02d}"
        nbformat.write(made, path)
