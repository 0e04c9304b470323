"""Runs the command line in processes that die, or are refused by the disk, at a chosen operation on files.

A server imports the package once; each command runs in a fork of it, so that it starts in milliseconds. `file_faults.c`
is preloaded into the server, and counts what a fork does to files below some folders.
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
_SOURCE = HERE / "file_faults.c"
_SECONDS = 120  # the longest command


class Ending(NamedTuple):
    """How a command ended."""

    code: int  # exit code; negative = the number of the signal that killed it
    output: str  # of standard output and standard error
    operations: list[str]  # `rename /tmp/x/out/run.json`, in their order


class Server:
    """A process that has imported the package, and runs commands in forks of itself."""

    def __init__(self, folder: Path) -> None:
        """Compile the preloaded library into a folder and start the server."""
        self._folder = folder
        library = folder / "file_faults.so"
        flags = ["-shared", "-fPIC", "-O1", "-Wno-nonnull-compare"]
        subprocess.run(["cc", *flags, "-o", library, _SOURCE, "-ldl"], check=True, capture_output=True)
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        with (folder / "server").open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self._process.stdout
        assert self._process.stdout.readline() == "ready\n"

    def run(self, here: Path, *words: str, watched: tuple[Path, ...] = (), **fault: int | bool | float) -> Ending:
        """Run `python -m trl_sft WORDS` in a folder.

        Args:
            here: The current folder.
            words: The arguments.
            watched: Folders whose operations count; `here/out` if empty.
            fault: `at`, the number of the operation from 1; `error`, the number of the error that it gets, 0 = the
                process is killed; `half`, whether it writes half of its bytes first; `stays`, whether every later
                operation fails too; `seconds`, after which the process is killed at whatever it does.

        """
        log, output = self._folder / "operations", self._folder / "output"
        watched = watched or (here / "out",)
        order = {"here": str(here), "words": words, "watched": ":".join(map(str, watched)), "fault": fault}
        order |= {"log": str(log), "output": str(output)}
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(order), file=self._process.stdin, flush=True)
        code = json.loads(self._process.stdout.readline())
        operations = [line.partition(" ")[2] for line in log.read_text(errors="replace").splitlines()]
        return Ending(code, output.read_text(errors="replace"), operations)

    def close(self) -> None:
        """End the server."""
        with self._process:
            assert self._process.stdin
            self._process.stdin.close()


def _serve() -> None:
    """Answer orders from standard input until it ends."""
    import ctypes

    gc.disable()  # until all is imported
    os.environ["HF_HOME"] = os.environ.get("HF_HOME") or tempfile.mkdtemp()
    for name in ("peft", "torch", "trl", "trl_sft.training.run", "trl_sft.cli.check.report", "torch._dynamo"):
        __import__(name)
    from trl_sft.recipe import paths

    paths.EMBEDDED = HERE / "toy"
    arm = ctypes.CDLL(None).file_faults_arm
    arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    arm.restype = None
    _warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if process == 0:
            _run(order, arm)
        print(json.dumps(_wait(process, order["fault"].get("seconds"))), flush=True)


def _warm_up() -> None:
    """Train once, so that what the packages build at their first use exists before the forks."""
    from trl_sft import cli

    ready = os.dup(1)
    os.dup2(2, 1)  # a line on standard output is an answer
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"question": f"What is {n}?", "answer": str(n)} for n in range(10)]
        (Path(folder) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {
            "model": {"name_or_path": "trl_sft:tiny"},
            "data": {"train": "rows.jsonl", "eval_fraction": 0.2},
            "train": {"max_steps": 1, "output_dir": str(Path(folder) / "out")},
        }
        (Path(folder) / "recipe.yaml").write_text(json.dumps(recipe))
        for words in ([], ["lora={r: 2, target_modules: all-linear}", "run.overwrite=true"]):
            assert cli.main([str(Path(folder) / "recipe.yaml"), *words]) == 0
    os.dup2(ready, 1)
    os.close(ready)
    gc.collect()
    gc.freeze()  # a fork collects only what it makes itself
    gc.enable()


def _wait(process: int, seconds: float | None) -> int:
    """Return the exit code of a fork, which is killed after so many seconds."""
    end = time.monotonic() + (seconds or _SECONDS)
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return -signal.SIGKILL
        time.sleep(0.005)


def _run(order: dict, arm) -> None:
    """Run one command in this fork, and end it."""
    import datasets

    from trl_sft import cli

    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["here"])
    datasets.config.HF_DATASETS_CACHE = Path(order["here"]) / "cache"
    fault = order["fault"]
    code = 1
    try:
        numbers = [int(fault.get(name, 0)) for name in ("at", "error", "half", "stays")]
        arm(order["watched"].encode(), *numbers, log)
        code = cli.main(order["words"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def copy(folder: Path, target: Path) -> Path:
    """Replace a folder by a copy of another one, links as links."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target, symlinks=True)
    return target


if __name__ == "__main__":
    _serve()
