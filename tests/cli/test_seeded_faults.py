"""Sixty seeded faults: what `fix` alone mends is what was meant, and every message holds all that is needed.

The table is tests/seeded_faults.yaml; `benchmarks/fix.py` prints the figures.
"""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load_benchmark():
    spec = importlib.util.spec_from_file_location("fix_benchmark", ROOT / "benchmarks" / "fix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCHMARK = load_benchmark()
FAULTS = BENCHMARK.read_faults()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("seeded")
    BENCHMARK.write_rows(path)
    return path


def test_table_has_sixty_faults_of_which_a_third_has_no_certain_meaning():
    assert len(FAULTS) == 60
    assert sum(fault["intended"] is None for fault in FAULTS.values()) == 18
    for name, fault in FAULTS.items():
        assert BENCHMARK.fill(fault["intended"] or "") != BENCHMARK.fill(fault["recipe"]), name


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_mended_as_it_was_meant_or_left_with_all_that_is_needed(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    outcome, lacking = BENCHMARK.measure(FAULTS[name])
    assert lacking == []
    assert outcome == ("left" if FAULTS[name]["intended"] is None else "mended")
