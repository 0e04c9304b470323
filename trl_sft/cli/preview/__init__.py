"""`preview`: shows rows as the model sees them.

Inputs: a recipe, overrides, and how many rows of each source. Outputs: the rows on the terminal or as an HTML page, and
the exit code. Not here: how the rows are rendered (`rows`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trl_sft import console, errors, json_output
from trl_sft.cli import arguments

if TYPE_CHECKING:
    from trl_sft.recipe.checked import Run


def main(argv: Sequence[str]) -> int:
    """Show the first rows of each source; return the exit code."""
    parser = arguments.create_parser(
        "preview RECIPE [section.key=value ...] [--rows N] [--compare] [--html FILE]",
        "Show the first rows of each source as the model sees them: tokens with loss in colour, truncated ends marked.",
        example="preview recipe.yaml --rows 5",
    )
    parser.add_argument("--rows", metavar="N", type=int, default=3, help="rows of each source; 3 by default")
    parser.add_argument(
        "--compare", action="store_true", help="show the rows under each setting that changes how answers begin"
    )
    parser.add_argument("--html", metavar="FILE", type=Path, help="write an HTML page instead")
    run, options = arguments.parse_recipe(parser, argv)
    if options.rows < 1:
        raise errors.RecipeError(
            errors.Fault("--rows", f"{options.rows} is below 1", "Ask for at least 1 row.", code="run.bad_option")
        )
    from trl_sft import garbage_collection, upstream_warnings

    if options.compare:
        return _show_comparison(run, num_rows=options.rows, file=options.html)
    with upstream_warnings.quiet():
        with garbage_collection.paused():
            from trl_sft.cli.preview import rows

        preview = rows.build_preview(run, options.rows)
    json_output.add_values(**preview.describe(), html=options.html)
    if options.html is None:
        colour = console.shows_colour(sys.stdout)
        for line in preview.lines(colour=colour):
            console.say(line, has_colours=colour)
        return errors.EXIT_DONE
    arguments.write_output("--html", options.html, preview.page(run.recipe.path.name))
    console.say(f"wrote {options.html}. Next: open it in a browser.")
    return errors.EXIT_DONE


def _show_comparison(run: Run, *, num_rows: int, file: Path | None) -> int:
    """Show the rows under each setting, on the terminal or in a file; return the exit code."""
    from trl_sft import garbage_collection, upstream_warnings

    with upstream_warnings.quiet():
        with garbage_collection.paused():
            from trl_sft.cli.preview import compare

        compared = compare.compare(run, num_rows)
    json_output.add_values(settings=compare.describe(compared), html=file)
    if file is None:
        colour = console.shows_colour(sys.stdout)
        for line in compare.format_lines(compared, colour=colour):
            console.say(line, has_colours=colour)
        return errors.EXIT_DONE
    arguments.write_output("--html", file, compare.format_page(compared, run.recipe.path.name))
    console.say(f"wrote {file}. Next: open it in a browser.")
    return errors.EXIT_DONE
