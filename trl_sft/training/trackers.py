"""Trackers of `train.report_to` are told what a run logs and its findings, and can never end it.

In: the Trainer with upstream's tracker callbacks. Out: the same callbacks, called after this package's own, so that a
run that is refused reaches no tracker; an error in one is said once, and the run goes on without that tracker.
Findings become alerts of wandb and trackio, and texts of TensorBoard; the other trackers have no alerts that their
callback in transformers reaches. Deliberately absent: trackers of our own, and missing packages
(`model.needed_packages`).
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import SFTTrainer

from trl_sft import errors, ranks
from trl_sft.training.diagnosis.findings import Finding

_EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class IsolatedTracker:
    """A tracker whose errors end no run: after the first one it is called no more."""

    def __init__(self, callback: Any, name: str, show: Callable[[str], None]) -> None:
        """Replace the events of a tracker by those that catch its errors.

        Args:
            callback: the tracker, a callback of transformers.
            name: as `train.report_to` names it.
            show: shows a line on the screen.

        """
        self._callback, self._name, self._show = callback, name, show
        self._has_begun = self._has_failed = self._has_failed_alert = False
        self._waiting: list[Finding] = []  # alerts of before the tracker begins
        for event in _EVENTS:
            setattr(callback, event, functools.partial(self._call, getattr(callback, event)))
        callback.on_train_begin = functools.partial(self._begin, callback.on_train_begin)

    def alert(self, finding: Finding) -> None:
        """Send a finding where the tracker has alerts; an alert that fails is said once, and changes nothing else."""
        send = _ALERTS.get(self._name)
        if send is None or self._has_failed:
            return
        if not self._has_begun:
            self._waiting.append(finding)
            return
        try:
            send(self._callback, finding)
        except Exception as error:
            if not self._has_failed_alert:
                self._has_failed_alert = True
                text = errors.first_line(error)
                self._show(f"note      {self._name} did not take an alert; the run goes on: {text}.")

    def _begin(self, event: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Let the tracker begin, and send what waits for it."""
        event(*args, **kwargs)
        self._has_begun = True
        for finding in self._waiting:
            self.alert(finding)
        self._waiting.clear()

    def _call(self, event: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call an event of the tracker."""
        if self._has_failed:
            return None
        try:
            return event(*args, **kwargs)
        except Exception as error:
            self._has_failed = True
            text = errors.first_line(error)
            self._show(
                f"note      {self._name} failed and gets no more values; the run goes on: {text}. log.jsonl has every"
                " value."
            )
            return None


def isolate(trainer: SFTTrainer, show: Callable[[str], None]) -> Callable[[Finding], None]:
    """Move the trackers behind all other callbacks, and let none of their errors through.

    Args:
        trainer: has its trackers, and the callbacks of this package.
        show: shows a line on the screen.

    Returns:
        A function that sends a finding to every tracker that has alerts.

    """
    names = {callback: name for name, callback in INTEGRATION_TO_CALLBACK.items()}
    callbacks = trainer.callback_handler.callbacks
    isolated = []
    for tracker in [callback for callback in callbacks if type(callback) in names]:
        callbacks.remove(tracker)
        callbacks.append(tracker)
        isolated.append(IsolatedTracker(tracker, names[type(tracker)], show))

    def alert(finding: Finding) -> None:
        if ranks.is_first():
            for tracker in isolated:
                tracker.alert(finding)

    return alert


def _alert_wandb(callback: Any, finding: Finding) -> None:
    """Send a finding as an alert of the running wandb run."""
    wandb = callback._wandb
    if wandb.run is not None:
        level = wandb.AlertLevel.ERROR if finding.stops else wandb.AlertLevel.WARN
        wandb.run.alert(title=_write_title(finding), text=_write_text(finding), level=level)


def _alert_trackio(callback: Any, finding: Finding) -> None:
    """Send a finding as an alert of trackio, which would print it again, with control characters."""
    trackio = callback._trackio
    if not hasattr(trackio, "alert"):  # before trackio 0.5
        return
    level = trackio.AlertLevel.ERROR if finding.stops else trackio.AlertLevel.WARN
    with contextlib.redirect_stdout(io.StringIO()):
        trackio.alert(title=_write_title(finding), text=_write_text(finding), level=level)


def _write_tensorboard(callback: Any, finding: Finding) -> None:
    """Write a finding as a text of TensorBoard, which has no alerts, at the step at which it was seen last."""
    writer = callback.tb_writer
    if writer is not None:
        writer.add_text(f"findings/{finding.code}", _write_text(finding), max(finding.steps, default=0))
        writer.flush()


def _write_title(finding: Finding) -> str:
    return f"Finding: {finding.code.replace('_', ' ')}"


def _write_text(finding: Finding) -> str:
    return f"{finding.observation} {finding.meaning} What to try: {finding.advice}"


# name in `train.report_to` -> how a finding is sent to its callback
_ALERTS: dict[str, Callable[[Any, Finding], None]] = {
    "wandb": _alert_wandb,
    "trackio": _alert_trackio,
    "tensorboard": _write_tensorboard,
}
