"""Carries out an audit: reads the rows, lets them pass the gates, shows the tables and writes the files.

Inputs: the parsed arguments. Outputs: what `--json` has, lines on the terminal, files. Not here: what is a fault.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_sft import console
from trl_sft.building.audit import cleaned_set, row_audit
from trl_sft.building.audit.audit_source import AuditSource
from trl_sft.building.audit.row_audit import AuditOptions, RowFinding, SetAudit, TokenCounter
from trl_sft.cli import arguments
from trl_sft.cli.audit import screen
from trl_sft.cli.init import source_draft
from trl_sft.data.formats import TokenizerFeatures
from trl_sft.errors import Fault, RecipeError
from trl_sft.evaluation import eval_packages
from trl_sft.recipe.checked import Run, Source
from trl_sft.tokenization import chat_template

# Rows are formatted for a chat template with every feature: nothing is refused for want of one.
_ALL_FEATURES = TokenizerFeatures(chat_template.NAMES, "")
_JSON_FINDINGS = 20  # of each gate, in the answer of --json
_PAGE_FINDINGS = 200  # of each gate, on the page
_PAGE_CHARACTERS = 4000  # of a turn on the page


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Audit the rows that the arguments name; return what `--json` answers. Raises UserError."""
    find_names = _make_name_finder(options.names) if options.names else None
    run, sources, references = _find_sources(options)
    _refuse_inputs(options, [source for part in run.sources.values() for source in part])
    source = AuditSource(run, sources, _ALL_FEATURES)
    count_tokens = _make_counter(run) if options.is_recipe or options.model else None
    max_tokens = options.max_tokens
    if max_tokens is None and options.is_recipe:
        max_tokens = run.train.get("max_length")
    audit_options = AuditOptions(
        language=options.language,
        evaluation_prompts=references,
        count_tokens=count_tokens,
        max_tokens=max_tokens if isinstance(max_tokens, int) else None,
        noted=options.keep,
        find_names=find_names,
    )
    result = row_audit.audit(source, audit_options)
    content = describe(source, result, options.data)
    screen.print_audit(content, source.notes)
    if options.output:
        from trl_sft.reports import audit_page

        arguments.write_output("--output", options.output, audit_page.format_page(content | _list_rows(source, result)))
        console.say(f"wrote     {options.output}: open it in a browser; each row opens on a click")
    if options.fix:
        kept, removed = cleaned_set.write(source, result, options.fix)
        rejected = cleaned_set.name_rejected(options.fix)
        console.say(f"wrote     {options.fix}: {console.format_rows(kept)}")
        console.say(f"          {rejected}: {console.format_rows(removed)}, each with its reason")
        content |= {"fixed": str(options.fix), "rejected": str(rejected)}
    console.say(f"Next: {screen.choose_next(content, options)}")
    return content | {"output": options.output}


def _refuse_inputs(options: argparse.Namespace, sources: Sequence[Source]) -> None:
    """Refuse outputs that would replace what is read, stand in a folder that is read, or replace each other.

    Raises:
        RecipeError: with the option.

    """
    inputs = [
        Path(options.data),
        *map(Path, options.against),
        *(file for one in sources for file in one.location.files),
    ]
    cleaned_set.refuse_inputs(inputs, fix=options.fix, page=options.output)


def _make_name_finder(model: str) -> Callable[[str], list[str]]:
    """Return the function that finds names of people. Raises RecipeError where the model is not there."""
    from trl_sft.building.gates import names

    eval_packages.require_packages("--names", *names.PACKAGES, extra="trl-sft[pii]")
    problem = f"spaCy has no model {model}"
    if names.has_model(model):
        try:
            return names.make_finder(model)
        except (OSError, ValueError) as error:
            problem = f"spaCy cannot read the model {model}: {str(error).splitlines()[0]}"
    fix = (
        f"Run `python -m spacy download {model}` in this Python environment, or name a folder with a pipeline of spaCy."
    )
    raise RecipeError(Fault("--names", problem, fix, code="run.bad_option"))


def describe(source: AuditSource, result: SetAudit, name: str) -> dict[str, Any]:
    """Return an audit as a mapping that JSON can write, with the first findings of each gate."""
    gates = []
    for gate in result.count_gates():
        found = result.removed if gate["removes"] else result.notes
        first = itertools.islice((finding for finding in found if finding.gate == gate["gate"]), _JSON_FINDINGS)
        gates.append(gate | {"findings": [_describe_finding(source, finding) for finding in first]})
    return {
        "data": name,
        "rows": result.rows,
        "clean": result.rows - len(result.removed),
        "removed": len(result.removed),
        "gates": gates,
        "statistics": result.statistics,
        "set_findings": [{"finding": finding, "fix": fix} for finding, fix in result.set_findings],
        "seconds": round(result.seconds, 3),
    }


def _describe_finding(source: AuditSource, finding: RowFinding) -> dict[str, Any]:
    """Return the place of a row and what was found."""
    place = source.locate_row(finding.number)
    return {"row": source.name_row(finding.number), **place, "reason": finding.reason}


def _list_rows(source: AuditSource, result: SetAudit) -> dict[str, Any]:
    """Return the rows of the page: the first of each gate, with their turns."""
    findings = []
    for gate in result.count_gates():
        found = result.removed if gate["removes"] else result.notes
        of_gate = (finding for finding in found if finding.gate == gate["gate"])
        for finding in itertools.islice(of_gate, _PAGE_FINDINGS):
            turns = [
                {"role": str(turn.get("role")), "content": _shorten(str(turn.get("content") or ""))}
                for turn in source.read_row(finding.number).messages
            ]
            findings.append({"gate": finding.gate, **_describe_finding(source, finding), "turns": turns})
    return {"findings": findings, "most_findings": _PAGE_FINDINGS}


def _shorten(text: str) -> str:
    """Return a text that is not too long for a page."""
    if len(text) <= _PAGE_CHARACTERS:
        return text
    return f"{text[:_PAGE_CHARACTERS]} ... ({len(text) - _PAGE_CHARACTERS:,} more characters)"


def _find_sources(options: argparse.Namespace) -> tuple[Run, list[Source], list[str]]:
    """Return the run, the sources of its rows, and the instructions of the evaluation sets. Raises UserError."""
    references: list[str] = []
    if options.is_recipe:
        from trl_sft import load_recipe

        run = load_recipe(options.data)
        if run.sources.get("eval"):
            references += _read_instructions(run, list(run.sources["eval"]))
    else:
        run = _draft(options.data, options.model or options.stand_in)
    for path in options.against:
        held_out = _draft(path, options.stand_in)
        references += _read_instructions(held_out, list(held_out.sources["train"]))
    return run, list(run.sources["train"]), references


def _draft(data: str, model: str) -> Run:
    """Return a checked run of rows alone, with the keys of the source that the file needs."""
    _, run, _ = source_draft.draft_source(Path("recipe.yaml"), model, data)
    return run


def _read_instructions(run: Run, sources: Sequence[Source]) -> list[str]:
    """Return the instructions of an evaluation set; the whole text of rows that have none."""
    rows = (row for batch in AuditSource(run, sources, _ALL_FEATURES).iterate() for row, _ in batch)
    return [text for row in rows if (text := row.instruction or row.answer)]


def _make_counter(run: Run) -> TokenCounter:
    """Return the function that counts the tokens of texts with the tokenizer of the run's model. Raises UserError."""
    console.say("loading   the tokenizer")
    from trl_sft.training import stages

    tokenizer = stages.load_tokenizer(run, stages.find_model(run)).tokenizer

    def count(texts: Sequence[str]) -> list[int]:
        return list(map(len, tokenizer(list(texts), add_special_tokens=False)["input_ids"]))

    return count
