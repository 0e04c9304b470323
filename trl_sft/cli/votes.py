"""`votes`: reads the votes of people, and says which model they prefer and whether they can be relied on.

Inputs: the key of a page, files with votes, a judge's verdicts. Outputs: lines on the terminal, a JSON file where one
is named, and the exit code. Not here: the page (`cli.judge`), and what is counted (`evaluation.human_votes`).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_sft import console, errors, json_output, run_folder
from trl_sft.cli import arguments

if TYPE_CHECKING:
    from trl_sft.evaluation.human_votes import JudgeResult, RaterResult, VoteResult, WinCount
    from trl_sft.evaluation.vote_files import PageKey

_NOTES = 10  # on the screen
_EPILOG = """A rater who fails a check is named and not counted: who calls one of two identical answers better in half
of such cases, contradicts half of the first votes on repeated pairs, or chooses one side far more often (p < 0.01)."""


def main(argv: Sequence[str]) -> int:
    """Read votes and say what they tell; return the exit code."""
    parser = arguments.create_parser(
        "votes KEY VOTES [VOTES ...] [--run RUN] [--judge FILE] [--all-raters] [-o FILE]",
        "Read the votes that people gave on a page of `judge`: the tuned model's win rate, how far raters agree with "
        "each other and with a judge, and who failed the checks.",
        example="votes judge.key.json votes-ana.json votes-wei.json -o human.json",
        epilog=_EPILOG,
    )
    parser.add_argument("key", metavar="KEY", type=Path, help="the key that `judge` wrote")
    parser.add_argument("votes", metavar="VOTES", nargs="+", type=Path, help="a file that the page downloaded")
    parser.add_argument("--judge", metavar="FILE", type=Path, help="a judge's verdicts: JSON lines of pair and verdict")
    parser.add_argument("--all-raters", action="store_true", help="count raters who failed a check too")
    parser.add_argument(
        "--run", metavar="RUN", type=Path, help="add the result to eval.json and the report of this run"
    )
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write the result as JSON too")
    options = parser.parse_args(argv)
    from trl_sft.evaluation import eval_packages

    eval_packages.require_packages("votes", *eval_packages.STATISTICS)
    from trl_sft.evaluation import human_votes, vote_files
    from trl_sft.reports import page

    key = vote_files.read_key(options.key)
    raters = vote_files.read_votes(options.votes, key)
    verdicts = vote_files.read_verdicts(options.judge, key) if options.judge else None
    result = human_votes.count_votes(key, raters, verdicts=verdicts, counts_all=options.all_raters)
    described = {"page": key.page, "equal_answers": len(key.equal_answers), **result.describe()}
    verdict = _add_to_run(options.run, key, described) if options.run else None
    if options.output:
        arguments.write_output("--output", options.output, json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    json_output.add_values(output=options.output, **described)
    if verdict:
        json_output.add_values(verdict=verdict)
    console.print_lines([*_describe_raters(result), *_describe_result(result, equal=len(key.equal_answers))])
    if verdict:
        console.print_lines([("verdict", verdict["text"])])
        page.write_at_end(options.run)
    if options.output:
        console.say(f"wrote     {options.output}")
    return errors.EXIT_DONE


def _add_to_run(folder: Path, key: PageKey, described: Mapping[str, Any]) -> dict[str, Any]:
    """Write the votes into eval.json of a run, and return the verdict on all findings.

    Raises:
        RecipeError: the run is not evaluated.
        DataError: the votes are on other answers.

    """
    from trl_sft.evaluation import answer_pairs, blind_items, conclusion
    from trl_sft.reports import run_files

    content = run_folder.read_json(folder / run_folder.EVAL)
    if not isinstance(content.get("evaluation"), dict):
        problem = "the run has no result of `evaluate` to which votes could be added"
        fix = f"Run `{console.get_python_command()} -m trl_sft evaluate {shlex.quote(str(folder))}` first."
        raise errors.RecipeError(errors.Fault(str(folder), problem, fix, code="votes.not_evaluated"))
    pairs = answer_pairs.read_records(run_files.read_lines(folder / run_folder.EVALUATION))
    pages = [
        blind_items.build(pairs, seed=key.seed, max_pairs=key.pairs, shows_reference=shows).key["page"]
        for shows in (False, True)
    ]
    if key.page not in pages:
        problem = "the page shows other answers than those that `evaluate` scored"
        fix = (
            "Make the page from the answers of `evaluate` (`judge RUN -o PAGE --answers evaluation`), or name its run."
        )
        raise errors.DataError(errors.Fault(str(folder), problem, fix, code="votes.other_answers"))
    content["evaluation"] = conclusion.add_part(content["evaluation"], votes=described)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    run_folder.write_text(folder / run_folder.EVAL, text)
    return dict(content["evaluation"]["verdict"])


def _describe_raters(result: VoteResult) -> Iterator[tuple[str, str]]:
    """Yield a line for each rater, and one for each pair of raters."""
    for rater in result.raters:
        yield "rater", f"{rater.rater}: {rater.votes} of {rater.items} items, {_describe_checks(rater)}"
        for sentence in rater.failed_checks:
            end = "counted all the same (--all-raters)" if rater.rater in result.counted else "not counted"
            yield "", f"failed a check: {sentence}; {end}"
    for first, second, found in result.agreements:
        text = f"{first} and {second}: the same outcome in {found.agreement:.0%} of {found.items} pairs"
        yield "agreement", f"{text}; {found}"


def _describe_checks(rater: RaterResult) -> str:
    """Return how a rater did in the checks."""
    parts = [
        f"identical answers called equal {rater.identical - rater.identical_preferred} of {rater.identical}",
        f"repeated pairs contradicted {rater.contradictions} of {rater.repeats}",
        f"left {rater.left}, right {rater.right}",
    ]
    if rater.median_seconds is not None:
        parts.append(f"median {rater.median_seconds:.0f} s")
    return "; ".join(parts)


def _describe_result(result: VoteResult, *, equal: int) -> Iterator[tuple[str, str]]:
    """Yield the lines about the outcome, the tasks, harm and the judge."""
    if not result.counted:
        yield "result", "no rater passed the checks, so nothing is counted (--all-raters counts them all)"
    else:
        yield "result", _describe_wins(result.wins)
        if equal:
            yield "", f"{equal} more pairs have equal answers and were not shown"
    for task, wins in result.tasks.items():
        yield "task", f"{task}: {_describe_wins(wins)}"
    if any(result.harmful.values()):
        yield "harmful", f"answers called harmful: base {result.harmful['base']}, tuned {result.harmful['tuned']}"
    if result.harm["resolution"] != "not_resolved":
        only = [len(result.harm[name]) for name in ("only_base", "only_tuned")]
        line = f"only the base model's answer in {only[0]} pairs, only the tuned one's in {only[1]}"
        yield "", f"{line}; sign test p = {result.harm['p_value']:.2g}: {result.harm['resolution']}"
    for dimension, part in result.scores.items():
        found = part["difference"]
        line = (
            f"{dimension.replace('_', ' ')}: {part['base']:.2f} -> {part['tuned']:.2f} of 5 in {part['pairs']} pairs, "
        )
        line += f"{found['value']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"
        yield "score", f"{line}: {part['resolution'].replace('_', ' ')}"
    for entry in result.notes[:_NOTES]:
        yield "note", f"{entry['rater']}, {entry['pair']}: {entry['note']}"
    if len(result.notes) > _NOTES:
        yield "", f"{len(result.notes) - _NOTES} more notes, with --json or -o"
    if result.judge:
        yield from _describe_judge(result.judge)


def _describe_wins(wins: WinCount) -> str:
    """Return wins, losses and ties with the win rate."""
    counts = f"tuned {wins.tuned}, base {wins.base}, ties {wins.tie}"
    if wins.win_rate.value is None:
        return f"{counts}; no pair was won, so there is no win rate"
    endings = {"tuned": "people prefer the tuned model", "base": "people prefer the base model"}
    ending = endings.get(wins.winner, "not resolved")
    return f"{counts}; win rate {wins.win_rate} (95%, without ties), sign test p = {wins.p_value:.2g}: {ending}"


def _describe_judge(judge: JudgeResult) -> Iterator[tuple[str, str]]:
    """Yield the lines about a judge's verdicts."""
    yield "judge", f"{judge.verdicts} verdicts, {judge.invalid} invalid; {_describe_wins(judge.wins)}"
    if judge.agreement is None:
        yield "", "no pair has both a verdict and a vote"
        return
    meanings = {
        "as_people": "it agrees with people about as well as they do with each other",
        "indicative": "it agrees with people less than they do with each other, so its win rate is indicative only",
        "unknown": "how well people agree with each other is not known",
    }
    yield "", f"with people on {judge.agreement.items} pairs: {judge.agreement}; {meanings[judge.trust]}"
    if judge.corrected is None:
        yield "", "too few pairs have both to correct the judge's win rate (ten are needed)"
        return
    found = judge.corrected
    text = f"mean score (a tie is a half): judge {found.judge_alone:.0%}, people {found.people_alone:.0%}, corrected "
    yield "", f"{text}{found.value:.0%} [{found.low:.0%}, {found.high:.0%}] (prediction-powered inference, 95%)"
