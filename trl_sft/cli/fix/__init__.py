"""`fix`: corrects a recipe by the edits that its faults carry, and checks it again.

Inputs: a recipe and overrides. Outputs: the corrected recipe beside it, the difference, what is left to decide, and the
exit code. Not here: the rounds of edits and checks (`rounds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trl_sft import errors, user_paths
from trl_sft.cli import arguments


def main(argv: Sequence[str]) -> int:
    """Correct a recipe; return the exit code: 0 if nothing is left to fix, else 2."""
    parser = arguments.create_parser(
        "fix RECIPE [section.key=value ...] [-o FILE | --write] [--fast]",
        "Correct a recipe by the changes that its problems name exactly: misspelt keys, keys in the wrong section,\n"
        "quoted numbers, keys without effect. Comments and layout stay. What somebody has to decide is listed.",
        example="fix recipe.yaml",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="replaces a value for the check; it is not written"
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="the corrected recipe; RECIPE.fixed.yaml by default"
    )
    place.add_argument("--write", action="store_true", help="replace the recipe itself")
    parser.add_argument("--fast", action="store_true", help="check the recipe alone; load no tokenizer and no rows")
    options = parser.parse_intermixed_args(argv)
    from trl_sft.cli.fix import rounds

    recipe = Path(options.recipe)
    output = recipe if options.write else options.output or recipe.with_suffix(f".fixed{recipe.suffix}")
    user_paths.check("", recipe, user_paths.FILE)
    user_paths.check("--output", output, user_paths.FILE, is_output=True)
    if output.exists() and not options.write:
        problem = "the file exists and is not overwritten"
        raise errors.RecipeError(
            errors.Fault(str(output), problem, "Name another file: -o ANOTHER.yaml", code="run.file_exists")
        )
    if output.absolute().parent != recipe.absolute().parent:
        problem = "the paths in a recipe are relative to its folder, so the corrected one has to be in the same folder"
        fix = f"Name a file in {recipe.parent}."
        raise errors.RecipeError(errors.Fault(str(output), problem, fix, code="run.bad_option"))
    return rounds.fix(recipe, options.overrides, output=output, fast=options.fast)
