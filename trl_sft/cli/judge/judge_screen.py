"""What the command says while a model judges.

Inputs: the judge, its plan and its result. Outputs: lines. Not here: the numbers (`evaluation.judging`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trl_sft.cli.judge.judges import Judge
from trl_sft.evaluation.answer_pairs import BASE, TUNED, AnswerPair
from trl_sft.evaluation.judging import audit, length_control, pair_outcomes
from trl_sft.evaluation.judging.audit import AuditResult
from trl_sft.evaluation.judging.endpoint_judge import EndpointJudge
from trl_sft.evaluation.judging.judge_questions import JudgeQuestion
from trl_sft.evaluation.judging.judge_replies import INVALID, MISSING
from trl_sft.evaluation.judging.rubric import RubricDimension
from trl_sft.evaluation.judging.rubric_scores import UNVERIFIED
from trl_sft.evaluation.model_calls import CALLS, ERRORS, MONEY

_STOPS = {
    CALLS: "by --max-calls: the result is partial",
    MONEY: "by --max-cost: the result is partial",
    ERRORS: "after several requests in a row without an answer",
}
_LENGTH_WARNINGS = {
    length_control.FAR: "it is more than 10 points from the raw rate, so length decides much",
    length_control.ONE_SIDED: "one side's answers are always longer, so it is an extrapolation",
    length_control.FEW: f"fewer than {length_control.LEAST_PAIRS} prompts",
    length_control.SEPARATED: "the preferences do not determine it",
}


def describe_plan(
    judge: Judge, pairs: Sequence[AnswerPair], *, dimensions: Sequence[RubricDimension], warnings: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield who judges what."""
    if isinstance(judge, EndpointJudge):
        yield "judge", f"{judge.caller.endpoint.model} at {judge.caller.endpoint.url}"
    else:
        yield "judge", f"{judge.path}, by the probabilities of its labels"
    equal = sum(map(pair_outcomes.have_equal_answers, pairs))
    yield "pairs", f"{len(pairs):,} prompts, each judged in both orders; {equal:,} with equal answers are ties"
    if dimensions:
        yield "scores", f"1 to 5 for {', '.join(dimension.name for dimension in dimensions)}"
    for warning in warnings:
        yield "warning", warning


def describe_cost(
    judge: Judge, questions: Sequence[JudgeQuestion], counter: tuple[Callable[[str], int], str]
) -> Iterator[tuple[str, str]]:
    """Yield how many calls are planned and what they may cost; `counter`: counts tokens, and what it counts with."""
    if not isinstance(judge, EndpointJudge):
        missing = judge.count_missing(questions)
        yield "planned", f"{missing:,} of {len(questions):,} questions; equal ones and those in judging.jsonl are saved"
        return
    plan = judge.plan(questions, counter[0])
    yield (
        "planned",
        f"{plan.calls:,} calls for {plan.questions:,} questions; equal ones and those in judging.jsonl are saved",
    )
    if plan.calls:
        yield "", f"about {plan.input_tokens:,} tokens of prompts ({counter[1]}), {plan.output_tokens:,} of replies"
        if judge.caller.limits.has_prices:
            yield "", f"about {plan.cost:.4g} in money, at most {plan.most_cost:.4g} without retries"
        else:
            yield "", "no prices are named, so no cost (--input-price, --output-price)"


def describe_calls(judge: Judge) -> Iterator[tuple[str, str]]:
    """Yield what calls were made and saved."""
    if not isinstance(judge, EndpointJudge):
        yield "scored", f"{judge.counts['made']:,} questions, {judge.counts['saved']:,} from judging.jsonl"
        if beyond := judge.counts["beyond_positions"]:
            yield "", f"{beyond:,} questions are longer than the judge was trained for"
        return
    counts = judge.caller.counts
    text = f"{counts.made:,} made, {counts.saved:,} saved by judging.jsonl, {counts.failed:,} requests failed"
    yield "calls", text + (f", {counts.not_made:,} not made" if counts.not_made else "")
    tokens = f"{counts.input_tokens:,} tokens of prompts, {counts.output_tokens:,} of replies"
    yield "", tokens + (f"; cost {counts.cost:.4g}" if judge.caller.limits.has_prices else "")
    if counts.unmetered:
        yield "", f"{counts.unmetered:,} calls without a count of tokens; their cost is the most that they can cost"
    if judge.caller.stop:
        yield "stopped", _STOPS[judge.caller.stop]


def describe_audit(result: AuditResult) -> Iterator[tuple[str, str]]:
    """Yield how the judge did in the audit."""
    words = {True: "passed", False: "failed", None: "not finished"}
    yield "audit", f"{words[result.has_passed]}: {result.passed_rows} of {result.rows} rows are right"
    for kind, (passed, rows) in result.kinds.items():
        if passed < rows:
            yield "", f"{kind}: in {rows - passed} of {rows} rows it {audit.KINDS[kind]}"


def describe_result(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the verdict, the win rates with their checks, and the scores."""
    yield "verdict", result["verdict"]["text"]
    yield from _describe_rates("all", result)
    for name, task in result["tasks"].items():
        yield from _describe_rates(f"task {name}", task)
    for name, found in result["dimensions"].items():
        yield "score", f"{name}: {_describe_dimension(found)}"
    if result[INVALID]:
        yield (
            "invalid",
            f"{result[INVALID]:,} pairs have a reply that cannot be read; they are left out, and are no ties",
        )


def _describe_rates(name: str, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a win rate, and beside it what tells whether it can be relied on."""
    if result["win_rate"] is None:
        yield "win rate", f"{name}: no pair has a verdict"
        return
    counts = f"{result[TUNED]:,} won, {result['tie']:,} tied, {result[BASE]:,} lost"
    yield "win rate", f"{name}: {_describe_interval(result['win_rate'])}, {counts}: {result['resolution']}"
    controlled = result["length_controlled"]
    rate = controlled["win_rate"]
    text = f"at equal length {_describe_interval(rate)}" if rate else "at equal length not known"
    reasons = [_LENGTH_WARNINGS[word] for word in controlled["warnings"]]
    yield "", text + (f" ({'; '.join(reasons)})" if reasons else "")
    yield (
        "",
        (
            f"swap consistency {_describe_interval(result['swap_consistency'])}; "
            f"first position chosen {_describe_interval(result['first_position_rate'])}"
        ),
    )


def _describe_dimension(result: Mapping[str, Any]) -> str:
    """Return the scores of a dimension."""
    left_out = [f"{result[word]:,} {word.replace('_', ' ')}" for word in (UNVERIFIED, INVALID, MISSING) if result[word]]
    end = f"; {', '.join(left_out)}" if left_out else ""
    if result["base"] is None:
        return f"no scores{end}"
    difference = result["difference"]
    text = f"{result['base']:.2f} -> {result['tuned']:.2f} ({difference['value']:+.2f}, 95% interval "
    text += f"{difference['low']:+.2f} to {difference['high']:+.2f}), {result['better']:,} better, "
    return text + f"{result['tied']:,} tied, {result['worse']:,} worse: {result['resolution']}{end}"


def _describe_interval(interval: Mapping[str, float] | None) -> str:
    """Return a share with its interval."""
    if interval is None:
        return "not known"
    return f"{interval['value']:.0%} [{interval['low']:.0%}, {interval['high']:.0%}]"
