"""The lowest supported versions (floor.txt) pass the same tests in a new environment (`make prove`, some minutes)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_floor_versions_pass_all_tests(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "tests" / "floor.txt"]
    subprocess.run([*install, "torch"], check=True)
    test_packages = ["ipykernel", "matplotlib", "nbclient", "nbformat", "jsonschema", "tensorboard", "trackio"]
    subprocess.run(
        [*install, f"{ROOT}[quantization,gguf,serve,eval]", "pytest", "pytest-timeout", "hypothesis", *test_packages],
        check=True,
    )
    # The structure is the same with every version.
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--ignore", ROOT / "tests" / "test_structure.py"]
    process = subprocess.run([*tests, ROOT / "tests"], check=False, cwd=ROOT, capture_output=True, text=True)
    print(process.stdout[-2000:])
    assert process.returncode == 0, process.stdout[-4000:]
