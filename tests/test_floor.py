"""The floor set of versions passes the same tests (`make prove`): a fresh environment, some minutes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_floor_versions_pass_the_tests(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "tests" / "floor.txt"]
    subprocess.run([*install, "torch"], check=True)
    others = ["ipykernel", "matplotlib", "nbclient", "nbformat", "jsonschema"]
    subprocess.run(
        [*install, f"{ROOT}[quantization]", "pytest", "pytest-timeout", "hypothesis", *others],
        check=True,
    )
    # the house is the same on every version, and its tests read the checkout
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--ignore", ROOT / "tests" / "test_house.py"]
    done = subprocess.run([*tests, ROOT / "tests"], check=False, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-4000:]
