"""Writes a first recipe for a model and a file of rows: columns are recognised, every line has a comment.

Inputs: a model and a source, as a recipe names them. Outputs: a YAML file that was checked before it is written. Not
here: overwriting. A file that exists is refused.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from trl_sft import console, json_output, run_folder, upstream_warnings, user_paths
from trl_sft.cli.init import source_draft
from trl_sft.cli.init.schedule import Schedule, plan_schedule
from trl_sft.cli.init.source_draft import SourceDraft
from trl_sft.data import formats
from trl_sft.data.file_diagnosis import diagnose
from trl_sft.errors import EXIT_DONE, Fault, RecipeError
from trl_sft.evaluation.sample_size import LEAST_ROWS
from trl_sft.recipe import paths
from trl_sft.recipe.paths import Location
from trl_sft.recipe.yaml_reader import format_value

SCHEMA = "trl_sft.schema.json"  # the name that the documentation and the recipes use for the output of `schema -o`
_TEMPLATE = """\
{schema_line}# Train:  python -m trl_sft {command}
# Check:  python -m trl_sft check {command}
# Keys under `train:` are those of trl.SFTConfig, under `lora:` those of peft.LoraConfig.
model:
  name_or_path: {model}
{model_lines}data:
{reasons}  train: {entry}  # {rows}
{eval_fraction}train:
  output_dir: {output_dir}
  num_train_epochs: {epochs}  # {steps} in all
  learning_rate: 2e-4  # usual for LoRA; full fine-tuning needs about 2e-5
  lr_scheduler_type: cosine
  warmup_steps: 0.03  # below 1: a share of all steps
  per_device_train_batch_size: 4
  gradient_accumulation_steps: {accumulation}  # an effective batch size of {batch} rows
  max_length: 1024  # tokens; longer rows are truncated
  logging_steps: {logging_steps}{share}
{evaluation}  save_steps: {eval_steps}
  save_total_limit: 2
"""
_TOKENIZER = "tokenizer: {chat_template: chatml}  # the tokenizer of this model has no chat template\n"
_LORA = "lora: {r: 16, lora_alpha: 32, target_modules: all-linear}  # remove this line to train all weights\n"
_EVALUATION = """\
  eval_strategy: steps
  eval_steps: {eval_steps}
  eval_on_start: true  # the eval loss before training, for comparison
"""


def write(model: str, path: str, output: Path) -> int:
    """Write a recipe, and say what to type next.

    Args:
        model: A folder, a hub id, or `trl_sft:tiny`.
        path: A file of rows, a folder, or a hub id; like `model` relative to the current folder.
        output: The recipe; nothing may stand there.

    Returns:
        The exit code.

    Raises:
        UserError: `output` exists, or the model or the rows cannot be read.

    """
    user_paths.check("--output", output, user_paths.FILE, is_output=True)
    if output.exists():
        problem = "this file exists already; it is left unchanged"
        raise RecipeError(Fault(str(output), problem, "Name another file: -o ANOTHER.yaml", code="run.file_exists"))
    if not output.parent.is_dir():
        problem = f"the folder {output.parent} does not exist"
        raise RecipeError(
            Fault(
                str(output), problem, "Create the folder, or name a file in another one.", code="run.unwritable_output"
            )
        )
    with upstream_warnings.quiet():
        draft, run, (row_format, columns, num_rows) = source_draft.draft_source(output, model, path)
    entry, reasons = _format_source(output, draft, row_format)
    schedule = plan_schedule(num_rows)
    command = shlex.quote(str(output))
    text = _TEMPLATE.format(
        # paths of a recipe are relative to its own folder
        model=format_value(paths.relative_to_file(output, model)),
        reasons=reasons,
        entry=entry,
        output_dir=format_value(f"runs/{output.stem}"),
        command=command,
        schema_line=_format_schema_line(output.parent),
        model_lines=_format_model_lines(run.model_location, row_format),
        rows=f"{console.format_rows(num_rows)} with {console.format_names(columns)}",
        eval_fraction=_format_fraction(schedule),
        epochs=schedule.epochs,
        steps=console.format_number_of(schedule.steps, "step"),
        accumulation=schedule.accumulation,
        batch=schedule.batch,
        logging_steps=schedule.logging_steps,
        share="  # also a share of all steps, like the next ones" if schedule.is_short else "",
        eval_steps=schedule.eval_steps,
        evaluation=_EVALUATION.format(eval_steps=schedule.eval_steps) if schedule.eval_rows else "",
    )
    run_folder.write_text(output, text)
    json_output.add_values(output=output, recipe=text, format=row_format, columns=list(columns), rows=num_rows)
    console.say(f"wrote {output}: {console.format_rows(num_rows)} of format {row_format}")
    for (key, value), reason in zip(draft.keys.items(), draft.reasons, strict=False):
        console.say(f"set `{key}: {diagnose.write_value(value)}`, because {reason}")
    if schedule.eval_rows < LEAST_ROWS:
        console.say(_describe_few_rows(schedule))
    console.say(f"Next: {console.get_python_command()} -m trl_sft check {command}")
    return EXIT_DONE


def _format_fraction(schedule: Schedule) -> str:
    """Return the line on the evaluation set; "" where no row can be held out."""
    if not schedule.eval_rows:
        return ""
    rows = console.format_rows(schedule.eval_rows)
    return f"  eval_fraction: {schedule.eval_fraction}  # the evaluation set: {rows}, not trained on\n"


def _describe_few_rows(schedule: Schedule) -> str:
    """Return what training on so few rows can show."""
    number = (
        f"{schedule.eval_rows} of them {'is' if schedule.eval_rows == 1 else 'are'}"
        if schedule.eval_rows
        else "none is"
    )
    return (
        f"Few rows: {number} held out for evaluation. Fewer than {LEAST_ROWS} cannot show whether the answers became "
        "better. Add rows, or name a file of other rows with `data.eval`."
    )


def _format_schema_line(folder: Path) -> str:
    """Return the line by which an editor finds the JSON Schema, where one lies beside the recipe; else ""."""
    return f"# yaml-language-server: $schema={SCHEMA}\n" if (folder / SCHEMA).is_file() else ""


def _format_source(output: Path, draft: SourceDraft, row_format: str) -> tuple[str, str]:
    """Return the entry of the source, and the comments above it: why each of its keys is set."""
    entry = {"path": paths.relative_to_file(output, draft.path), **draft.keys, "format": row_format}
    lines = [" ".join(reason.split()) for reason in draft.reasons]
    return diagnose.write_value(entry), "".join(f"  # {line}\n" for line in lines)


def _format_model_lines(model: Location, row_format: str) -> str:
    """Return the lines on the chat template and on LoRA: none for an adapter, which has both of its own."""
    folder = model.files[0] if model.files else None
    if folder is None:  # on the hub
        return _LORA
    if paths.is_adapter(folder):
        return ""
    needs_template = not formats.FORMATS[row_format].wording and not _has_chat_template(folder)
    return (_TOKENIZER if needs_template else "") + _LORA


def _has_chat_template(folder: Path) -> bool:
    """Tell whether the tokenizer in a folder has a chat template."""
    config = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file():
        return True
    return config.is_file() and "chat_template" in config.read_text("utf-8")
