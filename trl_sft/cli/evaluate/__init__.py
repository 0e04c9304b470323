"""`evaluate`: base and tuned model answer the same prompts, rules score them, and the count says what that proves.

Inputs: a run folder or a recipe, and options. Outputs: `answers.jsonl`, `evaluation.jsonl` and `eval.json` in the run
folder, a chapter of `report.html`, lines on the terminal, and the exit code. Not here: prompts (`prompts`), answers
(`sides`), scores and statistics (`trl_sft.evaluation`).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from trl_sft import console, errors, json_output, run_folder, user_paths
from trl_sft.cli import arguments, option_numbers, resumable

_EPILOG = """\
checks: exact, normalised, numeric, contains, regex:PATTERN, json, json_equal, json_schema:FILE, code, instructions,
  chrf, bleu, refusal, no_refusal, FILE.py:FUNCTION. Without --check a row's own `check` counts, else what fits the
  reference answers.
Answers are kept in answers.jsonl: the same command again generates only what is missing."""
_RECIPE_SUFFIXES = (".yaml", ".yml")


def main(argv: Sequence[str]) -> int:
    """Evaluate a run; return the exit code."""
    options = parse(argv)
    from trl_sft.evaluation import eval_packages

    eval_packages.require_packages("evaluate", *eval_packages.STATISTICS)
    folder = _find_folder(options)
    output = options.output or folder
    user_paths.check("--output", output, user_paths.FOLDER, is_output=True)
    console.say("loading   torch, transformers and trl")
    from trl_sft import garbage_collection, upstream_warnings

    with upstream_warnings.quiet():
        with garbage_collection.paused():
            from trl_sft.cli.evaluate import evaluation
        with resumable.explain_endings(output):
            json_output.add_values(output=output, **evaluation.run(folder, output, options))
    return errors.EXIT_DONE


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = arguments.create_parser(
        "evaluate RUN_OR_RECIPE [--data FILE] [--check CHECK] [--at STEPS] [--endpoint URL --model NAME]",
        "Let base and tuned model answer the same prompts, score the answers by rules, and say what the count proves. "
        "RUN_OR_RECIPE is a run folder, or the recipe of a run that is finished.",
        example="evaluate runs/first --check numeric",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("run", metavar="RUN_OR_RECIPE", type=Path, help="a run folder, an adapter or a model; or a recipe")
    add("--data", metavar="FILE", type=Path, help="a JSONL file of prompts; the held-out rows of the run by default")
    add("--max-rows", metavar="N", type=int, help="the most rows; as many held-out rows as the run answered by default")
    add("--check", metavar="[TASK=]CHECK", action="append", default=[], help="a check; the first one decides")
    add("--at", metavar="STEPS", default="", help="checkpoints: 100 or 100,200,300; the last one is the tuned model")
    add("--tuned", metavar="PATH", type=Path, help="the tuned model: a folder, such as a merged one, or a GGUF file")
    add("--endpoint", metavar="URL", help="a server with OpenAI's protocol answers as the tuned model")
    add("--model", metavar="NAME", help="the name of the model at --endpoint")
    add(
        "--against", metavar="DIR", type=Path, help="compare with the model in this folder, and not with the base model"
    )
    add("--few-shot", metavar="N", type=int, default=3, help="examples in the base model's own prompt; 0 = none")
    add("--max-new-tokens", metavar="N", type=int, help="the most tokens of an answer of every side")
    add("--temperature", metavar="T", type=float, help="sample with this temperature; 0 is greedy")
    add("--seed", metavar="N", type=int, help="of sampled answers; that of the run by default")
    add("--batch-size", metavar="N", type=int, default=8, help="prompts that are answered at once")
    add("--suite", action="store_true", help="also ask 104 general, unsafe and harmless prompts, and measure losses")
    add(
        "--tasks",
        metavar="NAMES",
        default="",
        help="also run tasks of lm-eval: names or YAML files, with commas between",
    )
    add("--allow-missing-tasks", action="store_true", help="evaluate though a task that was trained has no row here")
    add("--run-code", action="store_true", help="let the check `code` run what the models write, under limits")
    add("-o", "--output", metavar="DIR", type=Path, help="where the files go; the run folder by default")
    add("--trust-remote-code", action="store_true", help="let Python code run that the model brings with it")
    options = parser.parse_args(argv)
    options.steps = _read_steps(options.at)
    options.tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    _check_options(options)
    return options


def _check_options(options: argparse.Namespace) -> None:
    """Refuse numbers out of range, and options that exclude each other. Raises RecipeError."""
    numbers = {
        "--max-rows": (options.max_rows, 1),
        "--few-shot": (options.few_shot, 0),
        "--max-new-tokens": (options.max_new_tokens, 1),
        "--temperature": (options.temperature, 0),
        "--seed": (options.seed, 0),
        "--batch-size": (options.batch_size, 1),
    }
    faults = option_numbers.list_faults(numbers)
    if (options.endpoint is None) != (options.model is None):
        missing = "--model NAME" if options.model is None else "--endpoint URL"
        problem = "a server and the name of a model there belong together"
        faults.append(errors.Fault("--endpoint", problem, f"Add {missing}.", code="run.bad_option"))
    if options.endpoint is not None and not re.match(r"https?://[^/\s]+", options.endpoint):
        problem = f"{options.endpoint} is no address of a server"
        fix = "Write it with http:// or https://, and up to /v1: http://127.0.0.1:8000/v1."
        faults.append(errors.Fault("--endpoint", problem, fix, code="run.bad_option"))
    chosen = [name for name in ("--tuned", "--endpoint", "--at") if getattr(options, name[2:])]
    if len(chosen) > 1:
        problem = f"{' and '.join(chosen)} each name the tuned model"
        faults.append(errors.Fault(chosen[0], problem, "Keep one of them.", code="run.bad_option"))
    if faults:
        raise errors.RecipeError(faults)


def _read_steps(text: str) -> list[int]:
    """Return the steps of `--at`, in order. Raises RecipeError."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(re.fullmatch(r"[1-9]\d{0,11}", part) for part in parts):
        fix = "Write steps as 100 or 100,200,300."
        raise errors.RecipeError(errors.Fault("--at", f"{text!r} has no steps", fix, code="run.bad_option"))
    return sorted({int(part) for part in parts})


def _find_folder(options: argparse.Namespace) -> Path:
    """Return the run folder: the argument itself, or that of a recipe, whose checks count. Raises RecipeError."""
    path: Path = options.run
    if path.suffix.lower() not in _RECIPE_SUFFIXES or path.is_dir():
        if path.is_file():
            problem = "this is a file, and no recipe"
            fix = "Name the folder of a run, or a recipe (.yaml)."
            raise errors.RecipeError(errors.Fault(str(path), problem, fix, code="evaluation.no_run"))
        options.check = options.check or _read_checks(path)
        return path
    from trl_sft import load_recipe
    from trl_sft.recipe import answer_checks

    run = load_recipe(path)
    options.check = options.check or answer_checks.list_values((run.evaluate or {}).get("checks", []))
    folder = run.output_dir
    if not (folder / run_folder.RUN).is_file():
        problem = f"the recipe has no run in {run_folder.shorten_path(folder)}"
        fix = f"Run `{console.get_python_command()} -m trl_sft {path}` first."
        raise errors.RecipeError(errors.Fault(str(path), problem, fix, code="evaluation.no_run"))
    json_output.add_values(run=folder)
    return folder


def _read_checks(folder: Path) -> list[str]:
    """Return `evaluate.checks` of the recipe of a run as `--check` takes them; [] = it names none."""
    import yaml

    from trl_sft.recipe import answer_checks, yaml_reader

    try:
        values = yaml_reader.parse_values((folder / run_folder.RESOLVED).read_text(encoding="utf-8"))
        return answer_checks.list_values(values["evaluate"]["checks"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # no run, or one without the key
        return []
