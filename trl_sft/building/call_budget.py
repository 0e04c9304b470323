"""One budget for the generator and the judge, over all processes of a build.

Inputs: the callers of two models, and the file of calls. Outputs: callers that stop at or before the budget. What
earlier processes spent is read from the file, in which each line is one call at least. Not here: how a call is made
(`evaluation.model_calls`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_sft import run_folder
from trl_sft.evaluation.call_log import ModelAnswer
from trl_sft.evaluation.model_calls import CallCounts, CallLimits, ModelCaller, ModelRequest


@dataclass
class CallBudget:
    """What may still be spent.

    Attributes:
        calls: the most calls of the build; None = no limit.
        money: the most money of the build; None = no limit.
        spent_calls: so far, by all processes.
        spent_money: likewise.

    """

    calls: int | None
    money: float | None
    spent_calls: int = 0
    spent_money: float = 0.0


@dataclass
class BudgetedCaller:
    """Calls one model within the budget of the build."""

    caller: ModelCaller
    budget: CallBudget

    @property
    def counts(self) -> CallCounts:
        """The calls of this process."""
        return self.caller.counts

    @property
    def stop(self) -> str:
        """Why nothing more is called; "" = it goes on."""
        return self.caller.stop

    @property
    def problems(self) -> list[tuple[str, str]]:
        """Requests that failed: (name, what went wrong)."""
        return self.caller.problems

    def call(self, requests: Sequence[ModelRequest], *, label: str = "calls") -> list[ModelAnswer | None]:
        """Return the answer to each request, in their order; None = there is none, or the budget is used up."""
        counts, budget = self.caller.counts, self.budget
        made, cost = counts.made, counts.cost
        limits: dict[str, Any] = {}
        if budget.calls is not None:
            limits["max_calls"] = made + max(budget.calls - budget.spent_calls, 0)
        if budget.money is not None:
            limits["max_cost"] = cost + max(budget.money - budget.spent_money, 0.0)
        self.caller.limits = dataclasses.replace(self.caller.limits, **limits)
        try:
            return self.caller.call(requests, label=label)
        finally:
            budget.spent_calls += counts.made - made
            budget.spent_money += counts.cost - cost


def read_spending(path: Path, limits: Mapping[str, CallLimits]) -> tuple[int, float]:
    """Return the calls and the money of earlier processes.

    Args:
        path: of the file of calls; it may be absent.
        limits: model -> its limits with the prices.

    """
    calls, money = 0, 0.0
    for entry in run_folder.read_json_lines(path):
        calls += 1
        model = limits.get(str(entry.get("model")))
        tokens: list[Any] = [entry.get(name) for name in ("input_tokens", "output_tokens")]
        if model is not None and all(isinstance(number, int) for number in tokens):
            money += model.compute_cost(*tokens)
    return calls, money
