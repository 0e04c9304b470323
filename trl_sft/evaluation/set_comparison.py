"""The evaluation set held against the training set: the same tasks, in the same shares, and no prompt in both.

Inputs: the formatted training rows, and the prompts of the evaluation. Outputs: a mapping for JSON, and lines for the
terminal that name each row by file and number. Whole rows that occur in both sets are removed by `data.drop_leaked`
before; here prompts are compared (`data.text_matches`). Not here: what a command does about it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trl_sft.console import format_names, format_number_of, format_rows
from trl_sft.data.formats import TEXT
from trl_sft.data.formatted_columns import read_columns
from trl_sft.data.messages import unescape
from trl_sft.data.pipeline import Split
from trl_sft.data.rows import RunRows
from trl_sft.data.text_matches import EXACT, LEAKS, NEAR, NUMBERS, OVERLAP, PHRASE, ReferenceIndex, TextMatch
from trl_sft.row_progress import RowProgress

LEAST_ITEMS = 30  # of a task: with fewer nothing about it is resolved (statistics.LEAST_PROMPTS)
_MOST_ROWS = 200_000  # training rows whose prompts are compared: about a minute
_BATCH_ROWS = 1000
_SAMPLE_ROWS = 1000  # in which the wording of prompts is looked for
_MOST_MATCHES = 100  # that the mapping lists; their number is that of all
_ALPHA = 0.05
_LEAST_SHARE = 0.1  # difference of two shares that is named
_KINDS = (EXACT, OVERLAP, NEAR, NUMBERS, PHRASE)  # the strongest first
_WORDS = {EXACT: "equal", OVERLAP: "for the most part", NEAR: "nearly equal"}


class EvaluationPrompt(NamedTuple):
    """A prompt of the evaluation."""

    task: str  # "" = none
    prompt: Any  # a text, or messages
    place: str  # its file and row, for messages


def compare(rows: RunRows, asked: Sequence[EvaluationPrompt]) -> dict[str, Any]:
    """Return how the evaluation prompts stand to the training rows.

    Args:
        rows: of the run; for each training row its task and prompt count.
        asked: the evaluation prompts.

    Returns:
        `tasks` by name with counts and shares, `missing_tasks`, `small_tasks`, `chi_square`, `leaks` (evaluation
        prompts by the strongest match), and the `matches` with the places of both rows.

    """
    train = rows.train
    numbers = np.unique(train.order)
    tasks = _count_tasks(train, numbers)
    compared = numbers[:_MOST_ROWS]
    matches = _find_matches(train, compared, asked)
    strongest = _choose_strongest(matches)
    counts = Counter(match.kind for match in strongest)
    return {
        "training_rows": len(numbers),
        "compared_rows": len(compared),
        "evaluation_rows": len(asked),
        **_compare_tasks(tasks, Counter(prompt.task for prompt in asked)),
        "leaks": {kind: counts[kind] for kind in _KINDS},
        "matches": [_describe_match(match, train, asked) for match in strongest[:_MOST_MATCHES]],
    }


def read_evaluation_sets(rows: RunRows) -> list[EvaluationPrompt]:
    """Return the prompts of the run's evaluation sets; of several sets a row without a task has the set's name."""
    prompts = []
    for name, split in rows.eval.items():
        for number, task, prompt in _read_prompts(split, np.unique(split.order)):
            label = task or (name if len(rows.eval) > 1 else "")
            prompts.append(EvaluationPrompt(label, prompt, split.row_name(number)))
    return prompts


def can_compare(rows: RunRows) -> bool:
    """Tell whether there is anything to compare: a stream is not read, and texts have no prompts."""
    return not rows.streaming and rows.row_type != TEXT


def list_lines(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield lines on what does not fit; none where all does."""
    if result["missing_tasks"]:
        yield "tasks", f"no evaluation row has the task {format_names(result['missing_tasks'])}, which is trained"
    if result["small_tasks"]:
        counts = [f"{name} ({result['tasks'][name]['evaluation']})" for name in result["small_tasks"]]
        yield "tasks", f"fewer than {LEAST_ITEMS} evaluation rows, too few to resolve anything: {format_names(counts)}"
    if line := _describe_shares(result):
        yield "tasks", line
    leaks = {kind: result["leaks"][kind] for kind in LEAKS if result["leaks"][kind]}
    if leaks:
        listed = ", ".join(f"{number:,} {_WORDS[kind]}" for kind, number in leaks.items())
        first = result["matches"][0]
        verb = "is" if sum(leaks.values()) == 1 else "are"
        text = f"{format_number_of(sum(leaks.values()), 'evaluation prompt')} {verb} in training rows ({listed}); "
        text += f"{first['evaluation']} is in {first['training']}"
        yield "leaks", text
        yield "", "Remove these training rows, or name other rows to evaluate."
    if result["leaks"][NUMBERS]:
        number = format_number_of(result["leaks"][NUMBERS], "evaluation prompt")
        verb = "differs" if result["leaks"][NUMBERS] == 1 else "differ"
        yield "leaks", f"{number} {verb} from a training prompt in numbers alone"
    if result["leaks"][PHRASE]:
        number = format_number_of(result["leaks"][PHRASE], "evaluation prompt")
        phrases = [match for match in result["matches"] if match["kind"] == PHRASE]
        place = f": {phrases[0]['evaluation']} with {phrases[0]['training']}" if phrases else ""
        verb = "has" if result["leaks"][PHRASE] == 1 else "have"
        yield "leaks", f"{number} {verb} eight words in a row in common with a training prompt, often by chance{place}"
    if (leaks or result["leaks"][PHRASE]) and result["compared_rows"] < result["training_rows"]:
        yield "leaks", f"the first {format_rows(result['compared_rows'])} of {result['training_rows']:,} were compared"


def _count_tasks(split: Split, numbers: np.ndarray) -> Counter[str]:
    """Return how many training rows each task has; "" = none."""
    if "task" not in split.rows.column_names:
        return Counter({"": len(numbers)})
    values = split.rows.select_columns(["task"]).with_format("arrow")[:]["task"].to_pylist()
    return Counter(values[number] or "" for number in numbers.tolist())


def _compare_tasks(training: Counter[str], evaluation: Counter[str]) -> dict[str, Any]:
    """Return the table of tasks, and which do not fit; nothing is compared where one of the sets names no task."""
    names = sorted(name for name in {*training, *evaluation} if name)
    is_labelled = any(training[name] for name in names) and any(evaluation[name] for name in names)
    totals = [sum(counts[name] for name in names) for counts in (training, evaluation)]
    tasks = {
        name: {
            "training": training[name],
            "evaluation": evaluation[name],
            "training_share": training[name] / totals[0] if totals[0] else 0.0,
            "evaluation_share": evaluation[name] / totals[1] if totals[1] else 0.0,
        }
        for name in names
    }
    trained = [name for name in names if training[name] and is_labelled]
    return {
        "tasks": tasks,
        "missing_tasks": [name for name in trained if not evaluation[name]],
        "small_tasks": [name for name in trained if 0 < evaluation[name] < LEAST_ITEMS],
        "chi_square": _test_shares([[counts[name] for name in names] for counts in (training, evaluation)])
        if is_labelled
        else None,
    }


def _test_shares(table: Sequence[Sequence[int]]) -> dict[str, float] | None:
    """Return the chi-square test of equal shares; None = fewer than two tasks, or scipy is not installed."""
    if len(table[0]) < 2:
        return None
    with contextlib.suppress(ImportError):
        from scipy import stats

        result = stats.chi2_contingency(np.array(table), correction=False)
        return {"statistic": float(result.statistic), "degrees": int(result.dof), "p": float(result.pvalue)}
    return None


def _describe_shares(result: Mapping[str, Any]) -> str:
    """Return which shares differ; "" = none by a tenth, or the counts cannot tell."""
    test = result["chi_square"]
    if test is None or test["p"] >= _ALPHA:
        return ""
    differing = [
        f"{name} {task['training_share']:.0%} of training rows, {task['evaluation_share']:.0%} of evaluation rows"
        for name, task in result["tasks"].items()
        if abs(task["training_share"] - task["evaluation_share"]) >= _LEAST_SHARE
    ]
    return f"shares differ (chi-square test, p = {test['p']:.2g}): {'; '.join(differing)}" if differing else ""


def _read_prompts(split: Split, numbers: np.ndarray) -> Iterator[tuple[int, str, Any]]:
    """Yield number, task and prompt of rows, or their text."""
    columns = [name for name in ("prompt", "text", "task") if name in split.rows.column_names]
    rows = split.rows.select_columns(columns).with_format("arrow")
    for start in range(0, len(numbers), _BATCH_ROWS):
        chosen = numbers[start : start + _BATCH_ROWS].tolist()
        batch = read_columns(rows[chosen])
        tasks = batch.get("task") or [""] * len(chosen)
        for number, task, prompt in zip(chosen, tasks, batch.get("prompt") or batch["text"], strict=True):
            yield number, task or "", unescape(prompt)


def _find_matches(train: Split, numbers: np.ndarray, asked: Sequence[EvaluationPrompt]) -> list[TextMatch]:
    """Return all matches; `text` is the number of a training row, `reference` that of an evaluation prompt."""
    sample = [text for _, _, prompt in _read_prompts(train, numbers[:_SAMPLE_ROWS]) for text in _list_texts(prompt)[:1]]
    index = ReferenceIndex([_list_texts(prompt.prompt)[-1] for prompt in asked], sample)
    matches = []
    with RowProgress("Comparing prompts", len(numbers)) as progress:
        for number, _, prompt in _read_prompts(train, numbers):
            for text in _list_texts(prompt):
                matches += index.find(text, number)
            progress.update(1)
    return matches


def _list_texts(prompt: Any) -> list[str]:
    """Return what of a prompt is compared: each turn of the user, and all of them up to each; the last is the whole."""
    if isinstance(prompt, str):
        return [prompt]
    turns = [str(turn.get("content") or "") for turn in prompt if turn.get("role") == "user"]
    if not turns:
        return [str(prompt[-1].get("content") or "") if prompt else ""]
    return [*turns[1:], *("\n".join(turns[:end]) for end in range(1, len(turns) + 1))]


def _choose_strongest(matches: Sequence[TextMatch]) -> list[TextMatch]:
    """Return the strongest match of each evaluation prompt, the strongest first."""
    best: dict[int, TextMatch] = {}
    for match in matches:
        if match.reference not in best or _rank(match) < _rank(best[match.reference]):
            best[match.reference] = match
    return sorted(best.values(), key=lambda match: (*_rank(match), match.reference))


def _rank(match: TextMatch) -> tuple[int, float]:
    """Return the place of a match among others; the strongest has the lowest."""
    return _KINDS.index(match.kind), -match.similarity


def _describe_match(match: TextMatch, train: Split, asked: Sequence[EvaluationPrompt]) -> dict[str, Any]:
    """Return a match with the places of both rows."""
    return {
        "kind": match.kind,
        "similarity": match.similarity,
        "evaluation_row": match.reference,
        "evaluation": asked[match.reference].place,
        "training": train.row_name(match.text),
    }
