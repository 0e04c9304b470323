"""The rule checks on base against tuned: what the scores of both tell, as a whole, by task and by check.

Inputs: the records of `evaluation.jsonl`, one for each row, with answers and scores of each side. Outputs: the mapping
that `eval.json` has under `evaluation`, with the verdict. Every number follows from the records alone, so that anybody
can compute it again. Not here: scores (`checks`), statistics (`statistics`), and what follows from these and other
findings (`conclusion`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trl_sft.evaluation import conclusion, statistics
from trl_sft.evaluation.checks import overlap
from trl_sft.evaluation.checks.check_requests import CHECKS
from trl_sft.evaluation.generate import LIMIT
from trl_sft.evaluation.statistics import BETTER, NO_DIFFERENCE, NOT_RESOLVED, WORSE, PairedResult

BASE, TUNED, FEW_SHOT = "base", "tuned", "base_few_shot"
VERSION = 1  # of the form of `evaluation` in eval.json
_MOST_REGRESSIONS = 20  # whose texts eval.json has; their number is that of all
_UNNAMED = ""  # the task of rows that name none

Record = Mapping[str, Any]


def build(
    records: Sequence[Record], sides: Mapping[str, Mapping[str, Any]], *, steps: Sequence[int] = ()
) -> dict[str, Any]:
    """Return what `eval.json` has under `evaluation`.

    Args:
        records: of evaluation.jsonl: id, task, prompt, prompt_key, reference, check, answers, scores.
        sides: name of a side -> how it was asked: model, template, thinking, decoding.
        steps: checkpoints whose answers are sides named `step_N`.

    """
    overall = compare(records, BASE, TUNED)
    tasks = _compare_tasks(records)
    has_few_shot = FEW_SHOT in sides
    result: dict[str, Any] = {
        "version": VERSION,
        "format_only": not has_few_shot,
        "rows": len(records),
        **describe_result(overall),
        "ids": list_changed_rows(records),
        "few_shot": describe_result(compare(records, FEW_SHOT, TUNED)) if has_few_shot else None,
        "tasks": {name: described for name, (described, _) in tasks.items()},
        "checks": _compare_checks(records),
        "best_tasks": _rank(tasks, {BETTER}, reverse=True),
        "attention_tasks": _rank(tasks, {WORSE, NOT_RESOLVED, NO_DIFFERENCE}, reverse=False),
        "regressions": list_regressions(records),
        "sides": {name: dict(facts) | count_answers(records, name) for name, facts in sides.items()},
        "checkpoints": [{"step": step, **describe_result(compare(records, BASE, f"step_{step}"))} for step in steps],
    }
    return conclusion.conclude(result)


def compare(records: Sequence[Record], base: str, tuned: str, *, check: str = "") -> PairedResult:
    """Return what the scores of two sides tell.

    Args:
        records: one for each row.
        base: the name of one side.
        tuned: the name of the other.
        check: whose scores; "" = for each row the check that decides.

    """
    prompts = [record["prompt_key"] for record in records]
    names = [check or record["check"] for record in records]
    scores = [
        statistics.average_by_prompt(
            [record["scores"][side][name] for record, name in zip(records, names, strict=True)], prompts
        )
        for side in (base, tuned)
    ]
    margins = statistics.average_by_prompt([_get_margin(name) for name in names], prompts)
    return statistics.compare_scores(scores[0], scores[1], tie_margin=margins)


def describe_result(result: PairedResult) -> dict[str, Any]:
    """Return a result as `eval.json` has it."""
    return {
        "resolution": result.resolution,
        "prompts": result.prompts,
        "base": result.base,
        "tuned": result.tuned,
        "average_improvement": statistics.describe_interval(result.difference),
        "improvement_rate": {
            "better": result.better,
            "tied": result.tied,
            "worse": result.worse,
            **statistics.describe_interval(result.better_share),
        },
        "sign_test_p": result.p_value,
        "needed_prompts": result.needed_prompts,
    }


def list_changed_rows(records: Sequence[Record], *, check: str = "") -> dict[str, list[Any]]:
    """Return the ids of the rows whose score rose and fell; `check`: whose score, "" = of the check that decides."""
    changed: dict[str, list[Any]] = {"better": [], "worse": []}
    for record in records:
        name = check or record["check"]
        difference = record["scores"][TUNED][name] - record["scores"][BASE][name]
        if abs(difference) > _get_margin(name) + 1e-12:
            changed["better" if difference > 0 else "worse"].append(record["id"])
    return changed


def count_answers(records: Sequence[Record], side: str) -> dict[str, Any]:
    """Return how many answers of a side are empty, cut by the limit, or never close their thought, and their ids."""
    answers = [(record["id"], record["answers"][side]) for record in records]
    ids = {
        "empty": [number for number, answer in answers if not answer["text"].strip()],
        "cut": [number for number, answer in answers if answer["stop"] == LIMIT],
        "unclosed_thoughts": [number for number, answer in answers if not answer["is_closed"]],
    }
    counts: dict[str, Any] = {"answers": len(answers), "ids": ids} | {name: len(found) for name, found in ids.items()}
    counts["with_thought"] = sum(bool(answer["thought"]) for _, answer in answers)
    compared = [record for record in records if "chrf" in record["scores"][side]]
    if compared:
        texts = [record["answers"][side]["text"] for record in compared]
        counts["corpus"] = overlap.score_corpus(texts, [record["reference"] for record in compared])
    return counts


def list_regressions(records: Sequence[Record]) -> dict[str, Any]:
    """Return the rows whose answers became worse: how many, their ids, and the texts of the worst."""
    worse = set(list_changed_rows(records)["worse"])
    drops = []
    for record in records:
        if record["id"] in worse:
            scores = record["scores"]
            drops.append((scores[TUNED][record["check"]] - scores[BASE][record["check"]], record))
    drops.sort(key=lambda drop: (drop[0], drop[1]["id"]))
    texts = [
        {
            "id": record["id"],
            "task": record["task"],
            "check": record["check"],
            "difference": difference,
            "prompt": record["prompt"],
            "reference": record["reference"],
            **{side: record["answers"][side]["text"] for side in (BASE, TUNED)},
        }
        for difference, record in drops[:_MOST_REGRESSIONS]
    ]
    return {"rows": len(drops), "ids": [record["id"] for _, record in drops], "texts": texts}


def _compare_tasks(records: Sequence[Record]) -> dict[str, tuple[dict[str, Any], PairedResult]]:
    """Return the results of each task, with p-values after Holm's correction; {} = the rows name no task."""
    names = sorted({record["task"] for record in records})
    if names in ([], [_UNNAMED]):
        return {}
    results = [compare([record for record in records if record["task"] == name], BASE, TUNED) for name in names]
    corrected = statistics.correct_p_values([result.p_value for result in results])
    tasks = {}
    for name, result, p_value in zip(names, results, corrected, strict=True):
        resolution = statistics.resolve(
            result.difference, p_value, prompts=result.prompts, decisive=result.better + result.worse
        )
        resolved = result._replace(resolution=resolution)
        members = [record for record in records if record["task"] == name]
        checks = sorted({record["check"] for record in members})
        described = describe_result(resolved) | {"holm_p": p_value, "checks": checks}
        tasks[name] = (described | {"ids": list_changed_rows(members)}, resolved)
    return tasks


def _compare_checks(records: Sequence[Record]) -> dict[str, Any]:
    """Return the results of each check; of checks that are right or wrong also McNemar's test."""
    checks = {}
    for name in sorted({name for record in records for name in record["scores"][BASE]}):
        scored = [record for record in records if name in record["scores"][BASE]]
        described = describe_result(compare(scored, BASE, TUNED, check=name)) | {"rows": len(scored)}
        described["ids"] = list_changed_rows(scored, check=name)
        prompts = [record["prompt_key"] for record in scored]
        values = {
            side: statistics.average_by_prompt([record["scores"][side][name] for record in scored], prompts)
            for side in (BASE, TUNED)
        }
        if all(np.isin(scores, (0.0, 1.0)).all() for scores in values.values()):
            table, p_value = statistics.compute_mcnemar(values[BASE] == 1, values[TUNED] == 1)
            described["mcnemar"] = {"table": table, "p": p_value}
            described["rates"] = {
                side: statistics.describe_interval(statistics.compute_rate(int(scores.sum()), len(scores)))
                for side, scores in values.items()
            }
        checks[name] = described
    return checks


def _rank(
    tasks: Mapping[str, tuple[Mapping[str, Any], PairedResult]], resolutions: set[str], *, reverse: bool
) -> list[str]:
    """Return the tasks with one of some resolutions, by the lower end of their interval and not by their mean."""
    chosen = [name for name, (_, result) in tasks.items() if result.resolution in resolutions]
    return sorted(chosen, key=lambda name: tasks[name][1].difference.low, reverse=reverse)


def _get_margin(check: str) -> float:
    """Return the difference of a check that is still a tie."""
    return CHECKS[check].tie_margin if check in CHECKS else 0.0
