"""Which metric decides which checkpoint is the best (`train.metric_for_best_model`), and whether it is logged.

Inputs: the checked recipe, its formatted rows, the live settings. Outputs: nothing where a loss decides; the check
where generated answers are scored; a fault with the names that exist for a metric that no evaluation logs. The Trainer
itself ends with a KeyError at the first evaluation. Not here: generating and scoring the answers (`generation_metric`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig

from trl_sft import console
from trl_sft.data.formats import TEXT
from trl_sft.data.rows import RunRows
from trl_sft.errors import Edit, Fault, RecipeError
from trl_sft.evaluation import before_after, eval_packages
from trl_sft.evaluation.before_after import PromptSet
from trl_sft.evaluation.checks import check_requests
from trl_sft.evaluation.checks.check_requests import CHECKS, CODE, RequestedCheck
from trl_sft.evaluation.metrics import METRICS
from trl_sft.recipe import answer_checks
from trl_sft.recipe.checked import Run
from trl_sft.recipe.yaml_reader import Key
from trl_sft.suggestions import LOOSE, is_misspelling, nearest_name

# metrics of an evaluation, logged by SFTTrainer, that say how good a model is (trl.trainer.sft_trainer, `log`)
_LOSS = "loss"
_LOGGED = (_LOSS, "mean_token_accuracy", "entropy")
_PREFIX = "eval_"
_KEY: Key = ("train", "metric_for_best_model")
_OVERLAPS = ("chrf", "bleu")  # checks of the package sacrebleu


class AnswerMetric(NamedTuple):
    """The mean score of generated answers, as the metric that decides.

    Attributes:
        name: as the Trainer logs it: `eval_exact`, or `eval_NAME_exact` of one of several evaluation sets.
        evaluation_set: its name; the answers to the prompts of the others are not scored.
        checks: task -> the check that scores its answers; "" = of every other task.

    """

    name: str
    evaluation_set: str
    checks: Mapping[str, RequestedCheck]

    def find_check(self, task: str) -> RequestedCheck | None:
        """Return the check of a task; None = its answers are not scored."""
        return self.checks.get(task) or self.checks.get("")


def find(run: Run, rows: RunRows, *, args: SFTConfig) -> AnswerMetric | None:
    """Return how answers are scored; None = a metric of the evaluation itself decides, or nothing is evaluated.

    Args:
        run: the checked recipe.
        rows: the formatted rows.
        args: the live settings, with `metric_for_best_model`.

    Raises:
        RecipeError: no evaluation logs the metric, or the recipe looks for the lowest score.
        MissingPackage: the check needs the extra `eval`.

    """
    if args.eval_strategy == IntervalStrategy.NO:
        return None  # an evaluation before step 1 does not read it
    written = str(args.metric_for_best_model)
    metric = written.removeprefix(_PREFIX)
    sets = list(rows.eval)
    is_single = len(sets) < 2
    logged = _LOGGED if is_single else tuple(f"{name}_{_LOSS}" for name in sets)
    if metric in logged:
        return None
    scored = _list_answer_metrics(run, rows)
    if metric not in scored:
        raise RecipeError(_explain_unknown(run, written, [*logged, *scored], is_single=is_single))
    found = scored[metric]
    if args.greater_is_better is False:
        problem = f"a higher {found.name} is better: it is a mean score of answers"
        key = ("train", "greater_is_better")
        fix = "Remove `greater_is_better`, or set it to true."
        edits = (Edit("remove", key),) if "greater_is_better" in run.train else ()
        raise RecipeError(Fault(run.recipe.where(key), problem, fix, code="recipe.contradiction", edits=edits))
    if any(request.check.name in _OVERLAPS for request in found.checks.values()):
        eval_packages.require_packages(str(run.recipe.where(_KEY)), "sacrebleu")
    drawn = before_after.select_prompts(run, rows, encode=lambda _prompt, _tools: [], ledger={"eval": {}})
    if not select_prompts(drawn, found, rows).prompts:
        problem = f"none of the {console.format_number_of(len(drawn.prompts), 'prompt')} that are answered can be "
        problem += f"scored for {found.name}: it needs a prompt of its evaluation set with what the check compares"
        fix = "Raise `evaluate.max_rows`, or set another metric."
        raise RecipeError(Fault(run.recipe.where(_KEY), problem, fix, code="recipe.unknown_metric"))
    return found


def select_prompts(prompts: PromptSet, metric: AnswerMetric, rows: RunRows) -> PromptSet:
    """Return the prompts of the evaluation set that is scored, which have what their check compares.

    Args:
        prompts: what base and tuned model are asked.
        metric: which evaluation set is scored, and by which checks.
        rows: the formatted rows, with the evaluation sets.

    """
    names = list(rows.eval)
    ends = np.cumsum([len(split.order) for split in rows.eval.values()])
    chosen = []
    for index, prompt in enumerate(prompts.prompts):
        name = names[int(np.searchsorted(ends, prompt.row, side="right"))]
        request = metric.find_check(prompt.task)
        if name != metric.evaluation_set or request is None:
            continue
        if not check_requests.find_missing_reference(request, prompt.reference):
            chosen.append(index)
    return prompts._replace(
        prompts=[prompts.prompts[index] for index in chosen], ids=[prompts.ids[index] for index in chosen]
    )


def _list_answer_metrics(run: Run, rows: RunRows) -> dict[str, AnswerMetric]:
    """Return the metrics that answers have, by their name without `eval_`; {} = no prompt is answered."""
    if run.evaluate is None or rows.row_type == TEXT or not rows.eval:
        return {}
    sets, checks = list(rows.eval), _list_checks(run)
    metrics = {}
    for name, by_task in checks.items():
        for evaluation_set in sets:
            metric = name if len(sets) == 1 else f"{evaluation_set}_{name}"
            metrics[metric] = AnswerMetric(f"{_PREFIX}{metric}", evaluation_set, by_task)
    return metrics


def _list_checks(run: Run) -> dict[str, dict[str, RequestedCheck]]:
    """Return the checks by name: those that need no value of their own, and those of `evaluate.checks` by task."""
    plain = {name: check for name, check in CHECKS.items() if check.needs != check_requests.PARAMETERS and name != CODE}
    checks = {name: {"": RequestedCheck(check)} for name, check in plain.items()}
    checks |= dict.fromkeys(METRICS, checks["exact"])  # the name that eval.json has
    values = answer_checks.list_values((run.evaluate or {}).get("checks", []))
    where = str(run.recipe.where(("evaluate", "checks")))
    own: dict[str, dict[str, RequestedCheck]] = {}
    for task, requests in check_requests.read_by_task(values, folder=Path.cwd(), where=where).items():
        for request in requests:
            if request.check.name != CODE:
                own.setdefault(request.check.name, {})[task] = request
    return checks | own


def _explain_unknown(run: Run, written: str, names: list[str], *, is_single: bool) -> Fault:
    """Return the fault of a metric that no evaluation logs; `names`: those that exist, without `eval_`."""
    existing = [f"{_PREFIX}{name}" for name in names]
    word = written if written.startswith(_PREFIX) else f"{_PREFIX}{written}"
    similar = nearest_name(word, existing, cutoff=LOOSE)
    edits: tuple[Edit, ...] = ()
    if is_misspelling(word, similar, existing):
        edits = (Edit("set", _KEY, similar),)
    problem: Any = f"no evaluation logs {written}"
    problem += "" if is_single else ": each evaluation set is logged under its own name"
    fix = f"Set one of {', '.join(existing)}."
    return Fault(run.recipe.where(_KEY), problem, fix, code="recipe.unknown_metric", edits=edits)
