"""The command line: the first word names the command; what the user can fix becomes one message and an exit code.

Inputs: the arguments after `python -m trl_sft`. Outputs: an exit code (`errors.EXIT_...`, or 128 plus the number of a
signal), and under `--json` one JSON object. Each command is a module, or a folder where it is more than its arguments,
with `main(argv)`; heavy packages are imported once its arguments are parsed. Not here: what a command does.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from trl_sft import console, errors, garbage_collection, json_output, ranks, redaction
from trl_sft.cli import (
    audit,
    bisect,
    build,
    chat,
    check,
    evaluate,
    explain,
    export,
    fix,
    import_settings,
    init,
    judge,
    launch,
    merge,
    prepare,
    preview,
    report,
    runs,
    schema,
    serve,
    suspects,
    train,
    votes,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after `python -m trl_sft`; those of the process where None.

    Returns:
        The exit code.

    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    redaction.register_arguments(arguments)
    folder = ranks.get_folder() if argv is None else None
    if argv is None:
        ranks.silence()
        sys.excepthook = _print_traceback
        garbage_collection.own_process()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # one of the documented departures from upstream's defaults
    # Upstream's progress bars: on a terminal only, and only for what takes longer than a second.
    os.environ.setdefault("TQDM_DELAY" if console.shows_progress() else "TQDM_DISABLE", "1")
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, _interrupt)
    try:
        try:
            if folder is not None:
                return _answer_to_launch(folder, arguments)
            if _take_out_json(arguments):
                return _answer_as_json(arguments)
            return _run_command(arguments)
        finally:
            print(end="", flush=True)  # here, since an error while Python shuts down can no longer be caught
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _has_lost_its_reader(stream)]
        if not unread:
            raise
        for stream in unread:
            console.discard_output(stream)
        return errors.EXIT_SIGNAL + signal.SIGPIPE


def _run_command(arguments: list[str]) -> int:
    """Run the command that the first argument names, or train; print what the user can fix and return the exit code."""
    try:
        if arguments and arguments[0] in COMMANDS:
            return COMMANDS[arguments[0]](arguments[1:])
        if arguments:
            _refuse_misspelt_command(arguments)
        return train.main(arguments)
    except errors.UserError as error:
        ranks.let_first_speak()
        console.print_faults(error.faults)
        return error.exit_code
    except errors.RunStopped as error:
        ranks.let_first_speak()
        console.say_error(f"trl_sft: {error}")
        _add_ending(str(error), error.code)
        return error.exit_code
    except Exception as error:
        from trl_sft import disk

        fault = disk.explain(error)
        if fault is None:
            raise
        console.print_faults([fault])
        return errors.EXIT_USER_ERROR
    except KeyboardInterrupt:
        message = "stopped before training began; no checkpoint was written"
        console.say_error(f"trl_sft: {message}")
        _add_ending(message, "run.interrupted")
        return errors.EXIT_SIGNAL + signal.SIGINT


def _take_out_json(arguments: list[str]) -> bool:
    """Remove `--json` from the arguments, but not from another tool's flags after `--`; tell whether it was there."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--json" not in arguments[:end]:
        return False
    arguments[:end] = [word for word in arguments[:end] if word != "--json"]
    return True


def _answer_as_json(arguments: list[str]) -> int:
    """Run a command, and print its answer as one JSON object, however it ends; return the exit code."""
    command = arguments[0] if arguments and arguments[0] in COMMANDS else "train"
    with json_output.collect(command) as answer:
        answer.exit_code = errors.EXIT_INTERNAL
        try:
            answer.exit_code = _run_command(arguments)
        except SystemExit as ended:  # --help and --version
            answer.exit_code = ended.code if isinstance(ended.code, int) else errors.EXIT_DONE
        except BrokenPipeError:
            raise
        except Exception as error:
            _print_traceback(type(error), error, error.__traceback__)
            _add_internal_error(error)
    return answer.exit_code


def _answer_to_launch(folder: Path, arguments: list[str]) -> int:
    """Run a command as one of several processes, and write down how it ended; return the exit code for torchrun."""
    from trl_sft.launch import endings

    endings.announce(folder)
    with json_output.record("train") as answer:
        answer.exit_code = errors.EXIT_INTERNAL
        try:
            answer.exit_code = _run_command(arguments)
        except Exception as error:
            _print_traceback(type(error), error, error.__traceback__)
            _add_internal_error(error)
    exit_code = endings.write(folder, answer.exit_code, values=answer.values, faults=answer.faults)
    ranks.leave()
    return exit_code


def _add_ending(message: str, code: str) -> None:
    """Put the early end of a run into a JSON answer; the lines after the first one say what to do."""
    if json_output.is_requested():
        from trl_sft import fault_codes

        problem, _, fix = message.partition("\n")
        fix = fix or fault_codes.read_codes()[code].fix
        json_output.add_faults([errors.Fault("the run", problem, fix, code=code)])


def _add_internal_error(error: Exception) -> None:
    """Put an exception that no user caused into a JSON answer."""
    if isinstance(error, errors.NotAsAsked):
        json_output.add_faults(error.faults)
        return
    from trl_sft import fault_codes

    code = "run.internal_error"
    problem = f"{type(error).__name__}: {errors.first_line(error)}"
    json_output.add_faults([errors.Fault("trl_sft", problem, fault_codes.read_codes()[code].fix, code=code)])


def _has_lost_its_reader(stream: TextIO | None) -> bool:
    """Tell whether a stream is a pipe that nothing reads any more, as after `| head -1`."""
    try:
        descriptor = stream.fileno() if stream else None
    except (OSError, ValueError):  # a stream without a file, as in a notebook
        return False
    if descriptor is None:
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # 0: errors are reported without being named
    return bool(poll.poll(0))


def _print_traceback(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    """Print an error of this package with its traceback, escaped and without secrets."""
    console.say_error(redaction.redact_shapes("".join(traceback.format_exception(kind, error, frames))).rstrip("\n"))


def _interrupt(_number: int, _frame: object) -> None:
    """Handle SIGINT: see `errors.Interrupted` for why a plain KeyboardInterrupt is not enough."""
    raise errors.Interrupted


def _refuse_misspelt_command(arguments: list[str]) -> None:
    """Raise RecipeError if the first word is no file, and means or resembles a command."""
    from trl_sft.suggestions import STRICT, nearest_name

    word = arguments[0]
    is_path = os.path.exists(word)  # noqa: PTH110 (pathlib raises on a name that is too long)
    if is_path or not word.replace("-", "").isalpha():
        return
    code = "run.unknown_command"
    problem = f"{word} is not a command, and no file has this name"
    if word in _TRAIN_WORDS:
        command_line = shlex.join(["python", "-m", "trl_sft", *(arguments[1:] or ["RECIPE"])])
        fix = f"Write `{command_line}`: to train, the recipe alone is named."
        raise errors.RecipeError(errors.Fault(word, problem, fix, code=code))
    command = _COMMAND_WORDS.get(word) or nearest_name(word, COMMANDS, cutoff=STRICT)
    if command:
        raise errors.RecipeError(errors.Fault(word, problem, f"Did you mean `{command}`?", code=code))


# Words by which other tools call what the commands do.
_TRAIN_WORDS = ("train", "run", "sft", "finetune", "fine-tune", "fit", "start")
_COMMAND_WORDS = {
    **dict.fromkeys(["validate", "lint", "verify", "test", "dry-run", "dryrun"], "check"),
    **dict.fromkeys(["show", "view", "inspect"], "preview"),
    **dict.fromkeys(["tokenize", "preprocess"], "prepare"),
    **dict.fromkeys(["new", "create", "generate"], "init"),
    **dict.fromkeys(["convert", "migrate"], "import"),
    **dict.fromkeys(["repair", "correct", "autofix"], "fix"),
    **dict.fromkeys(["describe", "doc", "docs"], "explain"),
    **dict.fromkeys(["list", "ls", "history", "status"], "runs"),
    **dict.fromkeys(["talk", "ask", "infer", "inference"], "chat"),
    **dict.fromkeys(["rate", "annotate", "label", "blind"], "judge"),
    **dict.fromkeys(["server", "api", "deploy", "host"], "serve"),
    **dict.fromkeys(["fuse", "combine", "unload"], "merge"),
    **dict.fromkeys(["convert-to-gguf", "gguf", "ollama", "vllm", "quantize"], "export"),
    **dict.fromkeys(["eval", "score", "benchmark", "assess"], "evaluate"),
    **dict.fromkeys(["synthesize", "synthesise", "datagen", "make-data", "build-data"], "build"),
    **dict.fromkeys(["torchrun", "distributed", "multi-gpu", "accelerate", "deepspeed"], "launch"),
    **dict.fromkeys(["hurt", "influence", "attribute", "mislabelled", "mislabeled", "which-rows-hurt"], "suspects"),
    **dict.fromkeys(["clean", "dedup", "deduplicate", "quality", "curate", "decontaminate"], "audit"),
    "help": "--help",
    "version": "--version",
}
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "audit": audit.main,
    "bisect": bisect.main,
    "build": build.main,
    "chat": chat.main,
    "check": check.main,
    "evaluate": evaluate.main,
    "explain": explain.main,
    "export": export.main,
    "fix": fix.main,
    "import": import_settings.main,
    "init": init.main,
    "judge": judge.main,
    "launch": launch.main,
    "merge": merge.main,
    "prepare": prepare.main,
    "preview": preview.main,
    "report": report.main,
    "runs": runs.main,
    "schema": schema.main,
    "serve": serve.main,
    "suspects": suspects.main,
    "votes": votes.main,
}
