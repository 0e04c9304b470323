"""Shows each warning of upstream once, on one line, and hides the warnings on which no user can act.

Inputs: log records and Python warnings of upstream's packages. Outputs: lines on standard error. Not here: our own
messages (`console`).
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator

from trl_sft import console

_UPSTREAM = ("transformers", "trl", "datasets", "peft", "accelerate", "huggingface_hub", "bitsandbytes", "torch")
# Warnings of upstream on which a user cannot act, with the versions that print them.
_NOISE = re.compile(
    "|".join(
        (
            # trl 1.16 sets the name that transformers 5.23 deprecates
            r"`gradient_checkpointing` is deprecated",
            # transformers 5.23 in its own Trainer
            r"`is_gradient_checkpointing` is deprecated",
            # datasets, before it raises: the fault that we show says file and line
            r"Failed to (load JSON from|read( schema from)?) file",
            # huggingface_hub 1.x, for a README.md beside the rows that is no card of a data set
            r"Repo card metadata block was not found",
            # transformers 5.23 on resuming a model with tied weights, which hold one copy
            r"missing keys in the checkpoint model loaded: \['lm_head.weight'\]",
            # TRL tokenizes first and cuts at max_length after
            r"Token indices sequence length is longer than the specified maximum",
            # bitsandbytes 0.50 without the optional `kernels`
            r"Failed to load CPU gemm_4bit_forward",
            # bitsandbytes 0.50, at every 8-bit layer: how LLM.int8() works
            r"MatMul8bitLt: inputs will be cast",
            # transformers 5.x, where tokens are added: the line `tokens` says what grows and is trained
            r"The new (embeddings|lm_head weights) will be initialized from",
            # transformers 5.x: TRL aligns special tokens of model and tokenizer, as it should
            r"The tokenizer has new PAD/BOS/EOS tokens",
            # torch 2.13 on a machine without an accelerator
            r"'pin_memory' argument is set as true but no accelerator is found",
            # trl 1.x labels its own experimental parts
            r"TRL.*experimental",
        )
    )
)


class _OnceHandler(logging.Handler):
    """Shows each warning of upstream once, on one line, unless it is known noise."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record as a note."""
        text = " ".join(record.getMessage().split()).removeprefix("[RANK 0] ")
        if text in self._seen or _NOISE.search(text):
            return
        self._seen.add(text)
        name = "Python" if record.name == "py.warnings" else record.name.partition(".")[0]
        console.say_error(f"note from {name}: {text}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show each warning of upstream once inside the block, on one line, without those on which no user can act.

    Import upstream inside the block: the packages add handlers to their loggers while they are imported, and the block
    ignores these handlers.
    """
    handler = _OnceHandler()
    loggers = [logging.getLogger(name) for name in (*_UPSTREAM, "py.warnings")]
    before = [(logger.handlers[:], logger.propagate, logger.level, logger.addHandler) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.addHandler = _ignore_handler  # type: ignore[assignment, method-assign]
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in (DeprecationWarning, ResourceWarning):  # for upstream's developers
            warnings.simplefilter("ignore", category)
        warnings.showwarning = _log_warning
        try:
            yield
        finally:
            for logger, (handlers, propagate, level, add_handler) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
                logger.addHandler = add_handler  # type: ignore[method-assign]
                logger.setLevel(level)


def _ignore_handler(_handler: logging.Handler) -> None:
    """Stand in for `Logger.addHandler` inside `quiet`."""


def _log_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Stand in for `warnings.showwarning` inside `quiet`."""
    logging.getLogger("py.warnings").warning("%s", message)
