"""Rows of the set become further rows, after the split: each child is in the part of its parent.

Inputs: the rows of one part, a caller of the generator, the screening. Outputs: children that passed the checks. A
paraphrase and another format keep the parent's answer or what it says, and the numbers and names of both are compared;
an easier, a harder or another setting of the instruction gets a new answer. Not here: templates (`templates`), and the
split (`splitting`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trl_sft.building import generation, kept_facts, plan, set_gates, spec_keys, templates, written_requests
from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.generation import Caller
from trl_sft.building.screening import Screening
from trl_sft.building.spec import Spec
from trl_sft.building.templates import AugmentationTemplate
from trl_sft.evaluation.call_log import ModelAnswer
from trl_sft.evaluation.model_calls import ModelRequest

GATE = "augmentation"  # the name of the check of a child against its parent
_SINGLE_TURN = 2  # messages: a question and an answer
_NUMBERS_ALONE = ("format",)  # of which the answer is rewritten, so that names may stand in other words


class PlannedChild(NamedTuple):
    """A row that is to be made from another one."""

    parent: CandidateRow
    template: AugmentationTemplate
    number: int  # of the child among those of its parent, from 0


class ChildDraft(NamedTuple):
    """A child with what is written of it so far."""

    planned: PlannedChild
    instruction: str = ""
    answer: str = ""
    was_cut: bool = False
    problem: str = ""


def plan_children(
    rows: Sequence[CandidateRow], spec: Spec, available: Mapping[str, AugmentationTemplate]
) -> list[PlannedChild]:
    """Return the children that are to be made from the rows of one part.

    Each method comes about equally often. Rows of several turns, and rows with a known answer under methods that
    change the problem, have no children by these methods.

    Args:
        rows: of one part.
        spec: the checked spec, which has a section `augmentation`.
        available: the templates by their names.

    """
    methods = spec.get(spec_keys.AUGMENTATION, "methods")
    most = int((spec.get(spec_keys.AUGMENTATION, "multiple") - 1) * len(rows) + 1e-9)
    parents = [row for row in rows if len(row.messages) == _SINGLE_TURN]
    random.Random(plan.derive_seed(spec.seed, "augmentation")).shuffle(parents)
    used: Counter[str] = Counter()
    children: list[PlannedChild] = []
    for number in range(min(spec.get(spec_keys.AUGMENTATION, "max_children"), len(methods))):
        for index, parent in enumerate(parents):
            if len(children) >= most:
                return children
            method = methods[(index + number) % len(methods)]
            used[method] += 1
            children.append(PlannedChild(parent, available[method], number))
    return children


def make_children(
    planned: Sequence[PlannedChild], spec: Spec, caller: Caller, *, screening: Screening
) -> list[CandidateRow]:
    """Return the children that pass the checks, in their order; the others are among the rejected rows."""
    children: list[CandidateRow] = []
    instructions: set[str] = set()  # of children: a paraphrase of one parent may be that of another
    size = 8 * spec.get(spec_keys.GENERATOR, "concurrent")
    for start in range(0, len(planned), size):
        drafts = [ChildDraft(child) for child in planned[start : start + size]]
        drafts = _write_instructions(drafts, spec, caller)
        drafts = _write_answers(drafts, spec, caller)
        candidates = []
        for draft in drafts:
            if draft.problem and caller.stop:
                continue  # not made for want of budget: no verdict on the row
            row = _build_child(draft, spec)
            rejection = check_child(draft)
            text = _normalise(draft.instruction)
            if rejection is None and text in instructions:
                rejection = Rejection(GATE, f"{draft.planned.template.name}: another row has this instruction")
            instructions.add(text)
            if rejection is None:
                candidates.append(row)
            else:
                screening.reject(row, rejection)
        # a paraphrase is similar to its parent by its nature, so the gates that compare rows do not see children
        children += screening.screen(candidates, without=set_gates.COMPARING)
        if caller.stop:
            break
    return children


def check_child(draft: ChildDraft) -> Rejection | None:
    """Return why a child is none: nothing was written, it equals its parent, or it changed a number or a name."""
    parent, template = draft.planned.parent, draft.planned.template
    if draft.problem:
        return Rejection(GATE, f"{template.name}: {draft.problem}")
    if not draft.instruction.strip() or not draft.answer.strip():
        return Rejection(GATE, f"{template.name}: the text is empty")
    if _normalise(draft.instruction) == _normalise(parent.instruction):
        return Rejection(GATE, f"{template.name}: the instruction is that of its parent")
    if template.answer != "parent" and _normalise(draft.answer) == _normalise(parent.answer):
        return Rejection(GATE, f"{template.name}: the answer is that of its parent")
    if template.keeps_facts:
        is_answer = template.answer == "rewrite"
        before, after = (parent.answer, draft.answer) if is_answer else (parent.instruction, draft.instruction)
        if changes := kept_facts.find_changes(before, after, names=template.name not in _NUMBERS_ALONE):
            return Rejection(GATE, f"{template.name}: {changes[0]}")
    return None


def build_requests(child: PlannedChild, spec: Spec, *, instruction: str = "") -> list[ModelRequest]:
    """Return the request for the next text of a child: its instruction, or with an instruction its answer.

    Returns:
        One request; none where no call is needed.

    """
    template, parent = child.template, child.parent
    step = 1 if instruction else 0
    values = {**parent.cell, "instruction": instruction or parent.instruction, "answer": parent.answer}
    if not instruction:
        messages = [{"role": "user", "content": templates.fill(template.write, values)}] if template.write else []
    elif template.answer == "rewrite":
        messages = [{"role": "user", "content": templates.fill(template.rewrite, values)}]
    elif template.answer == "new":
        messages = [{"role": "system", "content": template.system.strip()}, {"role": "user", "content": instruction}]
    else:
        messages = []
    if not messages:
        return []
    model = spec.sections[spec_keys.GENERATOR]
    decoding = generation.choose_decoding(model, spec.seed, parent.id, template.name, child.number, step)
    return [ModelRequest(f"child {parent.id} {template.name} step {step}", messages, decoding)]


def _write_instructions(drafts: Sequence[ChildDraft], spec: Spec, caller: Caller) -> list[ChildDraft]:
    """Return drafts with their instructions."""
    requests = [build_requests(draft.planned, spec) for draft in drafts]
    answers = iter(caller.call([request for part in requests for request in part], label="children"))
    written = []
    for draft, request in zip(drafts, requests, strict=True):
        if request:
            written.append(_add_text(draft, next(answers), "instruction"))
            continue
        child = draft.planned
        chance = random.Random(plan.derive_seed(spec.seed, child.parent.id, "append", child.number))
        addition = chance.choice(child.template.append)
        written.append(draft._replace(instruction=f"{child.parent.instruction}\n\n{addition}"))
    return written


def _write_answers(drafts: Sequence[ChildDraft], spec: Spec, caller: Caller) -> list[ChildDraft]:
    """Return drafts with their answers."""
    requests = [
        build_requests(draft.planned, spec, instruction=draft.instruction)
        if draft.instruction.strip() and not draft.problem
        else []
        for draft in drafts
    ]
    answers = iter(caller.call([request for part in requests for request in part], label="children"))
    written = []
    for draft, request in zip(drafts, requests, strict=True):
        if request:
            written.append(_add_text(draft, next(answers), "answer"))
        elif draft.instruction.strip() and not draft.problem:
            written.append(draft._replace(answer=draft.planned.parent.answer))
        else:
            written.append(draft)
    return written


def _add_text(draft: ChildDraft, answer: ModelAnswer | None, part: str) -> ChildDraft:
    """Return a draft with the text that a call brought."""
    if answer is None:
        return draft._replace(problem="no answer came")
    if answer.refusal:
        return draft._replace(problem=f"the generator refused: {answer.refusal}")
    text, was_cut = generation.clean_text(answer.text), draft.was_cut or generation.is_cut(answer)
    problem = ""
    if part == "instruction":
        text = written_requests.clean_request(text)
        cut = "the generator reached its limit of tokens in the instruction"
        problem = cut if was_cut else _find_request_problem(text, draft.planned)
    fields: dict[str, Any] = {part: text, "was_cut": was_cut, "problem": problem}
    return draft._replace(**fields)


def _find_request_problem(text: str, child: PlannedChild) -> str:
    """Return why the instruction of a child is not worth an answer; "" = nothing is known against it."""
    language = child.parent.language
    family = str(child.parent.provenance.get("template", "")).partition("/")[0]
    return written_requests.find_problem(text, prompt=child.template.write, family=family, language=language)


def _build_child(draft: ChildDraft, spec: Spec) -> CandidateRow:
    """Return the child with its provenance; its cell is that of the parent, and says if the difficulty changed."""
    parent, template, number = draft.planned
    messages = ({"role": "user", "content": draft.instruction}, {"role": "assistant", "content": draft.answer})
    provenance = {
        "template": f"augmentation/{template.name}",
        "template_sha256": template.digest,
        "generator": spec.get(spec_keys.GENERATOR, "model"),
        "seed": plan.derive_seed(spec.seed, parent.id, template.name, number, 0),
        "topic": parent.provenance.get("topic", ""),
        "seed_row": parent.provenance.get("seed_row", ""),
        "attempt": 0,
    }
    changes_difficulty = template.name in ("easier", "harder")
    cell = dict(parent.cell)
    if changes_difficulty and "difficulty" in cell:
        cell["difficulty"] = f"{cell['difficulty']} ({template.name})"
    return CandidateRow(
        id=f"{parent.id}-{template.name}",
        messages=messages,
        language=parent.language,
        cell=cell,
        provenance=provenance,
        was_cut=draft.was_cut,
        key=parent.key if template.answer != "new" else "",
        parent=parent.id,
    )


def _normalise(text: str) -> str:
    """Return a text in which case and spaces do not count."""
    return " ".join(text.lower().split())
