"""A model judges the answers of an evaluation, top to bottom: pairs, plan, audit, verdicts, scores, result, files.

Inputs: a folder that `evaluate` has written to, and the options of the command. Outputs: `judging.jsonl` (every prompt
and answer), `verdicts.jsonl` (a line for each pair), `evaluation.judge` in `eval.json`, and the exit code. Not here:
the arguments (`cli.judge`), and what is asked and computed (`evaluation.judging`).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import console, errors, json_output, run_folder, user_paths
from trl_sft.cli.judge import judge_screen, judges
from trl_sft.cli.judge.judges import Judge
from trl_sft.errors import DataError, Fault
from trl_sft.evaluation import answer_pairs, conclusion, eval_packages
from trl_sft.evaluation.answer_pairs import AnswerPair
from trl_sft.evaluation.call_log import CallLog
from trl_sft.evaluation.judging import audit, judge_result, pair_outcomes, rubric, rubric_scores
from trl_sft.evaluation.judging.judge_questions import JudgeQuestion
from trl_sft.evaluation.judging.judge_replies import INVALID, MISSING
from trl_sft.evaluation.judging.pair_outcomes import PairOutcome
from trl_sft.evaluation.judging.rubric import RubricDimension
from trl_sft.evaluation.judging.rubric_scores import PairScores, ScoreRequest
from trl_sft.reports import page, run_files

_EVALUATION = "evaluation"  # the key of eval.json
_MOST_EXAMPLES = 3  # of invalid replies in a message


class _Questions(NamedTuple):
    """All that is asked."""

    audit: list[JudgeQuestion]  # [] = it is skipped, or nothing else is asked
    pairs: list[JudgeQuestion]
    scores: list[ScoreRequest]

    def list_all(self) -> list[JudgeQuestion]:
        """Return every question in the order in which they are asked."""
        return [*self.audit, *self.pairs, *(request.question for request in self.scores)]


def run(options: argparse.Namespace) -> int:
    """Let a model judge; return the exit code. Raises UserError."""
    eval_packages.require_packages("judge", *eval_packages.STATISTICS, extra=eval_packages.JUDGE_EXTRA)
    folder: Path = options.run
    pairs, evaluation = _read_evaluation(folder)
    dimensions = _choose_dimensions(options)
    warnings = judges.check(options, folder, evaluation)
    chosen = _select(pairs, rows=options.rows, seed=options.seed)
    output: Path = options.output or folder
    user_paths.check("--output", output, user_paths.FOLDER, is_output=True)
    output.mkdir(parents=True, exist_ok=True)
    with CallLog(output / run_folder.JUDGING) as log:
        judge = judges.build(options, log)
        questions = _build_questions(chosen, dimensions, options)
        console.print_lines(judge_screen.describe_plan(judge, chosen, dimensions=dimensions, warnings=warnings))
        console.print_lines(judge_screen.describe_cost(judge, questions.list_all(), judges.find_token_counter(folder)))
        try:
            outcomes, scores, audited = _judge(judge, chosen, dimensions, questions=questions, options=options)
        finally:
            console.print_lines(judge_screen.describe_calls(judge))
    facts = {
        "judge": judges.describe(judge, options),
        "audit": audited,
        "language": options.language,
        "seed": options.seed,
        "warnings": warnings,
        **judges.describe_cost(judge),
    }
    described = rubric_scores.describe(outcomes, scores, dimensions)
    result = judge_result.build(outcomes, dimensions=described, facts=facts)
    _write(output, outcomes, scores, result=result)
    console.print_lines(judge_screen.describe_result(result))
    if (output / run_folder.RUN).is_file():
        page.write_at_end(output)
    calls = judges.describe_calls(judge)
    verdicts = output / run_folder.VERDICTS
    json_output.add_values(output=output, verdicts=verdicts, judge=result, calls=calls)
    console.say(f"wrote     {run_folder.shorten_path(verdicts.absolute())}, {run_folder.EVAL}, {run_folder.JUDGING}")
    return errors.EXIT_DONE


def _read_evaluation(folder: Path) -> tuple[list[AnswerPair], dict[str, Any]]:
    """Return the pairs of an evaluation, and what eval.json has of it. Raises DataError, RecipeError."""
    user_paths.check("", folder, user_paths.FOLDER)
    path = folder / run_folder.EVALUATION
    pairs = answer_pairs.read_records(run_files.read_lines(path)) if path.is_file() else []
    if not pairs:
        problem = "there are no answers of base and tuned model to judge"
        fix = f"Run `{console.get_python_command()} -m trl_sft evaluate {folder}` first."
        raise DataError(Fault(str(path), problem, fix, code="votes.no_pairs"))
    evaluation = run_folder.read_json(folder / run_folder.EVAL).get(_EVALUATION)
    return pairs, evaluation if isinstance(evaluation, dict) else {}


def _choose_dimensions(options: argparse.Namespace) -> list[RubricDimension]:
    """Return the dimensions that are scored; none unless an option names them. Raises DataError."""
    names = options.dimensions or ("all" if options.rubric else "")
    return rubric.choose_dimensions(rubric.read_rubric(options.rubric), names) if names else []


def _select(pairs: Sequence[AnswerPair], *, rows: int | None, seed: int) -> list[AnswerPair]:
    """Return pairs in a drawn order, so that those that are judged before a budget ends stand for all."""
    drawn = list(pairs)
    random.Random(seed).shuffle(drawn)
    return drawn[:rows]


def _build_questions(
    pairs: Sequence[AnswerPair], dimensions: Sequence[RubricDimension], options: argparse.Namespace
) -> _Questions:
    """Return all that is asked."""
    in_pairs = pair_outcomes.build_questions(pairs, language=options.language)
    scores = rubric_scores.plan_scores(pairs, dimensions, language=options.language)
    is_audited = not options.skip_audit and bool(in_pairs or scores)
    return _Questions(audit.build_questions() if is_audited else [], in_pairs, scores)


def _judge(
    judge: Judge,
    pairs: Sequence[AnswerPair],
    dimensions: Sequence[RubricDimension],
    *,
    questions: _Questions,
    options: argparse.Namespace,
) -> tuple[list[PairOutcome], dict[str, PairScores], dict[str, Any]]:
    """Return the outcome of each pair, the scores by pair, and how the judge did in the audit. Raises UserError."""
    ask: Callable[..., Any] = judge.ask
    audited = _audit(judge, questions.audit, is_skipped=options.skip_audit)
    outcomes = pair_outcomes.combine(pairs, ask(questions.pairs, label="pairs"))
    judges.refuse_errors(judge)
    _refuse_invalid([outcome.verdict for outcome in outcomes], "pairs", _list_problems(outcomes))
    judgements = ask([request.question for request in questions.scores], label="scores")
    judges.refuse_errors(judge)
    scores = rubric_scores.collect(pairs, dimensions, requests=questions.scores, judgements=judgements)
    for dimension in dimensions:
        values = [score.value for by_name in scores.values() for score in by_name[dimension.name].values()]
        problems = [judgement.problem for judgement in judgements if judgement.choice == INVALID]
        _refuse_invalid(values, f"scores of {dimension.name}", problems)
    return outcomes, scores, audited


def _audit(judge: Judge, questions: Sequence[JudgeQuestion], *, is_skipped: bool) -> dict[str, Any]:
    """Return how the judge did in the audit. Raises DataError for a judge that fails."""
    if not questions:
        return audit.SKIPPED if is_skipped else audit.NOT_NEEDED
    result = audit.grade(judge.ask(questions, label="audit"))
    judges.refuse_errors(judge)
    console.print_lines(judge_screen.describe_audit(result))
    if result.has_passed is False:
        problem = f"the judge fails the audit: {result.passed_rows} of {result.rows} rows are right, and "
        problem += f"{audit.LEAST_SHARE:.0%} are needed, and half of each kind; for example {result.failed[0]}"
        fix = "Name a better judge. To see what this one says all the same, add --skip-audit: the result is marked."
        raise DataError(Fault("the judge", problem, fix, code="judge.failed_audit"))
    return result.describe()


def _list_problems(outcomes: Sequence[PairOutcome]) -> list[str]:
    """Return what is wrong with the invalid replies on pairs."""
    return [order.problem for outcome in outcomes for order in outcome.orders if order.choice == INVALID]


def _refuse_invalid(values: Sequence[object], noun: str, problems: Sequence[str]) -> None:
    """Raise DataError if more than 2% of what was judged is invalid; `values`: a verdict or a score each."""
    invalid = sum(value == INVALID for value in values)
    judged = sum(value not in (MISSING, rubric_scores.UNVERIFIED) for value in values)
    if not judged or invalid <= judge_result.MOST_INVALID * judged:
        return
    reasons = console.format_names(list(dict.fromkeys(problems)), most=_MOST_EXAMPLES)
    problem = f"{invalid:,} of {judged:,} {noun} are invalid after a retry, more than {judge_result.MOST_INVALID:.0%}: "
    problem += f"the judge does not reply as it is told to ({reasons})"
    fix = "Name a better judge, raise --max-tokens where replies are cut, or serve it with support for JSON Schema."
    raise DataError(Fault("the judge", problem, fix, code="judge.invalid_replies"))


def _write(
    output: Path, outcomes: Sequence[PairOutcome], scores: dict[str, PairScores], *, result: dict[str, Any]
) -> None:
    """Write verdicts.jsonl, and the judge's part of eval.json."""
    lines = []
    for outcome in sorted(outcomes, key=lambda outcome: _sort_key(outcome.pair.name)):
        if outcome.verdict != MISSING:
            by_name = scores.get(outcome.pair.name, {})
            described = {
                name: {side: score.value for side, score in by_side.items()} for name, by_side in by_name.items()
            }
            line = json.dumps(outcome.describe() | {"scores": described}, ensure_ascii=False)
            lines.append(line.encode("utf-8", "replace").decode() + "\n")  # half a character cannot be written
    run_folder.write_text(output / run_folder.VERDICTS, "".join(lines))
    content = run_folder.read_json(output / run_folder.EVAL)
    evaluation = content.get(_EVALUATION)
    content[_EVALUATION] = conclusion.add_part(evaluation if isinstance(evaluation, dict) else {}, judge=result)
    run_folder.write_text(output / run_folder.EVAL, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _sort_key(name: str) -> tuple[str, int]:
    """Return what sorts `row 2` before `row 10`."""
    kind, _, number = name.rpartition(" ")
    return kind, int(number) if number.isdecimal() else 0
