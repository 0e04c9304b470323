"""Runs every notebook of a folder, each in a fresh interpreter; the exit code is 1 if one fails.

python scripts/run_notebooks.py notebooks
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Execute a notebook in the working directory `folder`; return it with its outputs. Its file is not changed."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return notebook


def main(folder: Path) -> int:
    """Run all notebooks of a folder; return the exit code."""
    failed = []
    for path in sorted(folder.glob("*.ipynb")):
        try:
            run(path, folder)
        except CellExecutionError as error:
            failed.append(path)
            print(f"{path}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
