"""Runs every notebook of a folder, a fresh interpreter each; exit code 1 where one fails.

python scripts/run_notebooks.py notebooks
"""

import subprocess
import sys
from pathlib import Path


def main(folder: Path) -> int:
    """Run all; say so where there are none."""
    found = sorted(folder.glob("*.ipynb"))
    if not found:
        print(f"{folder}/ holds no notebook yet")
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--stdout"]
    failed = [
        path for path in found if subprocess.run([*command, path], stdout=subprocess.DEVNULL, check=False).returncode
    ]
    for path in failed:
        print(f"failed: {path}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
