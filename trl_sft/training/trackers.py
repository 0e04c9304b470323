"""Trackers of `train.report_to` are told what a run logs, and can never end it.

In: the Trainer with upstream's tracker callbacks. Out: the same callbacks, called after this package's own, so that a
run that is refused reaches no tracker; an error in one is said once, and the run goes on without that tracker.
Deliberately absent: trackers of our own, and missing packages (`model.needed_packages`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import SFTTrainer

from trl_sft import errors

_EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


def isolate(trainer: SFTTrainer, show: Callable[[str], None]) -> None:
    """Move the trackers behind all other callbacks, and let none of their errors through.

    Args:
        trainer: has its trackers, and the callbacks of this package.
        show: shows a line on the screen.

    """
    names = {callback: name for name, callback in INTEGRATION_TO_CALLBACK.items()}
    callbacks = trainer.callback_handler.callbacks
    trackers = [callback for callback in callbacks if type(callback) in names]
    for tracker in trackers:
        callbacks.remove(tracker)
        callbacks.append(tracker)
        _catch_errors(tracker, names[type(tracker)], show)


def _catch_errors(tracker: TrainerCallback, name: str, show: Callable[[str], None]) -> None:
    """Replace the events of one tracker by those that catch its errors; after the first one it is called no more."""
    failed = False

    def call(event: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        if failed:
            return None
        try:
            return event(*args, **kwargs)
        except Exception as error:
            failed = True
            text = errors.first_line(error)
            show(
                f"note      {name} failed and gets no more values; the run goes on: {text}. log.jsonl has every value."
            )
            return None

    for event in _EVENTS:
        setattr(tracker, event, functools.partial(call, getattr(tracker, event)))
