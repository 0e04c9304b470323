"""Everything of a run that needs no weights, stage by stage, so that all faults are found at once.

In: a `Run` and the machine that it is for. Out: a `Report`: what to mend in the recipe, what this machine cannot
run, and what could not be looked at. A stage that needs what a failed one would have given is named as not checked.
Deliberately absent: checks of its own; the stages are those of `training.stages`, in its order.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trl_sft import errors
from trl_sft.cli import gains
from trl_sft.console import format_duration, get_python_command, print_faults, print_lines, say
from trl_sft.data import rows as data_rows
from trl_sft.data.formats import TokenizerFeatures
from trl_sft.errors import Fault, LaunchError, MissingPackage, Unreached, UserError
from trl_sft.model import device, trust
from trl_sft.model.load import ModelSource
from trl_sft.recipe import processes as recipe_processes
from trl_sft.recipe import resolved
from trl_sft.recipe.checked import Run
from trl_sft.recipe.processes import TargetMachine
from trl_sft.tokenization import chat_template
from trl_sft.tokenization.tokenizer import ChatTokenizer
from trl_sft.training import dry_run, stages
from trl_sft.training.memory import fit
from trl_sft.training.stages import RunSettings, TrainingInputs

# rows as any tokenizer might want them: for a look at the columns where none is there
_ANY = TokenizerFeatures(chat_template.NAMES, "")


@dataclass
class Report:
    """What was found."""

    faults: list[Fault] = field(default_factory=list)  # of the recipe, the files it names, their rows
    here: list[Fault] = field(default_factory=list)  # what this machine cannot run
    unseen: list[str] = field(default_factory=list)  # what could not be looked at, with the reason
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> its time
    inputs: TrainingInputs | None = None  # the run up to its weights, where all of that is there
    memory: fit.Checked | None = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what stands inside, and keep its faults."""
        began = time.perf_counter()
        try:
            yield
        except Unreached as error:
            self.unseen += [f"{name}: offline: {fault.problem}" for fault in error.faults]
        except (LaunchError, MissingPackage) as error:
            self.here += error.faults
        except UserError as error:
            self.faults += [fault for fault in error.faults if fault not in self.faults]
        self.seconds[name] = time.perf_counter() - began

    def needs(self, name: str, given: dict[str, Any]) -> bool:
        """Tell whether what a stage needs is there; note what is not."""
        missing = [needed for needed, value in given.items() if value is None]
        if missing:
            self.unseen.append(f"{name}: needs {' and '.join(missing)}")
        return not missing


def check(run: Run, for_: TargetMachine, seconds: float) -> Report:
    """Go through all stages; say what is found on the way. `seconds`: what reading the recipe took."""
    report = Report(seconds={"recipe": seconds})
    for note in run.notes:
        say(note)
    trust.announce(run)
    with report.stage("machine"):
        device.check_machine(run)
    with report.stage("folder"):
        resolved.claim_folder(run)
    settings = _settle(run, report, for_)
    model, chat = _load_tokenizer(run, report)
    if model is None or chat is None or settings is None:
        with report.stage("rows"):
            print_lines([("rows", line) for line in data_rows.load(run, _ANY).notes])
        report.needs("tokens", {"settings": settings, "the tokenizer": chat})
        return report
    rows, datasets = None, None
    with report.stage("rows"):
        rows = stages.load_rows(run, chat, settings)
        print_lines([("rows", line) for line in rows.notes])
    if report.needs("tokens", {"the rows": rows}):
        with report.stage("tokens"):
            datasets = stages.tokenize(run, chat, rows, settings, thorough=True)
            print_lines(datasets.said)
            attention = str(run.model.get("attn_implementation", ""))
            print_lines(list(gains.lines(datasets.train, datasets.ledger["train"], settings.args, attention)))
    with report.stage("trainer"):
        settings.args.dataset_kwargs = {"skip_prepare_dataset": True}
        if reason := dry_run.check(run, model, chat, settings.args, datasets):
            report.unseen.append(f"trainer: {reason}")
    if rows is not None and datasets is not None:
        report.inputs = TrainingInputs(settings, model, chat, rows, datasets)
        with report.stage("memory"):
            card = int(for_.gpu_gib * 2**30) if for_.gpu_gib else None
            report.memory = fit.check(run, report.inputs, datasets.train, card)
            print_lines(report.memory.lines)
    return report


def _settle(run: Run, report: Report, for_: TargetMachine) -> RunSettings | None:
    """Return upstream's settings; what only this machine refuses is no fault of the recipe."""
    processes = 1 if for_.is_this_machine else for_.num_gpus
    with report.stage("settings"):
        settings = None
        try:
            settings = stages.settle_settings(run, processes=processes)
            stages.check_packages(run, settings)
        except UserError as error:
            stages.settle_settings(run, elsewhere=True, processes=processes)  # a fault here too is the recipe's: raised
            report.here += error.faults
        if settings is None or not for_.is_this_machine:
            settings = stages.settle_settings(run, elsewhere=True, processes=processes)
        machine = f"{for_.num_gpus} x {for_.gpu_gib:g} GiB" if for_.gpu_gib else "any"
        machine = stages.describe_machine(run, settings) if for_.is_this_machine else machine
        print_lines([("machine", machine), *recipe_processes.describe_settings(settings.chosen)])
        return settings
    return None


def _load_tokenizer(run: Run, report: Report) -> tuple[ModelSource | None, ChatTokenizer | None]:
    """Return the model without weights, and its tokenizer."""
    model, chat = None, None
    with report.stage("model"):
        model = stages.find_model(run)
        print_lines([("model", model.title)])
        stages.check_model(run, model)
    if report.needs("tokenizer", {"the model": model}):
        with report.stage("tokenizer"):
            chat = stages.load_tokenizer(run, model)
            print_lines([("tokens", line) for line in chat.said])
    return model, chat


def show(report: Report, run: Run, for_: TargetMachine) -> int:
    """Say what there is to mend, and return the exit code: 2 for the recipe's faults, and for this machine's `here`."""
    print_lines(
        [("checked", ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in report.seconds.items()))]
    )
    for line in report.unseen:
        say(f"not checked: {line}")
    mend = [*report.faults, *(report.here if for_.is_this_machine else [])]
    if report.here and not for_.is_this_machine:
        say("\nThis machine, or this version, cannot run it, which is no fault of the recipe:")
        say("\n".join(str(fault) for fault in report.here))
    if mend:
        print_faults(mend)
        return errors.EXIT_USER_ERROR
    clean = "Nothing to mend" + (" in what was checked" if report.unseen else "")
    words_again = resolved.remove_secrets(run, shlex.join(run.recipe.arguments))
    say(f"{clean}. Next: {get_python_command()} -m trl_sft {words_again}")
    return errors.EXIT_DONE
