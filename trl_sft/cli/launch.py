"""`launch`: trains with several processes, on one host or several.

Inputs: a recipe, overrides, and how many processes on which hosts. Outputs: the run's folder and the exit code of the
run; or, with `--dry-run` and `--slurm`, what would be run. Not here: the processes (`launch.supervisor`).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trl_sft import console, errors, json_output
from trl_sft.cli import arguments

if TYPE_CHECKING:
    from trl_sft.launch.plan import LaunchPlan
    from trl_sft.recipe.checked import Run


def main(argv: Sequence[str]) -> int:
    """Start the processes of a run and wait for them; return the exit code of the run."""
    parser = arguments.create_parser(
        "launch RECIPE [section.key=value ...] [--processes N] [--hosts N --host-rank K --host ADDRESS]",
        "Train with several processes. On several hosts run the same command on each, with its own --host-rank.",
        example="launch recipe.yaml --processes 8",
    )
    parser.add_argument("--processes", type=_read_count, metavar="N", help="on this host; unset: one for each card")
    parser.add_argument("--hosts", type=_read_count, metavar="N", help="that train together; unset: 1")
    parser.add_argument("--host-rank", type=int, metavar="K", help="the number of this host, from 0")
    parser.add_argument("--host", metavar="ADDRESS", help="of host 0, where all hosts meet")
    parser.add_argument("--port", type=_read_count, metavar="PORT", help="on host 0; unset: 29500")
    parser.add_argument("--dry-run", action="store_true", help="print the environment and the command, and run nothing")
    parser.add_argument("--slurm", metavar="FILE", help="write an sbatch file for SLURM, and run nothing")
    parser.add_argument("-v", "--verbose", action="store_true", help="show every logged value")
    run, options = arguments.parse_recipe(parser, argv)
    return start(run, options)


def start(run: Run, options: argparse.Namespace) -> int:
    """Start the processes of a checked recipe, or show what would be started; return the exit code."""
    from trl_sft.launch import plan as plans
    from trl_sft.recipe import folder_decision

    names = ("processes", "hosts", "host_rank", "host", "port")
    host_options = plans.HostOptions(**{name: getattr(options, name, None) for name in names})
    is_for_slurm = getattr(options, "slurm", None) is not None
    plan = plans.make_plan(run, host_options, elsewhere=is_for_slurm)
    if is_for_slurm:
        return _write_batch_file(plan, run, Path(options.slurm))
    if getattr(options, "dry_run", False):
        json_output.add_values(environment=plan.environment, words=plan.words, processes=plan.total)
        console.say(f"# {plan.summarize()}")
        console.say(plan.describe())
        return errors.EXIT_DONE
    if "mirror" in run.options:  # before the processes begin, since each of them reads the checkpoint
        from trl_sft.mirroring import fetch

        fetch.begin(run)
    plans.check_place()
    folder_decision.check_folder(run)
    from trl_sft.launch import ray, supervisor, torchrun
    from trl_sft.recipe import engines

    console.say(f"launch    {plan.summarize()}")
    if options.verbose:
        plan = dataclasses.replace(plan, arguments=(*plan.arguments, "-v"))
    run_processes = {engines.RAY: ray.run}.get(plan.engine, torchrun.run)
    return supervisor.start(plan, run_processes)


def _write_batch_file(plan: LaunchPlan, run: Run, path: Path) -> int:
    """Write the sbatch file, and say how it is submitted."""
    from trl_sft.launch import slurm

    uses_cards = not run.train.get("use_cpu")
    text = slurm.write_batch_file(plan, uses_cards=uses_cards, folder=Path.cwd(), python=console.get_python_command())
    arguments.write_output("--slurm", path, text)
    json_output.add_values(path=path, next=f"sbatch {path}")
    console.say(f"written   {path}")
    console.say(f"Next: sbatch {path}")
    return errors.EXIT_DONE


def _read_count(text: str) -> int:
    """Return a whole number above zero, as argparse wants it."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number
