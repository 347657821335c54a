"""What holds of every notebook as a file; .ci/run executes them."""

import ast
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stripped(path):
    """Nothing of a run, nor of the machine it ran on; the bytes are those that nbformat writes."""
    text = path.read_text("utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert nbformat.writes(notebook, ensure_ascii=False) + "\n" == text
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        assert not cell.metadata
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
    assert not re.findall(r"(?<![\w.~])/(?:home|root|Users|mnt|opt|srv|tmp|var|work|content)/|[A-Z]:\\\\", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_begins_with_what_it_is_and_what_to_change(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    for word in ("7B on real hardware", "load(", "mesh", "bfloat16"):
        assert word in first.source, f"{path.name} does not say at its top what to change: {word}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_says_that_no_model_gave_its_written_answers(path):
    first, *cells = nbformat.read(path, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert ("ANSWER = " in code) == ("written for this notebook" in " ".join(first.source.split()))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_imports_what_exists(path):
    code = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("qwenvl_jax", "qwenvl_convert"):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or find_spec(f"{node.module}.{name.name}"), (
                    f"{path.name}: {name.name}"
                )


def test_links_between_notebooks_lead_somewhere():
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            for link in re.findall(r"\]\(([^):]+)\)", cell.source) if cell.cell_type == "markdown" else ():
                assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_notebooks_are_executed():
    assert NOTEBOOKS
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert 'aside inside "$work/v311" jupyter execute notebooks/*.ipynb' in script  # without Playwright
    assert "tests browser && jupyter execute notebooks/08_agent.ipynb" in script
