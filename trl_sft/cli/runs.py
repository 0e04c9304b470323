"""`runs`: lists the runs below a folder.

Inputs: a folder. Outputs: a table on the terminal, and the exit code. Not here: how a run is described
(`reports.run_table`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trl_sft import console, errors, json_output, user_paths
from trl_sft.cli import arguments


def main(argv: Sequence[str]) -> int:
    """List the runs below a folder; return the exit code."""
    parser = arguments.create_parser(
        "runs [FOLDER]",
        "List the runs below a folder: state, verdict, eval loss before and after, steps, model, rows, end, time.",
        example="runs",
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path("runs"), help="runs by default")
    folder = parser.parse_args(argv).folder
    user_paths.check("", folder, user_paths.FOLDER)
    if not folder.is_dir():
        fix = "Name a folder that holds runs. A recipe without `train.output_dir` trains in `runs/NAME`."
        raise errors.RecipeError(errors.Fault(str(folder), "there is no such folder", fix, code="report.no_folder"))
    from trl_sft.reports import run_files, run_table

    described, faults = [], []
    for path in run_files.find_runs(folder):
        try:
            described.append(run_table.describe(run_files.read_run(path)))
        except errors.RecipeError as error:  # a damaged run.json; the other runs are listed
            faults += error.faults
    json_output.add_values(runs=described)
    if described:
        cells = [run_table.format_cells(run, parent=folder) for run in described]
        for line in console.format_columns([run_table.COLUMNS, *cells]):
            console.say(line)
    else:
        console.say(f"{folder} holds no run. Next: train one: python -m trl_sft RECIPE")
    for run in described:
        if run["state"] == run_files.STOPPED:
            console.say(f"{run['folder']} stopped: {next(iter(run['outcome'].splitlines()), '')}")
        for damage in run["damaged"]:
            console.say(f"{run['folder']}/{damage}")
    if faults:
        console.print_faults(faults)
        return errors.EXIT_USER_ERROR
    return errors.EXIT_DONE
