"""Starts the command line in a process of its own that is a fork of this one, which has imported everything.

A new Python needs four seconds to import torch and TRL; a fork begins in milliseconds. It is for tests of signals,
pipes and limits. A `Launcher` is a new Python with environment variables of its own, which starts forks of itself. Not
here: tests of imports, of the interpreter's settings and of what upstream prints while it is imported; each of them
starts a new Python.
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import torch

from trl_sft import cli
from trl_sft.recipe import paths


def start(folder, *words, prepare=None, **options):
    """Start `python -m trl_sft WORDS` in a folder; return the process, a `subprocess.Popen`.

    Args:
        folder: The current folder of the process.
        words: The arguments.
        prepare: A function that the process calls first, as `preexec_fn` of `subprocess.Popen`.
        options: Of `subprocess.Popen`: the streams.

    """
    import trl_sft.training.run  # noqa: F401  # before the fork, so that the next one has it too

    if torch.accelerator.is_available():  # its driver does not survive a fork
        code = (
            "import sys; from trl_sft import cli; from trl_sft.recipe import paths; "
            f"paths.EMBEDDED = paths.Path({str(paths.EMBEDDED)!r}); sys.exit(cli.main())"
        )
        command = [sys.executable, "-u", "-c", code, *words]
        return subprocess.Popen(command, cwd=folder, text=True, preexec_fn=prepare, **options)  # noqa: PLW1509

    def carry_out():
        _carry_out(words, prepare)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns: the fork uses no other thread
        # The process never reaches the program: it ends in `preexec_fn`, after `Popen` has set up its streams.
        return subprocess.Popen(
            ["python"],
            **{"cwd": folder, "text": True, "restore_signals": False},
            preexec_fn=carry_out,  # noqa: PLW1509
            **options,
        )


def _carry_out(words, prepare):
    """Run the command line in this fork, and end the process."""
    code = 1
    try:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # `Popen` waits until the fork has closed its pipe for errors
        gc.enable()
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout, sys.stderr = (_open_stream(number) for number in (1, 2))
        for name in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(name, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
        if prepare is not None:
            prepare()
        sys.argv = ["trl_sft", *words]
        code = cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


class Launcher:
    """A new Python that runs command lines in forks of itself, for variables that packages read while they load."""

    def __init__(self, environment):
        """Start it; the first command waits until it has imported everything."""
        command = [sys.executable, __file__, str(paths.EMBEDDED)]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=environment, text=True, **streams)

    def run(self, folder, *words):
        """Run `python -m trl_sft WORDS` in a folder; return the exit code and everything printed."""
        print(json.dumps([str(folder), words]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self):
        with self._process:
            self._process.stdin.close()


def _launch():
    """Answer the orders of a `Launcher` from standard input until it ends."""
    paths.EMBEDDED = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    for line in sys.stdin:
        folder, words = json.loads(line)
        process = start(folder, *words, **streams)
        output, _ = process.communicate()
        print(json.dumps([process.returncode, output]), file=answers, flush=True)


def _open_stream(number):
    """Return a stream that writes each line to a file descriptor."""
    return open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)


if __name__ == "__main__":
    _launch()
