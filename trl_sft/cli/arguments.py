"""Arguments that several commands share.

Inputs: what stands after the name of a command. Outputs: a parser with the form of all commands, the checked recipe
that is named there, and the command that continues with it. Not here: the arguments that only one command has.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trl_sft import errors, json_output

if TYPE_CHECKING:
    from trl_sft.recipe.checked import Run


def create_parser(usage: str, description: str, *, example: str, epilog: str = "") -> argparse.ArgumentParser:
    """Return a parser whose help shows how the command is written, what it does, and one example.

    Args:
        usage: What stands after `python -m trl_sft`, with the arguments in capitals.
        description: What the command does.
        example: The same, as a user would write it.
        epilog: Further lines below the options.

    """
    parser = _CommandParser(
        prog="python -m trl_sft",
        usage=f"python -m trl_sft {usage}",
        description=description,
        epilog="\n\n".join(filter(None, [f"example:\n  python -m trl_sft {example}", epilog])),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="answer with one JSON object on standard output")
    return parser


class _CommandParser(argparse.ArgumentParser):
    """A parser whose errors are faults where a program asked for JSON."""

    def error(self, message: str) -> NoReturn:
        """End the process as argparse does; raise UsageError under `--json`."""
        if json_output.is_requested():
            fix = f"Write `{self.format_usage().strip()}`."
            raise errors.UsageError(errors.Fault("the command line", message, fix, code="run.bad_arguments"))
        super().error(message)


def parse_recipe(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[Run, argparse.Namespace]:
    """Add the recipe and its overrides to a parser, and parse.

    Returns:
        The checked recipe, and all arguments.

    Raises:
        RecipeError: The recipe has faults.

    """
    from trl_sft import load_recipe

    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="replaces a value of the recipe: train.max_steps=10"
    )
    arguments = parser.parse_intermixed_args(argv)
    return load_recipe(arguments.recipe, arguments.overrides), arguments


def format_next_command(run: Run, command: str = "") -> str:
    """Return the next command line for the same recipe and overrides, without secrets; `command` "" = train."""
    from trl_sft import console
    from trl_sft.recipe import resolved

    command_line = shlex.join([*filter(None, [command]), *run.recipe.arguments])
    return f"{console.get_python_command()} -m trl_sft {resolved.remove_secrets(run, command_line)}"


def write_output(option: str, path: Path, text: str) -> None:
    """Write a text to the file that an option names. Raises RecipeError if it cannot be written."""
    from trl_sft import run_folder

    try:
        run_folder.write_text(path, text)
    except OSError as error:
        raise errors.RecipeError(
            errors.Fault(option, str(error), "Name a file that can be written.", code="run.unwritable_output")
        ) from None
