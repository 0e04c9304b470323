"""`report`: writes one HTML page about a run, or about several runs side by side.

Inputs: run folders. Outputs: an HTML file, and the exit code. Not here: the page (`reports.page`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trl_sft import console, errors, json_output, run_folder
from trl_sft.cli import arguments


def main(argv: Sequence[str]) -> int:
    """Write the report of runs; return the exit code."""
    parser = arguments.create_parser(
        "report RUN [RUN ...] [-o FILE]",
        "Write one HTML page about a run: verdict, curves, data, answers before and after, recipe, versions. For "
        "several runs it shows what differs.",
        example="report runs/first runs/second -o comparison.html",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run folder")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help=f"{run_folder.REPORT} in the folder of the run by default"
    )
    options = parser.parse_args(argv)
    if options.output is None and len(options.runs) > 1:
        fix = "Name it, for example -o comparison.html."
        problem = "a page of several runs has no folder of its own"
        raise errors.RecipeError(errors.Fault("--output", problem, fix, code="run.bad_option"))
    output = options.output or options.runs[0] / run_folder.REPORT
    from trl_sft.reports import page, run_files

    runs = [run_files.read_run(folder) for folder in options.runs]
    arguments.write_output("--output", output, page.format_page(runs))
    json_output.add_values(output=output)
    for run in runs:
        for damage in run.damaged:
            console.say(f"{run.folder}/{damage}")
    console.say(f"wrote {output}. Next: open it in a browser.")
    return errors.EXIT_DONE
