"""argv to calls; a fault of the user's becomes one message and an exit code.

In: words. Out: an exit code. Heavy packages are imported only by the command that needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trl_sft import __version__, errors

if TYPE_CHECKING:
    from trl_sft.recipe.checked import Run

_ABOUT = "Fine-tune a language model: one YAML recipe becomes a run of TRL's SFTTrainer."
_COMMANDS = """\
commands (a first word that is none of them is a recipe):
  python -m trl_sft RECIPE [section.key=value ...]         train
  python -m trl_sft check RECIPE [--on any|8x80GiB] [--fast] [--probe]   all that needs no weights, memory too
  python -m trl_sft preview RECIPE [--rows N] [--html FILE]   rows as the model sees them, what is trained in colour
  python -m trl_sft prepare RECIPE [section.key=value ...] make the tokens ahead of time
  python -m trl_sft explain KEY [RECIPE]                   what a key is and takes; its value in a recipe
  python -m trl_sft explain RECIPE [section.key=value ...] the whole run, each value with who set it
  python -m trl_sft schema [-o FILE]                       the JSON Schema of a recipe, for editors
  python -m trl_sft init MODEL DATA [-o RECIPE]            write a recipe for a model and a file of rows
  python -m trl_sft import TOOL FILE [-o RECIPE]           make a recipe of another trainer's settings

An override is checked as strictly as the file: train.max_steps=10, lora='{r: 8}', lora=null
`python -m trl_sft COMMAND --help` tells more of a command.

exit codes: 0 done, 1 a fault of ours, 2 something to mend in what was given, 3 the training failed (a
  loss that is not finite), 4 out of memory, 75 the time limit, 130 / 138 / 143 stopped by SIGINT /
  SIGUSR1 / SIGTERM, with a checkpoint from which the same command goes on"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # one of the closed list of departures
    # Upstream's bars: only where somebody watches, and only for what takes longer than a second.
    os.environ.setdefault("TQDM_DELAY" if sys.stderr.isatty() else "TQDM_DISABLE", "1")
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, _interrupt)
    try:
        return _COMMAND.get(words[0] if words else "", _train)(words)
    except errors.UserError as error:
        from trl_sft import console

        console.faults(error.faults)
        return error.exit_code
    except errors.RunStopped as error:
        print(f"trl_sft: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("trl_sft: stopped before training began; no checkpoint was written", file=sys.stderr)
        return errors.EXIT_SIGNAL + signal.SIGINT


def _interrupt(_number: int, _frame: object) -> None:
    raise errors.Interrupted


def _parser(usage: str, about: str, epilog: str = "") -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="python -m trl_sft",
        usage=f"python -m trl_sft {usage}",
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _read(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[Run, argparse.Namespace]:
    """Return the checked recipe that the words name, and all that was given."""
    from trl_sft import load_recipe

    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="a value in place of the file's")
    given = parser.parse_intermixed_args(words)
    return load_recipe(given.recipe, given.overrides), given


def _train(words: list[str]) -> int:
    parser = _parser("RECIPE [section.key=value ...]", _ABOUT, _COMMANDS)
    parser.add_argument("--version", action="version", version=f"trl_sft {__version__}")
    if not words:
        parser.print_help()
        return errors.EXIT_DONE
    _refuse_misspelt(words[0])
    run = _read(parser, words)[0]
    from trl_sft import train

    print(f"trl_sft {__version__}   {run.recipe.path.name} -> {run.output_dir}", flush=True)
    train(run)
    return errors.EXIT_DONE


def _refuse_misspelt(word: str) -> None:
    """Refuse a first word that is no file, and nearly a command. Raises RecipeError."""
    from trl_sft.suggestions import STRICT, nearest_name

    near = nearest_name(word, _COMMAND, cutoff=STRICT) if word.isalpha() else ""
    if near and not Path(word).exists():
        raise errors.RecipeError(errors.Fault(word, "no command, and no file of that name", near))


def _check(words: list[str]) -> int:
    about = "Find every fault that can be found without weights: recipe, folder, tokenizer, template, rows, settings."
    parser = _parser("check RECIPE [section.key=value ...] [--on MACHINE] [--fast] [--probe]", about)
    machine = "here (the default), any, or cards and their memory, 8x80GiB: what this one lacks is then no fault"
    parser.add_argument("--on", metavar="MACHINE", default="here", help=machine)
    parser.add_argument("--fast", action="store_true", help="read the recipe alone; tokenizer and rows are not loaded")
    parser.add_argument(
        "--probe", action="store_true", help="then measure the memory of two steps on the largest batch"
    )
    began = time.perf_counter()
    run, given = _read(parser, words[1:])
    from trl_sft.recipe import processes

    for_ = processes.parse_machine(given.on)
    seconds = time.perf_counter() - began
    from trl_sft import console
    from trl_sft.recipe import resolved

    if given.fast:
        for note in run.notes:
            print(note)
        told = f"Nothing to mend in what the recipe says ({seconds:.2f} s)."
        words_again = resolved.remove_secrets(run, shlex.join(run.recipe.arguments))
        print(f"{told} Next: {console.python()} -m trl_sft check {words_again}")
        return errors.EXIT_DONE
    with console.quiet():
        from trl_sft.cli import check
        from trl_sft.training import summary
        from trl_sft.training.memory import probe

        report = check.check(run, for_, seconds)
        code = check.show(report, run, for_)
        if given.probe and report.ready and report.memory and not report.here:
            summary.lines(probe.measure(run, report.ready, report.memory))
        return code


def _prepare(words: list[str]) -> int:
    about = "Make the tokens of a run ahead of time: the next run with these rows and settings reads them."
    run = _read(_parser("prepare RECIPE [section.key=value ...]", about), words[1:])[0]
    from trl_sft import console
    from trl_sft.recipe import resolved

    with console.quiet():
        from trl_sft.training import run as training_run

        training_run.prepare(run)
    words_again = resolved.remove_secrets(run, shlex.join(run.recipe.arguments))
    print(f"Prepared. Next: {console.python()} -m trl_sft {words_again}")
    return errors.EXIT_DONE


def _preview(words: list[str]) -> int:
    about = "Show the first rows of each source as the model sees them: trained tokens in colour, cut ends marked."
    parser = _parser("preview RECIPE [section.key=value ...] [--rows N] [--html FILE]", about)
    parser.add_argument("--rows", metavar="N", type=int, default=3, help="rows of each source, 3 unless given")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page of HTML in place of the terminal")
    run, given = _read(parser, words[1:])
    from trl_sft import console, run_folder

    if given.rows < 1:
        raise errors.RecipeError(errors.Fault("--rows", str(given.rows), "at least 1"))
    with console.quiet():
        from trl_sft.cli import preview

        shown = preview.make(run, given.rows)
    if given.html is None:
        for line in shown.lines(sys.stdout.isatty() and "NO_COLOR" not in os.environ):
            print(line)
    else:
        try:
            run_folder.write_text(given.html, shown.page(run.recipe.path.name))
        except OSError as error:
            raise errors.RecipeError(errors.Fault("--html", str(error), "a file that can be written")) from None
        print(f"{given.html}: open it in a browser")
    return errors.EXIT_DONE


def _explain(words: list[str]) -> int:
    about = "Say what a key is, takes and does (`train.packing`, or `packing`), or who set each value of a recipe."
    parser = _parser("explain KEY [RECIPE] [section.key=value ...] | explain RECIPE [section.key=value ...]", about)
    parser.add_argument("what", metavar="KEY | RECIPE", help="a key, a section, or a YAML file")
    parser.add_argument("rest", metavar="RECIPE, section.key=value", nargs="*", help="a recipe, values in its place")
    given = parser.parse_intermixed_args(words[1:])
    from trl_sft import load_recipe
    from trl_sft.cli import explain

    if explain.is_recipe(given.what):
        lines = explain.whole(load_recipe(given.what, given.rest))
    else:
        lines = explain.key(given.what, given.rest)
    print("\n".join(lines))
    return errors.EXIT_DONE


def _schema(words: list[str]) -> int:
    about = "Write the JSON Schema of a recipe for the installed versions: an editor completes keys and marks faults."
    parser = _parser("schema [-o FILE]", about)
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="a file; the terminal unless given")
    given = parser.parse_args(words[1:])
    from trl_sft import run_folder
    from trl_sft.cli import schema

    text = json.dumps(schema.make(), indent=1, ensure_ascii=False) + "\n"
    if given.output is None:
        print(text, end="")
        return errors.EXIT_DONE
    try:
        run_folder.write_text(given.output, text)
    except OSError as error:
        raise errors.RecipeError(errors.Fault("-o", str(error), "a file that can be written")) from None
    print(f"wrote {given.output}. On top of a recipe beside it: # yaml-language-server: $schema={given.output.name}")
    return errors.EXIT_DONE


def _init(words: list[str]) -> int:
    about = "Write a commented recipe for a model and a file of rows; their columns are recognised."
    parser = _parser("init MODEL DATA [-o RECIPE]", about)
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or trl_sft:tiny")
    parser.add_argument("data", metavar="DATA", help="a JSON, JSONL, CSV, Parquet or text file, a folder, or a hub id")
    parser.add_argument("-o", "--output", metavar="RECIPE", type=Path, default=Path("recipe.yaml"), help="recipe.yaml")
    given = parser.parse_args(words[1:])
    from trl_sft.cli import init

    return init.write(given.model, given.data, given.output)


def _import(words: list[str]) -> int:
    about = "Make a recipe of another trainer's settings. What is no line of the recipe stands at its end, with why."
    usage = "import openrlhf [-o RECIPE] -- FLAGS... | import TOOL FILE [-o RECIPE]"
    parser = _parser(usage, about, "tools: openrlhf, trl, alignment-handbook, axolotl, llamafactory")
    parser.add_argument("tool", metavar="TOOL", help="whose settings they are")
    parser.add_argument("words", metavar="FILE", nargs="*", help="its file of settings, or after -- its flags")
    parser.add_argument("-o", "--output", metavar="RECIPE", type=Path, help="write it there; printed unless given")
    parser.add_argument("--dataset-info", metavar="FILE", type=Path, help="llamafactory: its dataset_info.json")
    split = words.index("--") if "--" in words else len(words)
    given = parser.parse_intermixed_args(words[1:split])
    from trl_sft.importers import writer

    if given.tool not in writer.TOOLS:
        raise errors.RecipeError(errors.Fault("import", given.tool, f"one of {', '.join(writer.TOOLS)}"))
    settings = writer.read(given.tool, [*given.words, *words[split + 1 :]], given.dataset_info)
    return writer.write(given.tool, settings, given.output)


_COMMAND: dict[str, Callable[[list[str]], int]] = {
    **{
        "check": _check,
        "explain": _explain,
        "import": _import,
        "init": _init,
        "prepare": _prepare,
        "preview": _preview,
        "schema": _schema,
    },
}
