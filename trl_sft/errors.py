"""What can stop a run, as one small tree.

    UserError              exit code 2: the user can fix it; a message, no traceback
      RecipeError          a key, a value, a path or a pair of keys of the recipe
      DataError            a file or a row
      TemplateError        a tokenizer or a chat template
      MissingPackage       something to install
      UpstreamChanged      an installed version that declares something in another way: another one is to be installed
      LaunchError          the machine or the processes
      Unreached            a hub that cannot be reached: nothing says that the recipe is wrong
    NotAsAsked             exit code 1: what would run is not what was asked, and no key of the recipe mends it
    RunStopped             the run began and ended early; carries its exit code

In: faults, each in three parts. Out: one message. Nothing is printed here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

EXIT_DONE, EXIT_INTERNAL, EXIT_USER_ERROR, EXIT_TRAINING_FAILED, EXIT_OUT_OF_MEMORY = 0, 1, 2, 3, 4
EXIT_TIME_LIMIT = 75  # EX_TEMPFAIL of sysexits.h: try again
EXIT_SIGNAL = 128  # plus the signal's number, as shells report it


# name and password of a URL, `https://name:password@host`, also as a path has it, with one stroke
URL_PASSWORD = re.compile(r"(?<=:/)(/?)[^/@\s:]+:[^/@\s]+(?=@)")
REDACTED = "(left out)"


class Fault(NamedTuple):
    """One thing to mend."""

    where: str  # `recipe.yaml:12 train.pakking`
    problem: str  # what is wrong, with the value as it stands
    fix: str  # what to do: an instruction, or the exact text to write

    def __str__(self) -> str:
        """Three lines: where, what stood there, what to write; without the password of a URL."""
        return URL_PASSWORD.sub(r"\1" + REDACTED, f"{self.where}\n    {self.problem}\n    -> {self.fix}")


class UserError(Exception):
    """The user can fix this: `faults` says where, what stood there and what to write."""

    exit_code = EXIT_USER_ERROR

    def __init__(self, faults: Fault | Sequence[Fault]) -> None:
        """Take one fault or several; they are shown all at once."""
        self.faults = [faults] if isinstance(faults, Fault) else list(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class RecipeError(UserError):
    """A key, a value, a path or a pair of keys of the recipe."""


class DataError(UserError):
    """A data file or a row of it."""


class TemplateError(UserError):
    """A tokenizer or a chat template."""


class MissingPackage(UserError):
    """Something that has to be installed first."""


class UpstreamChanged(UserError):
    """An installed package no longer declares what is read of it; a tested version has to be installed."""


class LaunchError(UserError):
    """The machine or the processes cannot carry the run."""


class Unreached(UserError):
    """A hub that cannot be reached, for what is not on this machine."""


class NotAsAsked(Exception):
    """What would run is not what was asked, and no key of the recipe mends it: a fault of ours or of upstream's."""


class RunStopped(Exception):
    """The run began and ended early: non-finite loss, memory, the time limit, a signal."""

    def __init__(self, message: str, exit_code: int) -> None:
        """`message` is for the user; `exit_code` is what the process returns."""
        self.exit_code = exit_code
        super().__init__(message)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C.

    A bare KeyboardInterrupt that has passed an `exec` of source text, as importing torch does, makes
    CPython end the process by SIGINT whatever exit code it returns; a subclass does not
    (Python/pythonrun.c, `unhandled_keyboard_interrupt`; seen on 3.11).
    """


def first_line(error: BaseException) -> str:
    """Return the first line of somebody else's error, to stand inside one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
