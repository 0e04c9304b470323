"""`import`: converts another trainer's settings to a recipe.

Inputs: the name of the tool, and its file of settings or its flags. Outputs: a recipe, on the terminal or in a file,
and the exit code. Not here: what the settings of each tool mean (`importers`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from trl_sft import console, errors, user_paths
from trl_sft.cli import arguments


def main(argv: Sequence[str]) -> int:
    """Convert settings; return the exit code: 2 if the recipe has problems, 5 if it differs."""
    parser = arguments.create_parser(
        "import [TOOL] FILE [-o RECIPE] | import openrlhf [-o RECIPE] -- FLAGS...",
        "Convert another trainer's settings to a recipe. What the recipe trains differently is shown, with exit code "
        "5; its end lists what else it leaves out, and why.",
        example="import axolotl config.yaml -o recipe.yaml",
        epilog="tools: openrlhf, trl, alignment-handbook, axolotl, llamafactory",
    )
    parser.add_argument(
        "tool", metavar="TOOL", help="the trainer that the settings are for; without it the settings tell"
    )
    parser.add_argument("settings", metavar="FILE", nargs="*", help="its file of settings, or its flags after --")
    parser.add_argument(
        "-o", "--output", metavar="RECIPE", type=Path, help="write the recipe to a file instead of the terminal"
    )
    parser.add_argument(
        "--dataset-info",
        metavar="FILE",
        type=Path,
        help="the dataset_info.json of LLaMA-Factory, if it is in another folder",
    )
    end = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_intermixed_args(argv[:end])
    from trl_sft.importers import writer

    is_file = os.path.exists(options.tool) and not os.path.isdir(options.tool)  # noqa: PTH110, PTH112 (a long name)
    if options.tool not in writer.TOOLS and not options.settings and is_file:
        options.settings = [options.tool]
        options.tool = writer.guess_tool(Path(options.tool))
        console.say_error(f"trl_sft: The settings are read as those of {options.tool}.")
    if options.tool not in writer.TOOLS:
        problem = f"{options.tool} is not a tool whose settings can be imported"
        raise errors.RecipeError(
            errors.Fault("import", problem, f"Name one of {', '.join(writer.TOOLS)}.", code="import.unknown_tool")
        )
    if options.dataset_info is not None:
        user_paths.check("--dataset-info", options.dataset_info, user_paths.FILE)
    settings = writer.read(options.tool, [*options.settings, *argv[end + 1 :]], options.dataset_info)
    return writer.write(options.tool, settings, options.output)
