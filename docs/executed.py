"""`python -m docs.executed [NAME …]`: the outputs in docs/notebooks, renewed by running each notebook
in an empty folder. A test runs them too, and compares what they print.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).with_name("notebooks")


def executed(path: Path, folder: Path) -> NotebookNode:
    """The notebook with the outputs of running it in `folder`. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, timeout=300, record_timing=False, coalesce_streams=True, resources=place
    )
    client.execute()
    notebook.metadata.language_info = {"name": "python"}  # and no version, which is this machine's
    return notebook


def printed(cell: NotebookNode) -> str:
    """What a cell printed."""
    return "".join(output["text"] for output in cell.get("outputs", ()))


if __name__ == "__main__":
    for name in sys.argv[1:] or [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]:
        path = NOTEBOOKS / f"{name}.ipynb"
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(path, Path(folder)), path)
