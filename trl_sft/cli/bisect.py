"""`bisect`: finds the first checkpoint at which a check turns, and names the rows that were trained just before it.

Inputs: a run folder, a check, and options. Outputs: `bisect.jsonl` with the rows, lines on the terminal, and the exit
code. Not here: the search (`cli.evaluate.bisection`), and the rows (`training.row_order`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from trl_sft import console, errors, user_paths
from trl_sft.cli import arguments, option_numbers, resumable

_EPILOG = """\
checks: those of `evaluate --check`. The check passes at a checkpoint if the mean score of its answers is at least the
  bound; without --bound that is halfway between both ends. Bisection finds one turn: there may be others.
Answers are kept in answers.jsonl, as `evaluate` keeps them: what is there is not generated again."""


def main(argv: Sequence[str]) -> int:
    """Find the turn of a check; return the exit code."""
    options = _parse(argv)
    folder = _find_folder(options.run)
    output = options.output or folder
    user_paths.check("--output", output, user_paths.FOLDER, is_output=True)
    console.say("loading   torch, transformers and trl")
    from trl_sft import garbage_collection, upstream_warnings

    with upstream_warnings.quiet():
        with garbage_collection.paused():
            from trl_sft.cli.evaluate import bisection
        with resumable.explain_endings(output):
            return bisection.run(folder, output, options)


def _find_folder(path: Path) -> Path:
    """Return the run folder: the argument itself, or that of a recipe. Raises RecipeError."""
    if path.suffix.lower() not in (".yaml", ".yml") or not path.is_file():
        return path
    from trl_sft import load_recipe

    return load_recipe(path).output_dir


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = arguments.create_parser(
        "bisect RUN CHECK [--data FILE] [--bound X] [--from STEP] [--until STEP] [--to fail|pass]",
        "Find the first checkpoint of a run at which a check turns from pass to fail, and name the rows that were "
        "trained between it and the checkpoint before.",
        example="bisect runs/first numeric --data questions.jsonl",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run folder with checkpoints, or its recipe")
    add("check", metavar="CHECK", help="a check, or TASK=CHECK for the rows of a task")
    add("--data", metavar="FILE", type=Path, help="a JSONL file of prompts; the held-out rows of the run by default")
    add("--max-rows", metavar="N", type=int, help="the most rows; as many held-out rows as the run answered by default")
    add(
        "--bound", metavar="X", type=float, help="the least mean score that passes; halfway between the ends by default"
    )
    add("--from", dest="first", metavar="STEP", type=int, help="the first end: a checkpoint; the earliest by default")
    add("--until", dest="last", metavar="STEP", type=int, help="the other end: a checkpoint; the latest by default")
    add("--to", choices=("fail", "pass"), default="fail", help="look for the first checkpoint that fails, or passes")
    add("--max-new-tokens", metavar="N", type=int, help="the most tokens of an answer")
    add("--temperature", metavar="T", type=float, help="sample with this temperature; 0 is greedy")
    add("--seed", metavar="N", type=int, help="of sampled answers; that of the run by default")
    add("--batch-size", metavar="N", type=int, default=8, help="prompts that are answered at once")
    add("--run-code", action="store_true", help="let the check `code` run what the models write, under limits")
    add("-o", "--output", metavar="DIR", type=Path, help="where the files go; the run folder by default")
    add("--trust-remote-code", action="store_true", help="let Python code run that the model brings with it")
    options = parser.parse_args(argv)
    _check_numbers(options)
    return options


def _check_numbers(options: argparse.Namespace) -> None:
    """Refuse numbers out of range. Raises RecipeError."""
    faults = option_numbers.list_faults(
        {
            "--max-rows": (options.max_rows, 1),
            "--max-new-tokens": (options.max_new_tokens, 1),
            "--temperature": (options.temperature, 0),
            "--seed": (options.seed, 0),
            "--batch-size": (options.batch_size, 1),
        }
    )
    if options.bound is not None and not 0 < options.bound <= 1:
        fix = "Write a number above 0, up to 1: the mean score that a checkpoint needs to pass."
        faults.append(errors.Fault("--bound", f"{options.bound} is out of range", fix, code="run.bad_option"))
    if faults:
        raise errors.RecipeError(faults)
