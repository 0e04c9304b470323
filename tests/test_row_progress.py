"""Work on many rows shows how far it is, without a terminal too."""

import pytest

from trl_sft import row_progress
from trl_sft.row_progress import RowProgress


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose last element is the time."""
    times = [0.0]
    monkeypatch.setattr(row_progress.time, "monotonic", lambda: times[-1])
    return times


def test_a_line_is_printed_every_half_minute_without_a_terminal(clock, capsys):
    with RowProgress("Tokenizing train", 1_000_000) as progress:
        for seconds in range(1, 101):
            clock.append(float(seconds))
            progress.update(5000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Tokenizing train: 50,000 of 1,000,000 rows, about 3 min 10 s left",
        "Tokenizing train: 200,000 of 1,000,000 rows, about 2 min 40 s left",
        "Tokenizing train: 350,000 of 1,000,000 rows, about 2 min 10 s left",
        "Tokenizing train: 500,000 of 1,000,000 rows, about 1 min 40 s left",
    ]


def test_work_that_is_done_says_no_time_left(clock, capsys):
    with RowProgress("Reading sources", 1, unit="sources") as progress:
        clock.append(60.0)
        progress.update(1)
    with RowProgress("Looking at files", 4000, unit="files") as progress:
        clock.append(120.0)
        progress.update(1000)
    assert capsys.readouterr().err == "Looking at files: 1,000 of 4,000 files, about 3 min 0 s left\n"


def test_short_work_prints_nothing_and_work_of_unknown_length_what_is_done(clock, capsys):
    with RowProgress("Reading rows") as progress:
        clock.append(9.0)
        progress.update(1000)
        assert capsys.readouterr().err == ""
        clock.append(11.0)
        progress.update(1)
    assert capsys.readouterr().err == "Reading rows: 1,001 rows so far\n"
