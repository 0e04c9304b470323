"""The files of a built set: rows that a recipe reads as they are, rejects, all counts, the card.

Inputs: a `BuiltSet` and the folder. Outputs: train and eval as JSONL or Parquet, rejects.jsonl, build.json, README.md,
recipe.yaml where the spec names a student. The same set gives the same bytes. A folder with other files, and rows that
were changed by hand, are not replaced. Not here: the text of the card (`data_card`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from trl_sft import __version__, file_digests, run_folder
from trl_sft.building import data_card, spec_keys
from trl_sft.building.candidates import CandidateRow
from trl_sft.building.instruction_set import BuiltSet
from trl_sft.building.spec import Spec
from trl_sft.building.splitting import EVAL, TRAIN
from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import paths
from trl_sft.recipe.yaml_reader import format_value

CALLS, BUILD, CARD, REJECTS, RECIPE, SPEC = (
    "calls.jsonl",
    "build.json",
    "README.md",
    "rejects.jsonl",
    "recipe.yaml",
    "spec.yaml",
)
_OWN_FILES = (CALLS, BUILD, CARD, REJECTS, RECIPE, SPEC, "train.jsonl", "eval.jsonl", "train.parquet", "eval.parquet")
_TOKENIZER = "tokenizer: {chat_template: chatml}  # the tokenizer of this model has no chat template\n"
_RECIPE_TEXT = """\
# Train:  python -m trl_sft {command}
# Check:  python -m trl_sft check {command}
model:
  name_or_path: {student}
{tokenizer}data:
  train: {train}
{evaluation}lora: {{r: 16, lora_alpha: 32, target_modules: all-linear}}  # remove this line to train all weights
train:
  output_dir: {output_dir}
  num_train_epochs: 3
  learning_rate: 2e-4  # usual for LoRA; full fine-tuning needs about 2e-5
  per_device_train_batch_size: 4
  max_length: {max_length}  # gates.max_tokens, and room for the template
{eval_strategy}"""


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a built set, or rows that were changed since.

    Raises:
        RecipeError: with the file that would be lost.

    """
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir() if not run_folder.is_left_over(path)}
    is_build = CALLS in names or BUILD in names
    where = run_folder.shorten_path(folder)
    if names and not is_build:
        fix = "Name another folder in `output.folder`, or empty this one."
        problem = f"the folder holds {min(names)}, and is no built set"
        raise RecipeError(Fault(where, problem, fix, code="build.folder_in_use"))
    for name, facts in run_folder.read_json(folder / BUILD).get("files", {}).items():
        path = folder / name
        if path.is_file() and file_digests.hash_file(path) != facts["sha256"]:
            fix = f"Move {name} to another folder, or remove it; then run the same command again."
            problem = f"{name} was changed since it was built, and the build would replace it"
            raise RecipeError(Fault(where, problem, fix, code="build.changed_file"))


def write_set(spec: Spec, built: BuiltSet, facts: Mapping[str, Any], *, with_scores: bool) -> dict[str, Any]:
    """Write all files; return what build.json says.

    Args:
        spec: The checked spec.
        built: The set.
        facts: What build.json says of calls and models.
        with_scores: Whether a judge scored the rows.

    """
    folder = spec.folder
    folder.mkdir(parents=True, exist_ok=True)
    suffix = spec.get(spec_keys.OUTPUT, "format")
    files = {}
    for part, rows in built.parts.items():
        for other in ("jsonl", "parquet"):
            (folder / f"{part}.{other}").unlink(missing_ok=True)
        if not rows:
            continue
        name = f"{part}.{suffix}"
        lines = [describe_row(row, with_scores=with_scores) for row in rows]
        _write_rows(folder / name, lines)
        files[name] = {"rows": len(rows), "sha256": file_digests.hash_file(folder / name)}
    rejected = [
        {"id": row.id, "gate": rejection.gate, "reason": rejection.reason, **_describe_origin(row)}
        for row, rejection in built.screening.rejected
    ]
    rejected += [
        {"id": row.id, "gate": "balance", "reason": reason, **_describe_origin(row)}
        for row, reason in built.balance.left_over
    ]
    run_folder.write_text(folder / REJECTS, _format_lines(rejected))
    run_folder.write_text(folder / SPEC, spec.recipe.text)
    content = describe_set(spec, built) | dict(facts) | {"files": files}
    if recipe := format_recipe(spec, content):
        run_folder.write_text(folder / RECIPE, recipe)
        content["recipe"] = RECIPE
    run_folder.write_text(folder / CARD, data_card.format_card(spec, content))
    run_folder.write_text(folder / BUILD, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return content


def describe_row(row: CandidateRow, *, with_scores: bool) -> dict[str, Any]:
    """Return a row as the files have it; every row has the same columns."""
    provenance = {name: row.provenance.get(name) for name in _PROVENANCE}
    provenance |= {"cell": dict(row.cell), "parent": row.parent}
    if with_scores:
        provenance |= {"score": row.score, "scores": dict(row.provenance.get("scores", {}))}
    columns = {"id": row.id, "messages": [dict(message) for message in row.messages]}
    if "task" in row.cell:
        columns["task"] = row.cell["task"]
    return columns | {"provenance": provenance}


_PROVENANCE = ("template", "template_sha256", "generator", "seed", "topic", "seed_row", "attempt")


def describe_set(spec: Spec, built: BuiltSet) -> dict[str, Any]:
    """Return all counts of a set."""
    plan = spec.sections[spec_keys.PLAN]
    return {
        "trl_sft": __version__,
        "partial": bool(built.stop),
        "stop": built.stop,
        "language": spec.language,
        "seed": spec.seed,
        "rows": {
            "planned": plan["rows"],
            "written": built.written,
            "taken": len(built.balance.rows),
            **{part: len(rows) for part, rows in built.parts.items()},
        },
        "gates": built.screening.describe(),
        "balance": {
            "before": built.balance.before.describe(),
            "after": built.balance.after.describe(),
            "final": built.final.describe(),
            "left_over": len(built.balance.left_over),
        },
        "shortfalls": [shortfall._asdict() for shortfall in built.balance.shortfalls],
        "augmentation": {"planned": built.planned_children, "made": built.children},
        "templates": _count_templates(built),
    }


def format_recipe(spec: Spec, content: Mapping[str, Any]) -> str:
    """Return a recipe that trains the student on the set; "" = the spec names no student, or there are no rows."""
    student = spec.get(spec_keys.PLAN, "student")
    suffix = spec.get(spec_keys.OUTPUT, "format")
    if not student or f"{TRAIN}.{suffix}" not in content["files"]:
        return ""
    has_eval = f"{EVAL}.{suffix}" in content["files"]
    path = run_folder.shorten_path(spec.folder / RECIPE)
    return _RECIPE_TEXT.format(
        command=path,
        student=format_value(paths.relative_to_file(spec.folder / RECIPE, student)),
        tokenizer="" if content.get("student_has_template", True) else _TOKENIZER,
        max_length=spec.get(spec_keys.GATES, "max_tokens") * 9 // 8,
        train=f"{TRAIN}.{suffix}",
        evaluation=f"  eval: {EVAL}.{suffix}\n" if has_eval else "",
        output_dir=f"runs/{spec.folder.name}",
        eval_strategy="  eval_strategy: epoch\n" if has_eval else "",
    )


def _describe_origin(row: CandidateRow) -> dict[str, Any]:
    """Return the texts and the origin of a rejected row."""
    provenance = {name: row.provenance.get(name) for name in _PROVENANCE} | {
        "cell": dict(row.cell),
        "parent": row.parent,
    }
    scores = {"scores": dict(row.provenance["scores"])} if "scores" in row.provenance else {}
    return {"messages": [dict(message) for message in row.messages], "provenance": provenance | scores}


def _count_templates(built: BuiltSet) -> list[dict[str, Any]]:
    """Return how many rows each template wrote."""
    counts: dict[tuple[str, str], int] = {}
    for rows in built.parts.values():
        for row in rows:
            key = str(row.provenance["template"]), str(row.provenance["template_sha256"])
            counts[key] = counts.get(key, 0) + 1
    return [{"template": name, "sha256": digest, "rows": count} for (name, digest), count in sorted(counts.items())]


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSONL or Parquet, as a whole or not at all."""
    if path.suffix == ".jsonl":
        run_folder.write_text(path, _format_lines(rows))
        return
    part = path.with_name(f".{path.name}.part")
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), buffer)
    part.write_bytes(buffer.getvalue())
    run_folder.flush(part)
    part.replace(path)


def _format_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as JSONL."""
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
