"""`explain`: explains one key, or shows every value of a run and who set it.

Inputs: a key or a recipe, and overrides. Outputs: lines of text, and the exit code. Not here: the text
(`key`, `recipe`).
"""

from __future__ import annotations

from collections.abc import Sequence

from trl_sft import console, errors, json_output
from trl_sft.cli import arguments


def main(argv: Sequence[str]) -> int:
    """Print an explanation; return the exit code."""
    parser = arguments.create_parser(
        "explain KEY [RECIPE] [section.key=value ...] | explain RECIPE [section.key=value ...]",
        "Explain a key (`train.packing`, or `packing`): its type, choices, default and help. With a recipe, show the\n"
        "value of the key and who set it. For a recipe alone, show every value of the run and who set it.",
        example="explain train.packing recipe.yaml",
    )
    parser.add_argument("subject", metavar="KEY | RECIPE", help="a key, a section, or a YAML file")
    parser.add_argument(
        "recipe", metavar="RECIPE, section.key=value", nargs="*", help="the recipe in which to look; overrides"
    )
    options = parser.parse_intermixed_args(argv)
    from trl_sft import load_recipe
    from trl_sft.cli.explain import key, recipe

    if key.is_recipe(options.subject):
        lines = recipe.explain_recipe(load_recipe(options.subject, options.recipe))
    else:
        lines = key.explain_key(options.subject, options.recipe)
    text = "\n".join(lines)
    json_output.add_values(text=text)
    console.say(text)
    return errors.EXIT_DONE
