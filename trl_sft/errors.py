"""The exceptions of the package, and the exit codes of its commands.

    UserError              exit code 2: the user can fix it; a message, no traceback
      RecipeError          a key, a value, a path or a pair of keys of the recipe
      DataError            a file or a row
      TemplateError        a tokenizer or a chat template
      MissingPackage       something to install
      UpstreamChanged      an installed package no longer has a definition that trl_sft reads: install a tested version
      LaunchError          the machine or the processes
      UsageError           an argument of the command line, under `--json`
      Unreached            the hub cannot be reached; the recipe may be right
    NotAsAsked             exit code 1: what would run differs from the recipe, and no key of the recipe changes that
    RunStopped             the run started and ended early; carries its exit code

Inputs: faults, each with a place, a problem and a fix.
Outputs: exceptions, whose text is the message.
Not here: printing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from trl_sft import redaction

EXIT_DONE, EXIT_INTERNAL, EXIT_USER_ERROR, EXIT_TRAINING_FAILED, EXIT_OUT_OF_MEMORY = 0, 1, 2, 3, 4
EXIT_MEANING_DIFFERS = 5  # `import` wrote a recipe, which trains something else than the settings say
EXIT_TIME_LIMIT = 75  # EX_TEMPFAIL of sysexits.h: try again
EXIT_SIGNAL = 128  # plus the number of the signal, as shells report it

_MAX_SHOWN = 4000  # characters of each part of a fault
_PLACE = re.compile(r"(?P<file>[^\s(][^:]*?)(?: row (?P<row>\d+)(?: \(line (?P<row_line>\d+)\))?|:(?P<line>\d+))(?!\S)")


class Edit(NamedTuple):
    """A change of a recipe that a program can make; the fault that carries it is then solved."""

    action: str  # "set" the value of `key`, "rename" the key to `new`, "remove" the key
    key: tuple[str | int, ...]  # ("data", "train", 0, "path")
    value: Any = None  # of "set"
    new: tuple[str | int, ...] = ()  # of "rename": the whole new key, maybe in another section


class Place(str):
    """The place of a fault in words, and its parts where they are known."""

    file: str  # as the user knows it; "" = no file
    line: int | None  # of the file, from 1
    row: int | None  # of a source, from 1
    key: tuple[str | int, ...]  # of the recipe; () = none

    def __new__(
        cls,
        text: str,
        *,
        file: str = "",
        line: int | None = None,
        row: int | None = None,
        key: tuple[str | int, ...] = (),
    ) -> Place:
        """Return the text with its parts."""
        place = super().__new__(cls, text)
        place.file, place.line, place.row, place.key = file, line, row, key
        return place

    @classmethod
    def parse(cls, text: str) -> Place:
        """Return the place that a text names: `rows.jsonl:3`, `rows.jsonl row 8 (line 9)`, or words without parts."""
        match = _PLACE.match(text)
        if match is None:
            return cls(text)
        numbers = {name: int(match[name]) for name in ("row", "row_line", "line") if match[name]}
        return cls(text, file=match["file"], line=numbers.get("line", numbers.get("row_line")), row=numbers.get("row"))


class Fault(NamedTuple):
    """One problem that the user can fix."""

    where: str  # `recipe.yaml:12 train.pakking`; a `Place` where its parts are known
    problem: str  # what is wrong, with the value
    fix: str  # what to do, as an imperative sentence
    code: str  # the kind of problem, one of `fault_codes.yaml`: `recipe.unknown_key`
    edits: tuple[Edit, ...] = ()  # changes of the recipe that solve it; () = a person has to decide

    def __str__(self) -> str:
        """Return three lines: the place, the problem, the fix; without secrets."""
        where, problem, fix = (_shorten(redaction.redact_shapes(part)) for part in (self.where, self.problem, self.fix))
        return f"{where}\n    {problem}\n    -> {fix}"


class UserError(Exception):
    """The user can fix this; `faults` has each problem with its place and its fix."""

    exit_code = EXIT_USER_ERROR

    def __init__(self, faults: Fault | Sequence[Fault]) -> None:
        """Take one fault or several; all are shown together."""
        self.faults = [faults] if isinstance(faults, Fault) else list(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class RecipeError(UserError):
    """A key, a value, a path or a pair of keys of the recipe is wrong."""


class DataError(UserError):
    """A data file, or a row of it, is wrong."""


class TemplateError(UserError):
    """A tokenizer or a chat template cannot be used."""


class MissingPackage(UserError):
    """A package has to be installed first."""


class UpstreamChanged(UserError):
    """An installed package no longer has a definition that trl_sft reads from its source; install a tested version."""


class LaunchError(UserError):
    """The machine or the processes cannot train the run."""


class UsageError(UserError):
    """The command line has an argument that the command does not take, or lacks one; only under `--json`."""


class Unreached(UserError):
    """The hub cannot be reached, and a model or data set that the recipe names is not on this machine."""


class NotAsAsked(Exception):
    """The run would differ from the recipe, and no key can change that: an error of trl_sft or of upstream."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        """Take a fault for each difference."""
        self.faults = list(faults)
        super().__init__("\n".join(map(str, faults)))


class RunStopped(Exception):
    """The run started and ended early: a loss that is not finite, memory, the time limit, a signal."""

    def __init__(self, message: str, exit_code: int, *, code: str) -> None:
        """Take the message for the user, the exit code of the process, and the kind of end (`fault_codes.yaml`)."""
        self.exit_code, self.code = exit_code, code
        super().__init__(redaction.redact(message))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C.

    Importing torch runs `exec` on source text. If a KeyboardInterrupt passes through such an `exec`, CPython ends the
    process with SIGINT and ignores our exit code. It does not do this for a subclass of KeyboardInterrupt
    (Python/pythonrun.c, `unhandled_keyboard_interrupt`; observed on 3.11).
    """


def _shorten(text: str) -> str:
    """Return a text of a length that a person reads; a JSON answer has the whole text."""
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN // 2]} ... {text[-_MAX_SHOWN // 2 :]}"


def first_line(error: BaseException) -> str:
    """Return the first line of an upstream error, for use inside one of our messages.

    A line that only announces the next one ("Error(s) in loading state_dict for PeftModel:") is followed by that one.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return text.rstrip(".")
