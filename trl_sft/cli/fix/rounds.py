"""Rounds of a check and of the edits that its faults carry, until no edit is left.

Inputs: a recipe and overrides. Outputs: the corrected text in a file, a unified diff and the faults that are left, on
the terminal. Not here: what an edit does to a text (`recipe.editor`), and which edits a fault carries.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trl_sft import console, json_output, run_folder
from trl_sft.errors import EXIT_DONE, EXIT_USER_ERROR, Edit, Fault, RecipeError, UserError
from trl_sft.recipe import build, editor, recipe_file, yaml_reader
from trl_sft.recipe.checked import Run

_MAX_ROUNDS = 20  # a fix can uncover another fault; recipes need two or three rounds


@dataclass
class RecipeDraft:
    """A text on the way to a correct recipe."""

    text: str
    edits: list[Edit] = field(default_factory=list)  # those that were made
    faults: list[Fault] = field(default_factory=list)  # those of the text


def fix(recipe: Path, overrides: Sequence[str], *, output: Path, fast: bool) -> int:
    """Correct a recipe, and write and show the result.

    Args:
        recipe: The file.
        overrides: Values that replace those of the file for the checks; they are not written.
        output: Where the corrected recipe goes; it is written only if something was corrected.
        fast: Check the recipe alone, without tokenizer and rows.

    Returns:
        The exit code: 2 if faults are left.

    Raises:
        RecipeError: The file cannot be read, or `output` cannot be written.

    """
    original = recipe_file.read_text(recipe)
    draft = correct(original, recipe, overrides, output=output, fast=fast)
    name = output if draft.edits else recipe
    command = f"{console.get_python_command()} -m trl_sft check {shlex.join([str(name), *overrides])}"
    diff = "".join(
        difflib.unified_diff(
            yaml_reader.mask_secrets(original).splitlines(keepends=True),
            yaml_reader.mask_secrets(draft.text).splitlines(keepends=True),
            str(recipe),
            str(output),
        )
    )
    edits = [json_output.describe_edit(edit) for edit in draft.edits]
    json_output.add_values(output=output if edits else None, edits=edits, diff=diff, next=command)
    if edits:
        try:
            run_folder.write_text(output, draft.text, keeps_secrets=True)
        except OSError as error:
            problem = f"the file cannot be written: {error}"
            fix_ = "Name a file that can be written: -o FILE"
            raise RecipeError(Fault(str(output), problem, fix_, code="run.unwritable_output")) from None
        console.say(diff)
        console.say(f"wrote {output}: {len(edits)} {'change' if len(edits) == 1 else 'changes'}")
    if draft.faults:
        if not edits:
            console.say("No change of the recipe is certain, so nothing was written.")
        console.print_faults(draft.faults)
        return EXIT_USER_ERROR
    checked = "The tokenizer and the rows were not loaded." if fast else "Tokenizer and rows were checked too."
    console.say(f"No problems {'are left' if edits else 'found'} in {name}. {checked}")
    console.say(f"Next: {command}")
    return EXIT_DONE


def correct(text: str, recipe: Path, overrides: Sequence[str] = (), *, output: Path, fast: bool) -> RecipeDraft:
    """Return a text after all edits that its faults carry, and the faults that are left.

    Args:
        text: The recipe.
        recipe: Its file, to which paths are relative.
        overrides: Values that replace those of the text for the checks.
        output: The corrected file, in the same folder; the faults that are left name its lines.
        fast: Check the recipe alone.

    """
    draft = RecipeDraft(text)
    for _ in range(_MAX_ROUNDS):
        name = output if draft.edits else recipe
        draft.faults = find_faults(draft.text, name, overrides, fast=fast)
        if not _make_edits(draft):
            break
    return draft


def find_faults(text: str, recipe: Path, overrides: Sequence[str], *, fast: bool) -> list[Fault]:
    """Return the faults of a text: those of the recipe, or else those that a check with tokenizer and rows finds."""
    try:
        run = build.load_run(recipe, overrides, text=text)
    except UserError as error:
        return error.faults
    return [] if fast else _check(run)


def _check(run: Run) -> list[Fault]:
    """Return the faults that `check` finds; what only this machine refuses is none of the recipe."""
    from trl_sft import garbage_collection, upstream_warnings
    from trl_sft.recipe import processes

    with upstream_warnings.quiet(), contextlib.redirect_stdout(io.StringIO()):
        with garbage_collection.paused():
            from trl_sft.cli.check import report  # inside the block, since packages warn while they are imported

        return report.check(run, processes.parse_machine("here"), 0.0).faults


def _make_edits(draft: RecipeDraft) -> bool:
    """Make the edits of all faults whose place is in the file; tell whether any could be made."""
    made = False
    for fault in draft.faults:
        if str(fault.where).startswith("("):  # an override: its value is not in the file
            continue
        text, edits = draft.text, []
        for edit in fault.edits:
            changed = editor.apply(text, edit)
            if changed is None or changed == text:
                break
            text = changed
            edits.append(edit)
        else:
            draft.text = text
            draft.edits += edits
            made = made or bool(edits)
    return made
