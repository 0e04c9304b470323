"""Rows that fill the last batch of several processes are known as such, also in the epoch of a resume."""

from types import SimpleNamespace

import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from accelerate.state import GradientState
from torch.utils.data import DataLoader

from trl_sft.training import repeated_rows


@pytest.mark.parametrize("skipped", [0, 1, 2])
@pytest.mark.parametrize(("number", "expected"), [(0, 2), (1, 0)])
def test_own_rows_of_the_last_batch_are_counted_wherever_the_epoch_begins(monkeypatch, number, expected, skipped):
    """18 rows in batches of 4 for two processes: the third batch has two rows of the first process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(number))
    loader = DataLoader(list(range(18)), batch_size=4)
    loader = prepare_data_loader(loader, num_processes=2, process_index=number, put_on_device=False)
    loader = skip_first_batches(loader, skipped) if skipped else loader
    trainer = SimpleNamespace(accelerator=SimpleNamespace(gradient_state=GradientState()))
    counts = [repeated_rows.count_own_rows(trainer, 4, total=18) for _ in loader]
    assert counts == [4, 4, expected][skipped:]
    assert [repeated_rows.count_own_rows(trainer, 4) for _ in loader][:-1] == [4, 4][skipped:]
