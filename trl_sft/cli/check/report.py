"""Checks everything of a run that needs no weights, stage by stage, so that all problems are found at once.

Inputs: a checked recipe (`Run`), and the machine that the run is for. Outputs: a `Report`: problems of the recipe,
problems of this machine, and stages that could not be checked, because an earlier one failed or a hub is out of reach.
Not here: any check of its own; the stages are those of `training.stages`, in that order.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trl_sft import errors, json_output
from trl_sft.cli import arguments
from trl_sft.cli.check import packing_advice
from trl_sft.console import format_duration, print_faults, print_lines, say
from trl_sft.data import rows as data_rows
from trl_sft.data.formats import TokenizerFeatures
from trl_sft.data.rows import RunRows
from trl_sft.errors import Fault, LaunchError, MissingPackage, Unreached, UserError
from trl_sft.evaluation import set_comparison
from trl_sft.launch import plan
from trl_sft.mirroring import fetch
from trl_sft.model import device, trust
from trl_sft.model.load import ModelSource
from trl_sft.recipe import folder_decision, processes
from trl_sft.recipe.checked import Run
from trl_sft.recipe.processes import TargetMachine
from trl_sft.tokenization import chat_template
from trl_sft.tokenization.tokenizer import ChatTokenizer
from trl_sft.training import dry_run, stages, thinking_choices
from trl_sft.training.memory import fit
from trl_sft.training.stages import RunSettings, TrainingInputs

# Rows are formatted for a chat template with every feature: their columns are checked where there is no tokenizer.
_ALL_FEATURES = TokenizerFeatures(chat_template.NAMES, "")


@dataclass
class Report:
    """The result of a check."""

    faults: list[Fault] = field(default_factory=list)  # of the recipe, of the files that it names, of their rows
    machine_faults: list[Fault] = field(default_factory=list)  # what this machine or this version cannot run
    unchecked: list[str] = field(default_factory=list)  # stages that could not be checked, with the reason
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> its time
    inputs: TrainingInputs | None = None  # all that training needs beside the weights; None if a stage failed
    memory: fit.MemoryReport | None = None
    evaluation_set: dict[str, Any] | None = None  # how it stands to the training set; None = there is none

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and collect its faults."""
        start = time.perf_counter()
        try:
            yield
        except Unreached as error:
            self.unchecked += [f"{name}: offline: {fault.problem}" for fault in error.faults]
        except (LaunchError, MissingPackage) as error:
            self.machine_faults += error.faults
        except UserError as error:
            self.faults += [fault for fault in error.faults if fault not in self.faults]
        self.seconds[name] = time.perf_counter() - start

    def can_check(self, name: str, inputs: dict[str, Any]) -> bool:
        """Tell whether all inputs of a stage are there (not None); note the stage as unchecked otherwise."""
        missing = [label for label, value in inputs.items() if value is None]
        if missing:
            self.unchecked.append(f"{name}: needs {' and '.join(missing)}")
        return not missing


def check(run: Run, machine: TargetMachine, seconds: float) -> Report:
    """Go through all stages and print the results of each.

    Args:
        run: The checked recipe.
        machine: The machine that the run is for.
        seconds: The time that reading the recipe took.

    """
    report = Report(seconds={"recipe": seconds})
    for note in run.notes:
        say(note)
    trust.announce(run)
    with report.stage("machine"):
        _check_machine(run, machine)
    with report.stage("folder"):
        folder_decision.check_folder(run)
    if "mirror" in run.options and machine.is_this_machine:
        with report.stage("mirror"):
            fetch.check(run)
            print_lines([("mirror", f"{run.options['mirror']}: a file was written, read and removed")])
    settings = _settle(run, report, machine)
    model, chat = _load_tokenizer(run, report)
    if model is None or chat is None or settings is None:
        with report.stage("rows"):
            formatted = data_rows.load(run, _ALL_FEATURES)
            print_lines([("rows", line) for line in formatted.notes])
            data_rows.check_bad_rows(run, formatted)
        report.can_check("tokens", {"settings": settings, "the tokenizer": chat})
        return report
    if machine.is_this_machine and run.train.get("push_to_hub") and not report.machine_faults:
        with report.stage("hub"):
            stages.plan_push(run, settings, model)
    rows, datasets = None, None
    with report.stage("rows"):
        rows = stages.load_rows(run, chat, settings)
        report.evaluation_set = _show_rows(rows)
    if report.can_check("tokens", {"the rows": rows}):
        with report.stage("tokens"):
            datasets = stages.tokenize(run, chat, rows, settings=settings, thorough=True)
            print_lines(datasets.notes)
            attention = str(run.model.get("attn_implementation", ""))
            advice = packing_advice.advise(datasets.train, datasets.ledger["train"], settings.args, attention=attention)
            print_lines(list(advice))
            print_lines(stages.check_row_lengths(run, model, datasets, settings=settings))
            prompts = stages.load_prompts(run, model, rows, datasets=datasets)
            print_lines(stages.describe_prompts(settings, prompts))
            if datasets.encoder.thoughts is not None:
                print_lines(thinking_choices.advise(run, stages.read_first_rows))
    with report.stage("trainer"):
        settings.args.dataset_kwargs = {"skip_prepare_dataset": True}
        if reason := dry_run.check(run, model, chat, args=settings.args, datasets=datasets):
            report.unchecked.append(f"trainer: {reason}")
    if rows is not None and datasets is not None:
        report.inputs = TrainingInputs(settings, model, chat, rows, datasets)
        with report.stage("memory"):
            report.memory = _estimate_memory(run, report.inputs, machine)
            print_lines(report.memory.lines)
    return report


def _estimate_memory(run: Run, inputs: TrainingInputs, machine: TargetMachine) -> fit.MemoryReport:
    """Return the memory that a step takes on each card of a machine. Raises LaunchError."""
    card = int(machine.gpu_gib * 2**30) if machine.gpu_gib else None
    processes = _count_processes(run, machine)
    return fit.check_memory(run, inputs, inputs.datasets.train, card_bytes=card, processes=processes)


def _check_machine(run: Run, machine: TargetMachine) -> None:
    """Refuse a machine that cannot run the recipe; what only another machine can be asked is not checked here."""
    if run.launch and machine.is_this_machine and processes.check(run):
        plan.make_plan(run, plan.HostOptions())
    elif not run.launch:
        device.check_machine(run)


def _count_processes(run: Run, machine: TargetMachine) -> int:
    """Return how many processes train on a machine: on another one a process for each GPU."""
    if not machine.is_this_machine:
        return machine.num_gpus
    if not run.launch or not processes.check(run):
        return 1
    try:
        return plan.make_plan(run, plan.HostOptions()).total
    except UserError:  # the stage of the machine has reported it
        return 1


def _show_rows(rows: RunRows) -> dict[str, Any] | None:
    """Print what the rows are; return how the evaluation set stands to the training set, None = there is none."""
    print_lines([("rows", line) for line in rows.notes])
    if not rows.eval or not set_comparison.can_compare(rows):
        return None
    result = set_comparison.compare(rows, set_comparison.read_evaluation_sets(rows))
    print_lines(set_comparison.list_lines(result))
    return result


def _settle(run: Run, report: Report, machine: TargetMachine) -> RunSettings | None:
    """Return upstream's settings; what only this machine refuses is a fault of the machine, not of the recipe."""
    number = _count_processes(run, machine)
    with report.stage("settings"):
        settings = None
        try:
            settings = stages.settle_settings(run, processes=number)
            stages.check_packages(run, settings)
        except UserError as error:
            stages.settle_settings(run, elsewhere=True, processes=number)  # a fault here is one of the recipe: raise it
            report.machine_faults += error.faults
        if settings is None or not machine.is_this_machine:
            settings = stages.settle_settings(run, elsewhere=True, processes=number)
        description = f"{machine.num_gpus} x {machine.gpu_gib:g} GiB" if machine.gpu_gib else "any"
        if machine.is_this_machine:
            description = stages.describe_machine(run, settings)
        print_lines([("machine", description), *stages.describe_settings(run, settings)])
        return settings
    return None


def _load_tokenizer(run: Run, report: Report) -> tuple[ModelSource | None, ChatTokenizer | None]:
    """Return the model without weights, and its tokenizer."""
    model, chat = None, None
    with report.stage("model"):
        model = stages.find_model(run)
        print_lines([("model", model.title)])
        stages.check_model(run, model)
    if report.can_check("tokenizer", {"the model": model}):
        with report.stage("tokenizer"):
            chat = stages.load_tokenizer(run, model)
            print_lines([("tokens", line) for line in chat.notes])
    return model, chat


def _describe(report: Report, run: Run) -> dict[str, Any]:
    """Return the result of a check as plain values, as JSON has them."""
    memory = report.memory.estimate if report.memory else None
    return {
        "notes": list(run.notes),
        "unchecked": report.unchecked,
        "machine_faults": [json_output.describe_fault(fault) for fault in report.machine_faults],
        "seconds": report.seconds,
        "evaluation_set": report.evaluation_set,
        "ledger": report.inputs.datasets.ledger if report.inputs else None,
        "memory": memory._asdict() if memory else None,
        "next": arguments.format_next_command(run),
    }


def show(report: Report, run: Run, machine: TargetMachine) -> int:
    """Print the result of a check.

    Returns:
        The exit code: 2 for faults of the recipe, and for those of this machine where the run is for this machine.

    """
    times = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in report.seconds.items())
    print_lines([("checked", times)])
    for line in report.unchecked:
        say(f"not checked: {line}")
    json_output.add_values(**_describe(report, run))
    faults = [*report.faults, *(report.machine_faults if machine.is_this_machine else [])]
    if report.machine_faults and not machine.is_this_machine:
        say("\nThese are not problems of the recipe. This machine or this version of trl_sft cannot run it:")
        say("\n".join(str(fault) for fault in report.machine_faults))
    if faults:
        print_faults(faults)
        return errors.EXIT_USER_ERROR
    checked = "the checked stages of " if report.unchecked else ""
    say(f"No problems found in {checked}{run.recipe.path.name}.")
    say(f"Next: {arguments.format_next_command(run)}")
    return errors.EXIT_DONE
