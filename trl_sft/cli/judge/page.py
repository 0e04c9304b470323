"""A page on which people judge the answers of base and tuned model.

Inputs: the options of the command. Outputs: an HTML file, its key, and the exit code. Not here: what is on the page
(`reports.judge_page`), and the reading of votes (`cli.votes`).
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from trl_sft import console, errors, json_output, run_folder, user_paths
from trl_sft.cli import arguments

if TYPE_CHECKING:
    from trl_sft.evaluation.answer_pairs import AnswerPair


def run(options: argparse.Namespace) -> int:
    """Write the page and its key; return the exit code."""
    user_paths.check("--output", options.output, user_paths.FILE, is_output=True)
    from trl_sft.evaluation import blind_items
    from trl_sft.reports import judge_page

    source, pairs = _read_pairs(options.run, options.answers)
    blind = blind_items.build(pairs, seed=options.seed, max_pairs=options.rows, shows_reference=options.show_reference)
    if not blind.key["pairs"]:
        raise errors.DataError(_explain_no_pairs(options.run / source, pairs=len(pairs)))
    key = options.key or options.output.with_name(f"{options.output.stem}.key.json")
    if key == options.output:
        fix = "Name another file: the key says which model each answer is of."
        raise errors.RecipeError(errors.Fault("--key", "it is the page itself", fix, code="run.bad_option"))
    _check_earlier_key(key, page=blind.key["page"])
    arguments.write_output("--key", key, json.dumps(blind.key, indent=1) + "\n")
    arguments.write_output("--output", options.output, judge_page.format_page(blind.items, blind.key["page"]))
    counts = {"pairs": blind.key["pairs"], "items": len(blind.items), "equal_answers": len(blind.key["equal_answers"])}
    json_output.add_values(output=options.output, key=key, page=blind.key["page"], **counts)
    console.print_lines(
        [
            ("answers", f"{len(pairs)} prompts of {source}"),
            ("page", f"{options.output}: {len(blind.items)} items, {blind.key['pairs']} pairs and checks of the rater"),
            ("key", f"{key}: keep it, and send the page alone"),
            ("equal", f"{counts['equal_answers']} pairs have equal answers and are not shown"),
        ]
    )
    command = f"{console.get_python_command()} -m trl_sft votes {shlex.quote(str(key))}"
    console.say(f"Next: open the page in a browser, vote, then: {command} votes-NAME.json")
    return errors.EXIT_DONE


def _read_pairs(folder: Path, chosen: str | None) -> tuple[str, list[AnswerPair]]:
    """Return the file of the answers, and the pairs in it. Raises RecipeError."""
    from trl_sft.evaluation import answer_pairs
    from trl_sft.reports import run_files

    run = run_files.read_run(folder)
    for damage in run.damaged:
        console.say(f"{folder}/{damage}")
    evaluation = folder / run_folder.EVALUATION
    if chosen == "samples" or (chosen is None and not evaluation.is_file()):
        return run_folder.SAMPLES, answer_pairs.read_pairs(run.samples)
    if not evaluation.is_file():
        problem = "the run has no answers of `evaluate`"
        fix = f"Run `{console.get_python_command()} -m trl_sft evaluate {shlex.quote(str(folder))}` first."
        raise errors.RecipeError(errors.Fault(str(evaluation), problem, fix, code="votes.no_pairs"))
    return run_folder.EVALUATION, answer_pairs.read_records(run_files.read_lines(evaluation))


def _check_earlier_key(path: Path, *, page: str) -> None:
    """Refuse to replace the key of another page: votes on that page could no longer be read. Raises RecipeError."""
    user_paths.check("--key", path, user_paths.FILE, is_output=True)
    earlier = run_folder.read_json(path) if path.is_file() else {}
    if earlier.get("page", page) != page:
        problem = f"{path} is the key of another page, {earlier['page']}: votes on it could no longer be read"
        fix = "Name another file with -o or --key. If nobody has voted on that page, remove the file."
        raise errors.RecipeError(errors.Fault("--key", problem, fix, code="run.file_exists"))


def _explain_no_pairs(answers: Path, *, pairs: int) -> errors.Fault:
    """Return the fault of a run that has nothing to judge."""
    path = str(answers)
    if pairs:
        problem = f"both models gave the same answer to each of {pairs} prompts"
        return errors.Fault(path, problem, "Train longer, or judge another run.", code="votes.no_pairs")
    problem = "there is no prompt that both base and tuned model answered"
    fix = "Set `data.eval_fraction` or `evaluate.prompts`, and run the recipe again."
    return errors.Fault(path, problem, fix, code="votes.no_pairs")
