"""The command line: the first word names the command; what the user can fix becomes one message and an exit code.

Inputs: the words after `python -m trl_sft`. Outputs: an exit code (`errors.EXIT_...`, or 128 and the number of a
signal). Each command is a module, or a folder where it is more than its arguments, with `main(argv)`; heavy packages
are imported once its arguments are parsed. Not here: what a command does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trl_sft import console, errors
from trl_sft.cli import arguments, explain, import_settings, init, prepare, schema, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after `python -m trl_sft`; those of the process where None.

    Returns:
        The exit code.

    """
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # one of the documented departures from upstream's defaults
    # Upstream's progress bars: on a terminal only, and only for what takes longer than a second.
    os.environ.setdefault("TQDM_DELAY" if sys.stderr.isatty() else "TQDM_DISABLE", "1")
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, _interrupt)
    try:
        if words and words[0] in COMMANDS:
            return COMMANDS[words[0]](words[1:])
        if words:
            _refuse_misspelt_command(words[0])
        return train.main(words)
    except errors.UserError as error:
        console.print_faults(error.faults)
        return error.exit_code
    except errors.RunStopped as error:
        print(f"trl_sft: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("trl_sft: stopped before training began; no checkpoint was written", file=sys.stderr)
        return errors.EXIT_SIGNAL + signal.SIGINT


def _interrupt(_number: int, _frame: object) -> None:
    """Handle SIGINT: see `errors.Interrupted` for why a plain KeyboardInterrupt will not do."""
    raise errors.Interrupted


def _refuse_misspelt_command(word: str) -> None:
    """Raise RecipeError for a first word that is no file, and nearly a command."""
    from trl_sft.suggestions import STRICT, nearest_name

    command = nearest_name(word, COMMANDS, cutoff=STRICT) if word.isalpha() else ""
    if command and not Path(word).exists():
        problem = "This is not a command, and no file has this name."
        raise errors.RecipeError(errors.Fault(word, problem, f"Did you mean `{command}`?"))


def _check(argv: list[str]) -> int:
    parser = arguments.create_parser(
        "check RECIPE [section.key=value ...] [--on MACHINE] [--fast] [--probe]",
        "Find every problem that needs no weights: recipe, folder, template, rows, settings. Estimate the memory.",
        example="check recipe.yaml --on 8x80GiB",
    )
    parser.add_argument(
        "--on",
        metavar="MACHINE",
        default="here",
        help="the machine that will train: here (the default), any, or cards with their memory (8x80GiB)",
    )
    parser.add_argument("--fast", action="store_true", help="check the recipe alone; load no tokenizer and no rows")
    parser.add_argument(
        "--probe", action="store_true", help="then train two steps on the largest batch; measure memory"
    )
    began = time.perf_counter()
    run, options = arguments.parse_recipe(parser, argv)
    from trl_sft.recipe import processes

    machine = processes.parse_machine(options.on)
    seconds = time.perf_counter() - began
    if options.fast:
        for note in run.notes:
            console.say(note)
        console.say(f"No problems found in the recipe ({seconds:.2f} s); tokenizer and rows were not loaded.")
        console.say(f"Next: {arguments.format_next_command(run, 'check')}")
        return errors.EXIT_DONE
    with console.quiet():
        from trl_sft.cli import check
        from trl_sft.training.memory import probe

        report = check.check(run, machine, seconds)
        code = check.show(report, run, machine)
        if options.probe and report.inputs and report.memory and not report.here:
            console.print_lines(probe.measure(run, report.inputs, report.memory))
        return code


def _preview(argv: list[str]) -> int:
    parser = arguments.create_parser(
        "preview RECIPE [section.key=value ...] [--rows N] [--html FILE]",
        "Show the first rows of each source as the model sees them: tokens with loss in colour, cut ends marked.",
        example="preview recipe.yaml --rows 5",
    )
    parser.add_argument("--rows", metavar="N", type=int, default=3, help="rows of each source; 3 by default")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write an HTML page instead")
    run, options = arguments.parse_recipe(parser, argv)
    if options.rows < 1:
        raise errors.RecipeError(errors.Fault("--rows", f"{options.rows} is below 1", "Ask for at least 1 row."))
    with console.quiet():
        from trl_sft.cli import preview

        shown = preview.make(run, options.rows)
    if options.html is None:
        for line in shown.lines(sys.stdout.isatty() and "NO_COLOR" not in os.environ):
            console.say(line)
        return errors.EXIT_DONE
    arguments.write_output("--html", options.html, shown.page(run.recipe.path.name))
    console.say(f"wrote {options.html}. Next: open it in a browser.")
    return errors.EXIT_DONE


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "check": _check,
    "explain": explain.main,
    "import": import_settings.main,
    "init": init.main,
    "prepare": prepare.main,
    "preview": _preview,
    "schema": schema.main,
}
