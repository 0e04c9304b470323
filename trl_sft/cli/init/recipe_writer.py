"""Writes a first recipe for a model and a file of rows: columns recognised, every line commented.

In: a model and a source as a recipe names them. Out: a YAML file that was checked before it was
written. Nothing existing is overwritten.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from trl_sft import console, run_folder, upstream_warnings
from trl_sft.data import formats, pipeline
from trl_sft.errors import EXIT_DONE, Fault, RecipeError
from trl_sft.recipe import build, paths
from trl_sft.recipe.paths import Location
from trl_sft.recipe.yaml_reader import Key, Recipe, format_value

SCHEMA = "trl_sft.schema.json"  # how README and recipes call what `schema -o` writes
_TEXT = """\
{schema}# Train:  python -m trl_sft {command}
# Check:  python -m trl_sft check {command}
# Keys under `train:` are those of trl.SFTConfig, under `lora:` those of peft.LoraConfig.
model:
  name_or_path: {model}
{how}data:
  train: {{path: {path}{format}}}  # {about}
{eval}train:
  output_dir: {output_dir}
  num_train_epochs: 1
  learning_rate: 2e-4  # LoRA's usual size; full fine-tuning wants about 2e-5
  lr_scheduler_type: cosine
  warmup_steps: 0.03  # below 1: a share of all steps
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 4  # 16 rows a step in all
  max_length: 1024  # tokens; longer rows are cut
  logging_steps: 10
{evaluate}  save_steps: 100
  save_total_limit: 2
"""
_LORA = "lora: {r: 16, lora_alpha: 32, target_modules: all-linear}  # take this line out to train all weights\n"
_EVALUATE = """\
  eval_strategy: steps
  eval_steps: 100
  eval_on_start: true  # the value from before training, to compare with
"""


def write(model: str, path: str, output: Path) -> int:
    """Write a recipe for `model` and the rows at `path`; return the exit code. Raises UserError."""
    if output.exists():
        raise RecipeError(Fault(str(output), "exists already; it stays as it is", "-o ANOTHER.yaml"))
    if not output.parent.is_dir():
        raise RecipeError(Fault(str(output), f"the folder {output.parent} does not exist", "-o FILE in one that does"))
    # As on the command line, both are relative to the current folder; the recipe stands in its own.
    values = {
        "model": format_value(paths.relative_to_file(output, model)),
        "path": format_value(paths.relative_to_file(output, path)),
        "output_dir": format_value(f"runs/{output.stem}"),
        "command": shlex.quote(str(output)),
        "schema": _schema(output.parent),
        "how": "",
        "format": "",
        "about": "",
    }
    draft = _draft(output, model, path)
    with upstream_warnings.quiet():
        run = build.build_run(draft)
        layout, columns, rows = pipeline.inspect_source(draft, run.sources["train"][0])
    values["how"] = _how(run.model_location, layout)
    values["format"] = f", format: {layout}"
    # at least one row has to be held out
    fraction = max(0.05, math.ceil(100 / rows) / 100) if rows > 1 else 0
    values["eval"] = f"  eval_fraction: {fraction}  # held out, to tell whether it worked\n" if fraction else ""
    values["about"] = f"{rows:,} rows with {', '.join(columns)}"
    values["evaluate"] = _EVALUATE if fraction else ""
    run_folder.write_text(output, _TEXT.format(**values))
    console.say(f"wrote {output}: {rows:,} rows of format {layout}")
    console.say(f"Next: {console.get_python_command()} -m trl_sft check {values['command']}")
    return EXIT_DONE


def _schema(folder: Path) -> str:
    """Return the line by which an editor finds the JSON Schema, where one lies beside the recipe."""
    return f"# yaml-language-server: $schema={SCHEMA}\n" if (folder / SCHEMA).is_file() else ""


def _draft(output: Path, model: str, path: str) -> Recipe:
    """Return the recipe that is looked at before anything is written."""
    given: dict[Key, str] = {("model", "name_or_path"): "MODEL", ("data", "train"): "DATA"}
    typed = {"model": {"name_or_path": model}, "data": {"train": path}}
    return Recipe(output.absolute(), "", typed, {(): "init", **given}, frozenset(given), ())


def _how(base: Location, layout: str) -> str:
    """Return the lines on template and LoRA; an adapter brings its own, a base model on this machine may have none."""
    folder = base.files[0] if base.files else None
    if folder and paths.is_adapter(folder):
        return ""
    named = [folder / "chat_template.jinja", folder / "tokenizer_config.json"] if folder else []
    has = not folder or named[0].is_file() or (named[1].is_file() and "chat_template" in named[1].read_text("utf-8"))
    chat = not formats.FORMATS[layout].wording
    line = "tokenizer: {chat_template: chatml}  # this model's tokenizer has none\n" if chat and not has else ""
    return line + _LORA
