"""The general suite of an evaluation: both sides answer its prompts, and losses of texts are measured.

Inputs: the sides, and the answers of the evaluation itself. Outputs: `suite.jsonl`, and what `eval.json` has under
`evaluation.suite`. Not here: the prompts (`evaluation.suite`), and what the answers tell (`evaluation.suite_result`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_sft import console, run_folder
from trl_sft.cli.evaluate.sides import Answerer, Side
from trl_sft.evaluation import suite, suite_result, text_loss
from trl_sft.evaluation.answer_pairs import BASE, TUNED
from trl_sft.evaluation.before_after import AFTER, BEFORE, read_last_message
from trl_sft.evaluation.checks.answer import CheckedAnswer
from trl_sft.evaluation.items import EvaluationItem
from trl_sft.evaluation.suite_result import SuiteAnswer
from trl_sft.evaluation.text_loss import TextLoss


def ask(
    answerer: Answerer,
    planned: Sequence[Side],
    asked: Sequence[EvaluationItem],
    *,
    records: Sequence[Mapping[str, Any]],
    main_prompts: Sequence[Sequence[int]],
    folder: Path,
) -> dict[str, Any]:
    """Return the result of the suite, and the perplexity of the evaluation's answers under the base model.

    Args:
        answerer: decodes the answers to the suite.
        planned: the sides base and tuned, with the prompts of the suite.
        asked: these prompts.
        records: of evaluation.jsonl.
        main_prompts: (rows, tokens): the base model's prompts of these records.
        folder: of the run, whose eval.json has the loss of its held-out rows.

    """
    texts: dict[str, list[str]] = {}
    losses: dict[str, list[TextLoss]] = {}
    perplexities: dict[str, float | None] = {}
    paragraphs = suite.read_texts()
    for side in planned:
        answers, counts = answerer.answer(side)
        texts[side.name] = [answer["text"] for answer in answers]
        console.say(f"suite     {side.name}: {counts.generated:,} generated, {counts.cached:,} from answers.jsonl")
        if side.source is None:  # a server tells no losses
            continue
        losses[side.name] = answerer.measure_losses(side, text_loss.encode_texts(answerer.tokenizer, paragraphs))
        if side.name == BASE:
            perplexities = _measure_perplexities(answerer, side, records, prompts=main_prompts)
    answerer.release()
    pairs = zip(asked, texts[BASE], texts[TUNED], strict=True)
    judged = [_judge(item, base, tuned) for item, base, tuned in pairs]
    lines = "".join(json.dumps(answer._asdict(), ensure_ascii=False) + "\n" for answer in judged)
    run_folder.write_text(answerer.path.with_name(run_folder.SUITE), lines)
    return suite_result.build(
        judged,
        losses if len(losses) == len(planned) else {},
        texts=paragraphs,
        task_losses=_read_held_out_losses(folder),
    ) | {"perplexity_under_base": perplexities}


def _judge(item: EvaluationItem, base: str, tuned: str) -> SuiteAnswer:
    """Return a prompt with both answers, and whether the check of its row calls them right."""
    scores = [
        item.checks[0].score(CheckedAnswer(text, item.reference, None, item.prompt, item.task))
        for text in (base, tuned)
    ]
    prompt = read_last_message(item.prompt)
    right = [score == 1 for score in scores]
    return SuiteAnswer(item.task, prompt, base, tuned, base_right=right[0], tuned_right=right[1], id=item.number)


def _measure_perplexities(
    answerer: Answerer,
    side: Side,
    records: Sequence[Mapping[str, Any]],
    *,
    prompts: Sequence[Sequence[int]],
) -> dict[str, float | None]:
    """Return the perplexity of each side's answers under the base model: how odd the base model finds them."""
    result: dict[str, float | None] = {}
    for name in (BASE, TUNED):
        texts = [record["answers"][name]["text"] for record in records]
        ids = [answerer.tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in texts]
        rows = list(zip(prompts, ids, strict=True))
        result[name] = text_loss.compute_perplexity(answerer.measure_losses(side, rows))
    return result


def _read_held_out_losses(folder: Path) -> dict[str, float | None]:
    """Return the loss of the run's held-out rows by side, as training measured it; None = it did not."""
    content = run_folder.read_json(folder / run_folder.EVAL)
    sides = {BASE: content.get(BEFORE), TUNED: content.get(AFTER)}
    return {name: part.get("loss") if isinstance(part, dict) else None for name, part in sides.items()}
