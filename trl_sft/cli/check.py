"""Everything of a run that needs no weights, stage by stage, so that all faults are found at once.

In: a `Run` and the machine that it is for. Out: a `Report`: what to mend in the recipe, what this machine cannot
run, and what could not be looked at. A stage that needs what a failed one would have given is named as not checked.
Deliberately absent: checks of its own; the stages are those of `training.prepare`, in its order.
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
from trl_sft.console import faults, python, say, span
from trl_sft.data import rows as data_rows
from trl_sft.data.formats import TokenizerFeatures
from trl_sft.errors import Fault, LaunchError, MissingPackage, Unreached, UserError
from trl_sft.model import device, load, trust
from trl_sft.recipe import processes as recipe_processes
from trl_sft.recipe import resolved
from trl_sft.recipe.checked import Run
from trl_sft.recipe.processes import TargetMachine
from trl_sft.tokenization import build, chat_template, tokenizer
from trl_sft.training import dry_run, manifest
from trl_sft.training import run as training_run
from trl_sft.training.memory import fit
from trl_sft.training.summary import lines

# rows as any tokenizer might want them: for a look at the columns where none is there
_ANY = TokenizerFeatures(chat_template.NAMES, "")


@dataclass
class Report:
    """What was found."""

    faults: list[Fault] = field(default_factory=list)  # of the recipe, the files it names, their rows
    here: list[Fault] = field(default_factory=list)  # what this machine cannot run
    unseen: list[str] = field(default_factory=list)  # what could not be looked at, with the reason
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> its time
    ready: training_run.Ready | None = None  # the run up to its weights, where all of that is there
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
        manifest.claimed(run)
    settled = _settled(run, report, for_)
    found, chatting = _model(run, report)
    if found is None or chatting is None or settled is None:
        with report.stage("rows"):
            lines([("rows", line) for line in data_rows.load(run, _ANY).notes])
        report.needs("tokens", {"settings": settled, "the tokenizer": chatting})
        return report
    setup = training_run.Setup(found, settled.quantized, chatting, settled.settings, settled.args)
    rows, made = None, None
    with report.stage("rows"):
        rows = training_run.load_rows(run, setup)
        lines([("rows", line) for line in rows.notes])
    if report.needs("tokens", {"the rows": rows}):
        with report.stage("tokens"):
            made = build.make(run, chatting, rows, settled.args, thorough=True)
            lines(made.said)
            attention = str(run.model.get("attn_implementation", ""))
            lines(list(gains.lines(made.train, made.ledger["train"], settled.args, attention)))
    with report.stage("trainer"):
        settled.args.dataset_kwargs = {"skip_prepare_dataset": True}
        if why := dry_run.rehearse(run, found, chatting, settled.args, made):
            report.unseen.append(f"trainer: {why}")
    if rows is not None and made is not None:
        report.ready = training_run.Ready(*setup, rows, made)
        with report.stage("memory"):
            report.memory = fit.check(run, setup, made.train, int(for_.gpu_gib * 2**30) if for_.gpu_gib else None)
            lines(report.memory.lines)
    return report


def _settled(run: Run, report: Report, for_: TargetMachine) -> training_run.Settled | None:
    """Return upstream's settings; what only this machine refuses is no fault of the recipe."""
    processes = 1 if for_.is_this_machine else for_.num_gpus
    with report.stage("settings"):
        settled = None
        try:
            settled = training_run.settle(run, processes=processes)
            device.check_packages(run)
            device.check_trackers(run.recipe.where(("train", "report_to")), settled.args.report_to)
        except UserError as error:
            training_run.settle(run, True, processes)  # what fails there too is the recipe's, and is raised
            report.here += error.faults
        if settled is None or not for_.is_this_machine:
            settled = training_run.settle(run, True, processes)
        about = device.describe_precision(settled.args, run.model.get("dtype", "float32"), settled.quantized)
        told = about if for_.is_this_machine else f"{for_.num_gpus} x {for_.gpu_gib:g} GiB" if for_.gpu_gib else "any"
        lines([("machine", told), *recipe_processes.describe_settings(settled.settings)])
        return settled
    return None


def _model(run: Run, report: Report) -> tuple[load.ModelSource | None, tokenizer.ChatTokenizer | None]:
    """Return the model without weights, and its tokenizer."""
    found, chatting = None, None
    with report.stage("model"):
        found = load.find_model(run)
        lines([("model", found.title)])
        load.check_model(run, found)
    if report.needs("tokenizer", {"the model": found}):
        with report.stage("tokenizer"):
            chatting = tokenizer.load(run, *load.list_tokenizer_sources(found))
            lines([("tokens", line) for line in chatting.said])
    return found, chatting


def show(report: Report, run: Run, for_: TargetMachine) -> int:
    """Say what there is to mend, and return the exit code: 2 for the recipe's faults, and for this machine's `here`."""
    lines([("checked", ", ".join(f"{name} {span(seconds)}" for name, seconds in report.seconds.items()))])
    for line in report.unseen:
        say(f"not checked: {line}")
    mend = [*report.faults, *(report.here if for_.is_this_machine else [])]
    if report.here and not for_.is_this_machine:
        say("\nThis machine, or this version, cannot run it, which is no fault of the recipe:")
        say("\n".join(str(fault) for fault in report.here))
    if mend:
        faults(mend)
        return errors.EXIT_USER_ERROR
    clean = "Nothing to mend" + (" in what was checked" if report.unseen else "")
    say(f"{clean}. Next: {python()} -m trl_sft {resolved.remove_secrets(run, shlex.join(run.recipe.arguments))}")
    return errors.EXIT_DONE
