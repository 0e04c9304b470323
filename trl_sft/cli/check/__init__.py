"""`check`: finds every problem of a run that can be found without loading weights, and estimates its memory.

Inputs: a recipe, overrides, and the machine that the run is for. Outputs: a report on the terminal, and the exit code.
Not here: the stages of a run (`report`), and any check of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from trl_sft import console, errors, json_output
from trl_sft.cli import arguments


def main(argv: Sequence[str]) -> int:
    """Check a recipe; return the exit code: 2 where something has to be fixed."""
    parser = arguments.create_parser(
        "check RECIPE [section.key=value ...] [--on MACHINE] [--fast] [--probe]",
        "Find every problem that needs no weights: recipe, folder, tokenizer, rows, settings. Estimate the memory.",
        example="check recipe.yaml --on 8x80GiB",
    )
    parser.add_argument(
        "--on",
        metavar="MACHINE",
        default="here",
        help="the machine that will train: here (the default), any, or cards with their memory (8x80GiB)",
    )
    parser.add_argument("--fast", action="store_true", help="check the recipe alone; load no tokenizer and no rows")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="after the check, train two steps on the largest batch and measure their memory",
    )
    began = time.perf_counter()
    run, options = arguments.parse_recipe(parser, argv)
    from trl_sft.recipe import processes

    machine = processes.parse_machine(options.on)
    seconds = time.perf_counter() - began
    if options.fast:
        for note in run.notes:
            console.say(note)
        name, next_command = run.recipe.path.name, arguments.format_next_command(run, "check")
        json_output.add_values(notes=list(run.notes), seconds={"recipe": seconds}, next=next_command)
        console.say(f"No problems found in {name} ({seconds:.2f} s). The tokenizer and the rows were not loaded.")
        console.say(f"Next: {next_command}")
        return errors.EXIT_DONE
    from trl_sft import garbage_collection, upstream_warnings

    with upstream_warnings.quiet():
        with garbage_collection.paused():
            from trl_sft.cli.check import report as stage_report
            from trl_sft.training.memory import probe

        report = stage_report.check(run, machine, seconds)
        code = stage_report.show(report, run, machine)
        if options.probe and report.inputs and report.memory and not report.machine_faults:
            console.print_lines(probe.measure_steps(run, report.inputs, report.memory))
        return code
