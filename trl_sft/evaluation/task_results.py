"""What base and tuned model did in the tasks of lm-eval, compared item by item.

Inputs: the samples of each side, and how a task scores them. Outputs: the joined records of `task_samples.jsonl`, and
what `eval.json` has under `evaluation.lm_eval`. Every number follows from the records. Not here: running a task
(`task_suites`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trl_sft.console import format_number_of
from trl_sft.evaluation import statistics
from trl_sft.evaluation.statistics import BETTER, NOT_RESOLVED, WORSE, Interval, PairedResult
from trl_sft.evaluation.task_suites import SideScores, SuiteTask

BASE, TUNED, PLAIN = "base", "tuned", "base_plain"  # PLAIN: the base model without the chat template of the run
MCNEMAR, SIGN_TEST = "mcnemar", "sign"
_JOINED = ("doc", "target", "doc_hash", "prompt_hash", "target_hash")  # of a sample: the same on both sides
_ANSWERS = ("resps", "filtered_resps")
_RESAMPLES = 999  # of a score that is no mean of its items: each is computed anew


class _Values(NamedTuple):
    """The values of one metric, item by item."""

    base: list[Any]
    tuned: list[Any]
    keys: list[str]  # of the items: equal ones are one observation


def join_samples(suite_task: SuiteTask, sides: Mapping[str, SideScores]) -> list[dict[str, Any]]:
    """Return the records of `task_samples.jsonl`: one for each item and filter, with all sides.

    Args:
        suite_task: the task.
        sides: what each side did; all have the same items.

    """
    found = {
        name: {(sample["doc_id"], sample["filter"]): sample for sample in side.samples} for name, side in sides.items()
    }
    records = []
    for place, first in found[BASE].items():
        record = {"task": suite_task.name, "doc_id": place[0], "filter": place[1]}
        record |= {key: first.get(key) for key in _JOINED if key in first}
        record["prompt"] = first["arguments"][0][0]
        for name, samples in found.items():
            sample = samples[place]
            answers = {key: sample[key] for key in _ANSWERS}
            record[name] = answers | {"metrics": {metric: sample[metric] for metric in sample["metrics"]}}
        records.append(record)
    return records


def build(
    tasks: Sequence[SuiteTask],
    results: Mapping[str, Mapping[str, SideScores]],
    *,
    version: str,
    facts: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, Mapping[str, bool]],
) -> dict[str, Any]:
    """Return what `eval.json` has under `evaluation.lm_eval`.

    Args:
        tasks: that were run.
        results: by task, by side.
        version: of lm-eval.
        facts: by side: model, template, thinking.
        metrics: by task, by metric in the task's order: whether more is better.

    """
    described = {task.name: _describe_task(task, results[task.name], metrics[task.name]) for task in tasks}
    decisive = {name: part["metrics"][part["metric"]] for name, part in described.items()}
    corrected = statistics.correct_p_values([part["p"] for part in decisive.values()])
    for (name, part), p_value in zip(decisive.items(), corrected, strict=True):
        described[name] |= {"holm_p": p_value, "resolution": _resolve(part, p_value)}
    return {"version": version, "tasks": described, "sides": {name: dict(side) for name, side in facts.items()}}


def list_lines(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a line for each task, with the metric that decides."""
    for name, task in result["tasks"].items():
        part = task["metrics"][task["metric"]]
        interval = part["difference"]
        text = f"{name}, {task['metric'].removesuffix(',none')}: {part['base']:.4g} -> {part['tuned']:.4g}"
        if interval["low"] is not None:
            text += f", {interval['value']:+.4g} ({interval['low']:+.4g} to {interval['high']:+.4g})"
        text += f" on {task['items']:,} items: {_WORDS[task['resolution']]}"
        yield "lm-eval", text
        if task["skipped_items"]:
            items = format_number_of(task["skipped_items"], "item")
            yield "", f"left out: {items} whose checker needs nltk's data `punkt_tab`"
        if plain := task["plain"]:
            part = plain["metrics"][task["metric"]]
            text = f"the base model without the chat template: {part['base']:.4g}"
            yield "", f"{text}; the tuned model against that: {_WORDS[part['resolution']]}"


_WORDS = {BETTER: "better", WORSE: "worse", "no_difference": "same", NOT_RESOLVED: "not resolved"}


def _describe_task(task: SuiteTask, sides: Mapping[str, SideScores], metrics: Mapping[str, bool]) -> dict[str, Any]:
    """Return the results of a task, by metric and filter."""
    compared = _compare_metrics(task, sides[BASE], sides[TUNED], metrics=metrics)
    plain = None
    if PLAIN in sides:
        plain = {"metrics": _compare_metrics(task, sides[PLAIN], sides[TUNED], metrics=metrics)}
    version = (task.task.get_config("metadata") or {}).get("version")
    return {
        "source": task.source or "lm-eval",
        "sha256": task.sha256,
        "task_version": version,
        "output_type": task.task.OUTPUT_TYPE,
        "few_shot": task.task.get_config("num_fewshot") or 0,
        "items": task.items,
        "skipped_items": task.skipped,
        "metric": next(iter(compared)),
        "metrics": compared,
        "plain": plain,
    }


def _compare_metrics(
    task: SuiteTask, base: SideScores, tuned: SideScores, *, metrics: Mapping[str, bool]
) -> dict[str, dict[str, Any]]:
    """Return what each metric tells, under "metric,filter" as lm-eval names it."""
    compared = {}
    names = {sample["filter"]: sample["metrics"] for sample in base.samples}
    for metric, more_is_better in metrics.items():
        for filter_name, known in names.items():
            key = f"{metric},{filter_name}"
            if metric not in known or key not in base.scores:
                continue
            values = _read_values(base, tuned, metric=metric, filter_name=filter_name)
            part = _compare(values, task.aggregations[metric], is_better_high=more_is_better)
            reported = {BASE: base.scores[key], TUNED: tuned.scores[key]}
            compared[key] = {**reported, **part, "higher_is_better": more_is_better, "lm_eval": reported}
    return compared


def _read_values(base: SideScores, tuned: SideScores, *, metric: str, filter_name: str) -> _Values:
    """Return the values of one metric, with the items of both sides in one order."""
    of_base, of_tuned = (
        {sample["doc_id"]: sample for sample in side.samples if sample["filter"] == filter_name}
        for side in (base, tuned)
    )
    return _Values(
        [sample[metric] for sample in of_base.values()],
        [of_tuned[number][metric] for number in of_base],
        [str(sample["doc_hash"]) for sample in of_base.values()],
    )


def _compare(values: _Values, aggregate: Callable[[Sequence[Any]], float], *, is_better_high: bool) -> dict[str, Any]:
    """Return what one metric tells: scores, interval, test, counts. Items that are equal are one observation.

    Scores have the sign of lm-eval: a perplexity that falls has a difference below 0.
    """
    sign = 1.0 if is_better_high else -1.0
    of_base, of_tuned = _read_scalars(values.base), _read_scalars(values.tuned)
    if of_base is None or of_tuned is None:  # texts, of which only all together have a score
        return _describe(None, None, test="", sign=sign)
    base, tuned = (sign * statistics.average_by_prompt(side, values.keys) for side in (of_base, of_tuned))
    result = statistics.compare_scores(base, tuned)
    difference, test, table = result.difference, SIGN_TEST, None
    is_mean = getattr(aggregate, "__name__", "") == "mean"
    if not is_mean:
        difference = _bootstrap_aggregate(values, aggregate, sign)
    elif np.isin(abs(base), (0.0, 1.0)).all() and np.isin(abs(tuned), (0.0, 1.0)).all():
        test = MCNEMAR
        table, p_value = statistics.compute_mcnemar(abs(base) == 1, abs(tuned) == 1)
        result = result._replace(p_value=p_value)
    resolution = statistics.resolve(
        difference, result.p_value, prompts=result.prompts, decisive=result.better + result.worse
    )
    result = result._replace(difference=difference, resolution=resolution)
    described = _describe(result, table, test=test, sign=sign)
    if is_mean:
        described |= {BASE: sign * result.base, TUNED: sign * result.tuned}
    return described


def _describe(result: PairedResult | None, table: list[list[int]] | None, *, test: str, sign: float) -> dict[str, Any]:
    """Return a comparison as `eval.json` has it; None = the items have no values of their own."""
    if result is None:
        unknown = dict.fromkeys(("better", "tied", "worse", "test", "mcnemar", "observations", "needed_items"))
        difference = {"value": None, "low": None, "high": None}
        return {"resolution": NOT_RESOLVED, "difference": difference, **unknown, "p": 1.0}
    ends = sorted((sign * result.difference.low, sign * result.difference.high))
    return {
        "resolution": result.resolution,
        "difference": {"value": sign * result.difference.value, "low": ends[0], "high": ends[1]},
        "better": result.better,
        "tied": result.tied,
        "worse": result.worse,
        "test": test,
        "mcnemar": table,
        "observations": result.prompts,
        "needed_items": result.needed_prompts,
        "p": result.p_value,
    }


def _resolve(part: Mapping[str, Any], p_value: float) -> str:
    """Return the resolution of a task with a corrected p-value."""
    if part["better"] is None:
        return NOT_RESOLVED
    sign = 1.0 if part["higher_is_better"] else -1.0
    ends = sorted((sign * part["difference"]["low"], sign * part["difference"]["high"]))
    interval = Interval(sign * part["difference"]["value"], *ends)
    items = part["better"] + part["tied"] + part["worse"]
    return statistics.resolve(interval, p_value, prompts=items, decisive=part["better"] + part["worse"])


def _read_scalars(values: Sequence[Any]) -> list[float] | None:
    """Return one number for each item; None = the items have texts.

    A list of numbers is averaged (IFEval's instructions of a prompt). Two numbers of a perplexity are a log likelihood
    and a count: the number is what one word or byte costs.
    """
    scalars = []
    for value in values:
        if isinstance(value, (bool, int, float)):
            scalars.append(float(value))
        elif isinstance(value, list) and value and all(isinstance(part, (bool, int, float)) for part in value):
            is_cost = len(value) == 2 and value[0] <= 0 and value[1] >= 1 and not isinstance(value[0], bool)
            scalars.append(-value[0] / value[1] if is_cost and value[0] else float(np.mean(value)))
        else:
            return None
    return scalars


def _bootstrap_aggregate(values: _Values, aggregate: Callable[[Sequence[Any]], float], sign: float) -> Interval:
    """Return the difference of two scores that are no means, with the BCa interval over items."""
    from scipy import stats

    def compare(numbers: np.ndarray) -> float:
        chosen = numbers.astype(int)
        tuned = aggregate([values.tuned[number] for number in chosen])
        return sign * float(tuned - aggregate([values.base[number] for number in chosen]))

    numbers = np.arange(len(values.keys))
    value = compare(numbers)
    if len(numbers) < 2 or values.base == values.tuned:
        return Interval(value, value, value)
    result = stats.bootstrap(
        (numbers,),
        compare,
        vectorized=False,
        n_resamples=_RESAMPLES,
        confidence_level=statistics.CONFIDENCE,
        method="BCa",
        rng=np.random.default_rng(statistics.SEED),
    )
    return Interval(value, float(result.confidence_interval.low), float(result.confidence_interval.high))
