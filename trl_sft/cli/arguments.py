"""Arguments that several commands share.

Inputs: what stands after the name of a command. Outputs: a parser with the form of all commands, the checked recipe
that is named there, and the command that continues with it. Not here: the arguments that only one command has.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trl_sft import console, errors, json_output, redaction, user_paths

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
        """End the process as argparse does, with a hint; raise UsageError under `--json`."""
        hint = self._suggest(message)
        if json_output.is_requested():
            fix = hint or f"Write `{self.format_usage().strip().removeprefix('usage: ')}`."
            raise errors.UsageError(errors.Fault("the command line", message, fix, code="run.bad_arguments"))
        super().error(f"{message}\n{hint}" if hint else message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the process; a message is printed escaped and without secrets, since an error repeats what was typed."""
        super().exit(status, message and console.escape_control_characters(redaction.redact(message)))

    def _suggest(self, message: str) -> str:
        """Return what to write in place of an option that does not exist; "" if nothing is near."""
        found = re.search(r"unrecognized arguments: (?:.*? )?--?([\w-]+)(?:[= ](\S+))?", message)
        if found is None:
            return ""
        from trl_sft.suggestions import STRICT, nearest_name

        options = [option for action in self._actions for option in action.option_strings]
        if option := nearest_name(f"--{found[1]}", options, cutoff=STRICT):
            return f"Did you mean `{option}`?"
        from trl_sft.recipe import misplaced_keys

        suggestion = misplaced_keys.suggest((found[1].replace("-", "_"),))
        if not suggestion.keys or len(suggestion.keys[0]) < 2:
            return "Values of a recipe are written as section.key=value, for example train.max_steps=10."
        return f"Did you mean `{'.'.join(map(str, suggestion.keys[0]))}={found[2] or 'VALUE'}`?"


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
    command_line = shlex.join([*filter(None, [command]), *run.recipe.arguments])
    return f"{console.get_python_command()} -m trl_sft {redaction.redact(command_line)}"


def write_output(option: str, path: Path, text: str) -> None:
    """Write a text to the file that an option names. Raises RecipeError if it cannot be written."""
    from trl_sft import run_folder

    user_paths.check(option, path, user_paths.FILE, is_output=True)
    try:
        run_folder.write_text(path, text)
    except OSError as error:
        raise errors.RecipeError(
            errors.Fault(option, str(error), "Name a file that can be written.", code="run.unwritable_output")
        ) from None
