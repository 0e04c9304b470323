"""Pushes of a run to the hub: after checkpoints, as `train.hub_strategy` says, and at the end with our model card.

Inputs: the recipe, the Trainer's settings, checkpoints, the finished run folder. Outputs: commits, and what was pushed
for run.json. A push that fails ends no run: what was trained stays in the run folder, and the message has the command
that pushes it later. transformers' own push is off, since it writes TRL's card, and pushes every file of the run
folder, rows too. Deliberately not here: what goes to the hub and how (`publishing`).
"""

from __future__ import annotations

import dataclasses
import os
import queue
import shlex
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import HubStrategy
from trl import SFTConfig, SFTTrainer

from trl_sft import console, errors, run_folder
from trl_sft.errors import RunStopped, UserError
from trl_sft.publishing import card_facts, repository, selection, upload
from trl_sft.publishing.repository import Repository
from trl_sft.publishing.upload import PushedCommit
from trl_sft.recipe import paths
from trl_sft.recipe.checked import Run

LAST_CHECKPOINT = "last-checkpoint"  # the path of the checkpoint under `hub_strategy: checkpoint`, as in transformers
_GRACE = 20.0  # seconds that a run which ends early waits for a push in the background
_WHEN = {
    HubStrategy.END: "at the end",
    HubStrategy.EVERY_SAVE: "after each checkpoint (the model alone), and at the end",
    HubStrategy.CHECKPOINT: f"after each checkpoint, with all its files in {LAST_CHECKPOINT}/, and at the end",
    HubStrategy.ALL_CHECKPOINTS: "after each checkpoint, with all its files in checkpoint-N/, and at the end",
}


@dataclass(frozen=True)
class PushPlan:
    """Where and when a run pushes.

    Attributes:
        repository: As the hub described it before training.
        strategy: When.
        always: Whether a checkpoint is pushed while the push before it still runs.
        revision: The branch; None = the main branch.

    """

    repository: Repository
    strategy: HubStrategy
    always: bool
    revision: str | None


def plan(run: Run, args: SFTConfig) -> PushPlan:
    """Ask the hub where a run would push, and whether it may. Nothing is created.

    Args:
        run: the checked recipe.
        args: the live settings.

    Raises:
        LaunchError: the hub refuses, or cannot be reached.

    """
    key = ("train", "hub_model_id" if run.train.get("hub_model_id") else "push_to_hub")
    name = run.train.get("hub_model_id") or run.output_dir.name
    private = run.train.get("hub_private_repo")
    token = run.train.get("hub_token") or None
    target = repository.inspect(run.recipe.where(key), str(name), private=private, token=token)
    return PushPlan(target, HubStrategy(args.hub_strategy), bool(args.hub_always_push), args.hub_revision)


def describe(run: Run, push: PushPlan, base: str) -> list[tuple[str, str]]:
    """Return the lines that say before training what will be pushed, to whom it is shown, and what stays here.

    Args:
        run: the checked recipe.
        push: the plan.
        base: the base model's folder or hub id.

    """
    target = push.repository
    state = "exists" if target.exists else "new"
    text = f"to {target.url} ({state}, {target.visibility}), {_WHEN[push.strategy]}"
    lines = [("push", text + (f", branch {push.revision}" if push.revision else ""))]
    kind = "adapter" if run.lora is not None or paths.is_adapter(Path(base)) else "model"
    records = [name for name in selection.RECORDS if name != run_folder.EVAL or run.evaluate is not None]
    lines.append(("", f"the {kind}, its tokenizer, README.md, {', '.join(records)}"))
    states = "" if push.strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS) else "checkpoints, "
    lines.append(("", f"not: {states}training_args.bin, and files with rows ({', '.join(selection.WITH_ROWS)})"))
    if not target.exists and target.private is None:
        lines.append(("", "Set train.hub_private_repo: true if others may not see it."))
    if kind == "adapter" and Path(base).is_absolute():
        text = f"the adapter names its base model by a path of this machine ({base}): others need that model too"
        lines.append(("note", text))
    return lines


class HubPush(TrainerCallback):
    """Pushes checkpoints in the background, and the finished run at the end."""

    def __init__(self, run: Run, push: PushPlan, show: Callable[[str], None]) -> None:
        """Take the plan.

        Args:
            run: the checked recipe.
            push: where and when.
            show: shows a line on the screen.

        """
        self._run, self._plan, self._show = run, push, show
        self._jobs: queue.Queue[tuple[int, Path] | None] = queue.Queue()
        self._worker: threading.Thread | None = None
        self._waiting = 0  # pushes that are not finished
        self._max_steps = 0
        self._stage = run.output_dir / run_folder.PUSH_STAGE

    def __enter__(self) -> None:
        """Create the repository before step 1, where it does not exist. Raises LaunchError."""
        target = repository.create(self._plan.repository, revision=self._plan.revision)
        self._plan = dataclasses.replace(self._plan, repository=target)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the push in the background for a moment where the block ends by an exception."""
        if kind is not None:
            self._wait(_GRACE)

    def on_save(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Push the checkpoint that was written, in the background."""
        if self._plan.strategy == HubStrategy.END:
            return
        if self._waiting and not self._plan.always:
            self._show(f"note      step {state.global_step} is not pushed: the push before it still runs")
            return
        self._max_steps = state.max_steps
        checkpoint = self._run.output_dir / f"{run_folder.CHECKPOINT}{state.global_step}"
        staged = self._stage / checkpoint.name
        try:
            _link_folder(checkpoint, staged)
        except OSError as error:
            self._show(f"note      step {state.global_step} is not pushed: {errors.first_line(error)}")
            return
        self._waiting += 1
        self._jobs.put((state.global_step, staged))
        if self._worker is None:
            if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
                disable_progress_bars()  # they would break the live line
            self._worker = threading.Thread(target=self._work, name="push to the hub", daemon=True)
            self._worker.start()

    def finish(self, trainer: SFTTrainer, note: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Push the finished run; return what was pushed.

        Args:
            trainer: has trained.
            note: writes what was pushed into run.json.

        Raises:
            RunStopped: The push failed. The run is finished.

        """
        try:
            self._wait(None)
            trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)  # trackers sync then
            pushed = self._push_run()
        except UserError as error:
            fault = error.faults[0]
            raise self._fail(f"its push failed: {fault.problem}", fault.fix) from error
        except OSError as error:
            raise self._fail(f"its push failed: {errors.first_line(error)}") from error
        except (KeyboardInterrupt, errors.Interrupted) as error:
            raise self._fail("its push was stopped", exit_code=errors.EXIT_SIGNAL + signal.SIGINT) from error
        console.say(f"pushed    {pushed.describe()}")
        note(pushed.as_json())
        return pushed.as_json()

    def _wait(self, timeout: float | None) -> None:
        """Wait for pushes in the background; `timeout` in seconds, None = until they end."""
        if self._worker is not None:
            self._jobs.put(None)
            self._worker.join(timeout)
            if self._worker.is_alive():
                self._show("note      the push of the last checkpoint is not finished, and ends with this process")
                return
            self._worker = None
        shutil.rmtree(self._stage, ignore_errors=True)

    def _work(self) -> None:
        """Push what waits, one checkpoint after another, until the run ends."""
        while (job := self._jobs.get()) is not None:
            step, staged = job
            try:
                self._push_checkpoint(step, staged)
            except UserError as error:
                self._show(f"note      the push of step {step} failed; the run goes on: {error.faults[0].problem}")
            except Exception as error:  # a push must not end the run
                self._show(f"note      the push of step {step} failed; the run goes on: {errors.first_line(error)}")
            finally:
                shutil.rmtree(staged, ignore_errors=True)
                self._waiting -= 1

    def _push_checkpoint(self, step: int, staged: Path) -> None:
        """Push the model of a checkpoint, and with some strategies all of its files too."""
        files = selection.select_checkpoint_model(staged)
        facts = card_facts.read_facts(self._run.output_dir)
        line = f"Training is in progress: step {step} of {self._max_steps}. The results follow at its end."
        record = {**facts.run, "outcome": run_folder.RUNNING, "summary": [line]}
        facts = dataclasses.replace(facts, run=record, is_adapter=run_folder.ADAPTER_CONFIG in files)
        files[run_folder.CARD] = upload.write_card(facts, self._plan.repository)
        if self._plan.strategy == HubStrategy.CHECKPOINT:
            files |= selection.select_checkpoint(staged, LAST_CHECKPOINT)
        if self._plan.strategy == HubStrategy.ALL_CHECKPOINTS:
            files |= selection.select_checkpoint(staged, staged.name)
        message = f"Training in progress, step {step}"
        upload.commit(self._plan.repository, files, message, revision=self._plan.revision)

    def _push_run(self) -> PushedCommit:
        """Push the finished run."""
        target = self._plan.repository
        console.say(f"pushing   to {target.url}")
        files = selection.select_run(self._run.output_dir)
        files[run_folder.CARD] = upload.write_card(card_facts.read_facts(self._run.output_dir), target)
        return upload.commit(target, files, "End of training", revision=self._plan.revision)

    def _fail(self, problem: str, fix: str = "", *, exit_code: int = errors.EXIT_USER_ERROR) -> RunStopped:
        """Return the error of a push that failed after the run was finished."""
        folder = run_folder.shorten_path(self._run.output_dir)
        lines = [f"the model is trained and saved in {folder}, but {problem}", fix]
        lines.append(f"To push it later: {format_command(folder, self._plan.repository)}")
        return RunStopped("\n".join(filter(None, lines)), exit_code, code="hub.push_failed")


def format_command(folder: str, target: Repository) -> str:
    """Return the command that pushes a finished run later."""
    words = ["export", folder, "--push", target.repo_id, *(["--private"] if target.private else [])]
    return f"{console.get_python_command()} -m trl_sft {shlex.join(words)}"


def _link_folder(folder: Path, copy: Path) -> None:
    """Give the files of a checkpoint second names: the Trainer may remove the checkpoint while it is pushed."""
    for path in folder.rglob("*"):
        if path.is_file():
            place = copy / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, place)
            except OSError:  # a file system without them
                shutil.copyfile(path, place)
