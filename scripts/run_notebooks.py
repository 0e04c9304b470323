"""Runs every notebook of a folder, a fresh interpreter each; exit code 1 where one fails.

python scripts/run_notebooks.py notebooks
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Execute a notebook with `folder` as its current one; return it with its outputs. The file stays as it is."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return notebook


def main(folder: Path) -> int:
    """Run all."""
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
