"""Make the notebooks of docs/notebooks anew: each is a .py file with cells after `# %%`, executed here.

    .venv-notebooks/bin/python ci/make_notebooks.py [NAME ...]

They run in an empty folder, and that folder's path, the home folder's and this checkout's are taken out of what they
show. `make notebooks` makes the environment.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "notebooks"
CELL_SECONDS = 900


def main() -> None:
    for source in sorted(FOLDER.glob("*.py")):
        if not sys.argv[1:] or source.stem in sys.argv[1:]:
            write(source)


def write(source: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(notebook_of(source), Path(folder))
    nbformat.validate(notebook)
    nbformat.write(notebook, source.with_suffix(".ipynb"))


def notebook_of(source: Path) -> Any:
    """The cells of a source, not executed."""
    cells = []
    for number, part in enumerate(re.split(r"^# %%", source.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]):
        kind, _, text = part.partition("\n")
        if "[markdown]" in kind:
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.strip().splitlines())
            cell = new_markdown_cell(text)
        else:
            cell = new_code_cell(text.strip())
        cell.id = f"{source.stem}-{number}".replace("_", "-")
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def executed(notebook: Any, folder: Path) -> Any:
    """The notebook with what its cells gave in an empty folder. Raises CellExecutionError."""
    NotebookClient(notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": str(folder)}}).execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.clear()
        for output in cell.get("outputs", []):
            for name, text in output.get("data", {}).items():
                output["data"][name] = without_places(text, folder)
            if "text" in output:
                output["text"] = without_places(output["text"], folder)
    return notebook


def without_places(text: str, folder: Path) -> str:
    """What was shown, without where this machine keeps it."""
    for place, shown in ((folder.resolve(), ""), (folder, ""), (ROOT, ""), (Path.home(), "~/")):
        text = text.replace(f"{place}/", shown).replace(str(place), shown or ".")
    return text


if __name__ == "__main__":
    main()
