"""How long a new recipe trains: the share of held-out rows, the batch, the epochs, and when it logs and evaluates.

Inputs: the number of rows. Outputs: a `Schedule`. Deliberately not here: the text of the recipe (`recipe_writer`), and
anything that depends on the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trl_sft.evaluation.sample_size import LEAST_ROWS

_BATCH = 4  # rows that one forward pass takes
_MANY_ROWS = 1000  # to train; from here on one epoch of large batches has enough steps
_ACCUMULATION = 4  # forward passes in a step, of many rows
# of few rows: three epochs, and at least 100 rows seen, as OpenAI's fine-tuning chose them by default
_EPOCHS, _LEAST_SEEN, _MOST_EPOCHS = 3, 100, 25
_SHARE, _LARGEST_SHARE = 0.05, 0.2  # of the rows that are held out
_SHORT_RUN = 500  # steps
_EVALUATION_SHARE, _LOGGING_SHARE = 0.2, 0.1  # of the steps of a short run
_EVALUATION_STEPS, _LOGGING_STEPS = 100, 10  # of a longer one


@dataclass(frozen=True)
class Schedule:
    """Numbers of a new recipe."""

    eval_fraction: float  # 0 = too few rows to hold one out
    eval_rows: int
    train_rows: int
    accumulation: int
    epochs: int

    @property
    def is_short(self) -> bool:
        """Whether intervals are shares of the run, so that a short one too is logged and evaluated several times."""
        return self.steps < _SHORT_RUN

    @property
    def logging_steps(self) -> float:
        """Steps from one log entry to the next; below 1, the share of all steps."""
        return _LOGGING_SHARE if self.is_short else _LOGGING_STEPS

    @property
    def eval_steps(self) -> float:
        """Steps from one evaluation, and one checkpoint, to the next; below 1, the share of all steps."""
        return _EVALUATION_SHARE if self.is_short else _EVALUATION_STEPS

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.train_rows / self.batch) * self.epochs

    @property
    def batch(self) -> int:
        """Rows of one optimizer step."""
        return _BATCH * self.accumulation


def plan_schedule(rows: int) -> Schedule:
    """Return a schedule for a number of rows.

    Few rows are seen several times, in small batches: one epoch of large batches would be a handful of steps, which
    change nothing.
    """
    fraction = _choose_fraction(rows)
    eval_rows = round(rows * fraction)
    train_rows = rows - eval_rows
    is_small = train_rows < _MANY_ROWS
    accumulation = 1 if is_small else _ACCUMULATION
    epochs = min(_MOST_EPOCHS, max(_EPOCHS, math.ceil(_LEAST_SEEN / train_rows))) if is_small else 1
    return Schedule(
        eval_fraction=fraction,
        eval_rows=eval_rows,
        train_rows=train_rows,
        accumulation=accumulation,
        epochs=epochs,
    )


def _choose_fraction(rows: int) -> float:
    """Return the share of held-out rows: 5%, of few rows as many as a verdict needs, but at most a fifth."""
    if rows < 2:
        return 0
    share = max(_SHARE, min(_LARGEST_SHARE, LEAST_ROWS / rows), 1 / rows)
    return math.ceil(round(100 * share, 6)) / 100
