"""`prepare`: tokenizes the rows of a run ahead of time.

Inputs: a recipe and overrides. Outputs: tokens in the cache, and the exit code. Not here: tokenization.
"""

from __future__ import annotations

from collections.abc import Sequence

from trl_sft import console, errors, json_output
from trl_sft.cli import arguments


def main(argv: Sequence[str]) -> int:
    """Tokenize the rows of a recipe; return the exit code."""
    parser = arguments.create_parser(
        "prepare RECIPE [section.key=value ...]",
        "Tokenize the rows of a run ahead of time. The next run with the same rows and settings reads these tokens.",
        example="prepare recipe.yaml",
    )
    run, _ = arguments.parse_recipe(parser, argv)
    from trl_sft import garbage_collection, upstream_warnings

    with upstream_warnings.quiet():
        with garbage_collection.paused():
            from trl_sft.training import stages

        inputs = stages.prepare(run, any_machine=True)
    next_command = arguments.format_next_command(run)
    json_output.add_values(ledger=inputs.datasets.ledger, notes=list(run.notes), next=next_command)
    console.say("The tokens are in the cache.")
    console.say(f"Next: {next_command}")
    return errors.EXIT_DONE
