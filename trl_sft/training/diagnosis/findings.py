"""What findings are made of: facts of a run, its log as arrays, and the finding itself.

In: the Trainer's log history. Out: dataclasses without behaviour. Deliberately absent: the rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trl_sft.evaluation import before_after

NOT_FINITE, ZERO_LOSS, DIVERGING, NO_IMPROVEMENT = "not_finite", "zero_loss", "diverging", "no_improvement"
OVERFITTING, MEMORISATION, SPIKES, CLIPPED = "overfitting", "memorisation", "spikes", "clipped"
UNUSUAL_RATE, ACCURATE_AT_START, SLOW_INPUT = "unusual_rate", "accurate_at_start", "slow_input"


@dataclass(frozen=True)
class RunFacts:
    """What findings need to know beside the log.

    Attributes:
        is_adapter: whether LoRA is trained.
        peak_rate: the learning rate before the schedule; None = unknown.
        parameters: of the whole model.
        optimizer: `train.optim`.
        max_steps: optimizer steps of the whole run.
        warmup_steps: steps in which the learning rate rises.
        max_grad_norm: norm at which gradients are clipped; 0 = never.
        has_loss_scale: whether fp16's loss scaler skips steps whose gradients are not finite, by design.
        loss_tokens: tokens with loss of each evaluation set, by its name.
        saves_best: whether the weights of the best evaluation are saved at the end.

    """

    is_adapter: bool
    peak_rate: float | None
    parameters: int
    optimizer: str
    max_steps: int
    warmup_steps: int
    max_grad_norm: float
    has_loss_scale: bool
    loss_tokens: Mapping[str, int]
    saves_best: bool = False


@dataclass(frozen=True)
class InputTime:
    """How long the training loop waited for batches."""

    steps: int
    waiting_seconds: float
    total_seconds: float


@dataclass(frozen=True)
class Finding:
    """One warning sign.

    Attributes:
        code: its name, one of the constants above.
        steps: the optimizer steps at which it was seen, in order.
        observation: what was seen, with numbers.
        meaning: what it may mean.
        advice: what to try, with the key to change.
        numbers: the numbers of the observation, by name.
        stops: whether the run has to end.

    """

    code: str
    steps: tuple[int, ...]
    observation: str
    meaning: str
    advice: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    stops: bool = False


class Curves:
    """The log history as arrays.

    Attributes:
        steps, losses: of each log entry with a train loss: (entries,) each.
        norms: gradient norm of the same entries; NaN where it is missing.
        evals: (step, eval loss) of each evaluation, in order.

    """

    def __init__(self, log_history: Sequence[Mapping[str, Any]], facts: RunFacts) -> None:
        """Read the entries of the training loop and of the evaluations."""
        self.entries = [entry for entry in log_history if "loss" in entry]
        self.history, self.facts = log_history, facts
        self.steps = np.array([entry["step"] for entry in self.entries], dtype=int)
        self.losses = np.array([entry["loss"] for entry in self.entries], dtype=float)
        self.norms = np.array([entry.get("grad_norm", math.nan) for entry in self.entries], dtype=float)
        self.evals = before_after.list_eval_losses(log_history, facts.loss_tokens)

    def list_train_losses(self) -> list[tuple[int, float]]:
        """Return (step, train loss) of each log entry."""
        return list(zip(self.steps.tolist(), self.losses.tolist(), strict=True))
