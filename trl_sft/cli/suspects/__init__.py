"""`suspects`: says which groups of training rows hurt, after short reruns of a finished run with and without them.

Inputs: a run folder, and options. Outputs: suspects.jsonl, finished reruns, lines on the terminal, a set without the
rows that hurt, and the exit code. Not here: the steps (`measuring`), signals and reruns (`suspects`), and
what their losses tell (`evaluation.paired_reruns`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from trl_sft import console, errors, user_paths
from trl_sft.cli import arguments, option_numbers, resumable

GROUPINGS = ("signal", "kind", "all")
LEAST_PAIRS = 3  # `evaluation.paired_reruns` has the same number
_EPILOG = """\
signals, which only suggest: `loss` (a row whose loss under the trained model is far above those of held-out
  rows), `gradient` (a row whose gradient agrees far less with held-out rows than theirs do), `conflict` (a prompt with
  several answers).
A group of suspects hurts if held-out rows that chose no suspect have a lower loss after reruns without it than after
  reruns without as many random rows, and than with all rows. One group is not one row: no row is ranked.
Finished reruns are kept in suspect_reruns.jsonl: the same command continues after Ctrl-C."""


def main(argv: Sequence[str]) -> int:
    """Look for rows that hurt; return the exit code."""
    options = _parse(argv)
    from trl_sft.evaluation import eval_packages

    eval_packages.require_packages("suspects", *eval_packages.STATISTICS)
    user_paths.check("", options.run, user_paths.FOLDER)
    output = options.output or options.run
    user_paths.check("--output", output, user_paths.FOLDER, is_output=True)
    if options.fix is not None:
        user_paths.check("--fix", options.fix, user_paths.FILE, is_output=True)
    console.say("loading   torch, transformers and trl")
    from trl_sft import garbage_collection, upstream_warnings

    with upstream_warnings.quiet():
        with garbage_collection.paused():
            from trl_sft.cli.suspects import measuring
        with resumable.explain_endings(output, *filter(None, [options.fix]), kept="reruns"):
            measuring.run(options.run, output, options)
    return errors.EXIT_DONE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of the command. Raises RecipeError."""
    parser = arguments.create_parser(
        "suspects RUN [--signals-only] [--pairs N] [--steps N] [--by signal|kind|all] [--fix FILE]",
        "Say which training rows of a finished run hurt: signals choose suspects, and short reruns with and without "
        "them decide, with an interval.",
        example="suspects runs/first --fix clean.jsonl",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="the folder of a finished run with held-out rows")
    add("--signals-only", action="store_true", help="list suspects and the time of the reruns, and train nothing")
    add("--pairs", metavar="N", type=int, default=5, help="seeds, each with reruns with and without the suspects; 5")
    add(
        "--steps", metavar="N", type=int, default=100, help="of each rerun; 100, or those of the run where it has fewer"
    )
    add(
        "--by",
        choices=GROUPINGS,
        default="signal",
        help="measure the suspects of each signal apart (the default), of each task or source (kind), or all together",
    )
    add("--seed", metavar="N", type=int, default=1, help="the first seed; 1")
    add(
        "--fix",
        metavar="FILE",
        type=Path,
        help="write the rows without the groups that hurt as JSONL, and these groups into *.rejected.jsonl beside it",
    )
    add("-o", "--output", metavar="DIR", type=Path, help="where the files go; the run folder by default")
    add("--trust-remote-code", action="store_true", help="let Python code run that the model brings with it")
    options = parser.parse_args(argv)
    numbers = {"--pairs": (options.pairs, LEAST_PAIRS), "--steps": (options.steps, 10), "--seed": (options.seed, 0)}
    if faults := option_numbers.list_faults(numbers):
        raise errors.RecipeError(faults)
    return options
