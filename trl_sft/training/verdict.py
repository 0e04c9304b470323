"""The verdict on a finished run: better, little changed, overfitted, broken, or that it cannot be told.

In: eval losses, train losses, counts of answers, the step that is saved. Out: a `Verdict` with its numbers and what to
try. Pure: no model, no file. Deliberately absent: findings during the run (`diagnosis`). The reasons for the thresholds
are in docs/explanation/verdict-and-findings.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trl_sft import console
from trl_sft.evaluation.answer_counts import AnswerCounts, BrokenAnswers
from trl_sft.evaluation.sample_size import LEAST_ROWS

BETTER, LITTLE_CHANGED, OVERFITTED, BROKEN, UNKNOWN = "better", "little_changed", "overfitted", "broken", "unknown"
EVAL_LOSS = "eval_loss"  # as the Trainer logs it
_SMALL_CHANGE = 0.02  # of the eval loss, relative: another seed changes it about as much
_LARGE_CHANGE = 0.05  # Prechelt's generalisation loss, alpha = 5%
_LEAST_RISE = 0.02  # in nats per token: 5% of a loss near 0 is nothing
_EQUAL_ANSWERS = 0.9  # share of answers equal to the base model's with which nobody sees a difference
_LITTLE_CHANGE = 0.1  # of the eval loss, where the answers are equal
_BROKEN_ANSWERS = 0.5  # share of answers that nobody can use
_SIGNIFICANT = 0.05  # of McNemar's exact test
_LAST_LOSSES = 3  # logged train losses that are averaged, since each is of one or a few batches


@dataclass(frozen=True)
class Evidence:
    """What a verdict rests on.

    Attributes:
        eval_losses: (step, eval loss) of each evaluation during training, in order; step 0 = before training.
        train_losses: (step, train loss) of each log entry, in order.
        final_loss: eval loss of the weights that are saved; None = no rows were held out.
        saved_step: the step whose weights are saved.
        steps: optimizer steps of the run.
        answers: counts of the answers before and after; None = nothing was generated.
        peak_rate: the highest learning rate.
        stopped_early: whether `run.early_stopping` ended the run.
        stopping_metric: the metric by which it did.
        eval_rows: number of held-out rows; None = not counted.

    """

    eval_losses: tuple[tuple[int, float], ...]
    train_losses: tuple[tuple[int, float], ...]
    final_loss: float | None
    saved_step: int
    steps: int
    answers: AnswerCounts | None = None
    peak_rate: float | None = None
    stopped_early: bool = False
    stopping_metric: str = EVAL_LOSS
    eval_rows: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What came out of a run."""

    code: str  # one of the five words
    text: str  # one or two sentences with the numbers
    advice: str  # what to try, with the key to change; "" = nothing
    numbers: dict[str, Any]  # of the text, by name

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as run.json has it."""
        return asdict(self)

    @property
    def headline(self) -> str:
        """The verdict in a few words."""
        names = {UNKNOWN: "cannot be told", OVERFITTED: f"overfitted since step {self.numbers.get('best_step')}"}
        few = (
            f" on {console.format_number_of(self.numbers['eval_rows'], 'held-out row')}"
            if "eval_rows" in self.numbers
            else ""
        )
        return f"Verdict: {names.get(self.code, self.code.replace('_', ' '))}{few}"

    def list_lines(self) -> list[str]:
        """Return the verdict as the last screen has it: the headline, then the rest in lines of 80 characters."""
        parts = [self.text] + ([f"What to try: {self.advice}"] if self.advice else [])
        return [self.headline, *(line for part in parts for line in console.wrap(part, indent="  "))]


def judge(evidence: Evidence) -> Verdict:
    """Return the verdict on a run.

    The first that applies: unknown without a loss before and after; little changed with answers of the base model;
    broken answers; overfitted; an eval loss above that of the base model; little changed; better. With fewer than
    `LEAST_ROWS` held-out rows the verdict says so, and also where all answers are one text.
    """
    result = _judge_cases(evidence)
    if evidence.final_loss is None:
        return result
    texts, numbers = [result.text], dict(result.numbers)
    if evidence.answers is not None and evidence.answers.is_one_text:
        texts.append("All answers are the same text.")
        numbers["one_text"] = True
    if evidence.eval_rows is not None and evidence.eval_rows < LEAST_ROWS:
        rows = "1 row was" if evidence.eval_rows == 1 else f"{evidence.eval_rows} rows were"
        texts.append(f"Only {rows} held out: too few to tell a change of the answers from chance.")
        numbers |= {"eval_rows": evidence.eval_rows, "least_rows": LEAST_ROWS}
    return replace(result, text=" ".join(texts), numbers=numbers)


def _judge_cases(evidence: Evidence) -> Verdict:
    """Return the verdict of the first case that applies."""
    first = evidence.eval_losses[0] if evidence.eval_losses else None
    if evidence.final_loss is None:
        text = "No rows were held out, so nothing was compared with the base model."
        advice = "Set data.eval_fraction: 0.05 (or data.eval: FILE) and run again."
        return Verdict(UNKNOWN, text, advice, {})
    if first is None or first[0] != 0:
        numbers = {"eval_loss_after": evidence.final_loss}
        text = f"The eval loss is {evidence.final_loss:.4g} at the end; that of the base model was not measured."
        return _judge_answers(evidence, numbers) or Verdict(
            UNKNOWN, text, "Set train.eval_on_start: true and run again.", numbers
        )
    best_step, best_loss = min(evidence.eval_losses, key=lambda pair: pair[1])
    numbers = {"eval_loss_before": first[1], "eval_loss_after": evidence.final_loss}
    numbers |= {"best_step": best_step, "best_eval_loss": best_loss}
    numbers |= {"saved_step": evidence.saved_step, "steps": evidence.steps}
    if evidence.saved_step != evidence.steps:
        numbers["eval_loss_of_last_step"] = evidence.eval_losses[-1][1]
    return (
        _judge_equal_answers(evidence, numbers)
        or _judge_answers(evidence, numbers)
        or _judge_overfitting(evidence, numbers)
        or _judge_loss(evidence, numbers)
    )


def is_risen(loss: float, reference: float) -> bool:
    """Tell whether an eval loss is above another one by more than noise: 5%, and 0.02 nats."""
    return loss > reference * (1 + _LARGE_CHANGE) and loss - reference > _LEAST_RISE


def compute_mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: how likely so unequal a change is by chance alone.

    Args:
        gained: prompts that only the second model answers rightly.
        lost: prompts that only the first model answers rightly.

    """
    changed = gained + lost
    outcomes = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * outcomes / (1 << changed))


def _judge_equal_answers(evidence: Evidence, numbers: dict[str, Any]) -> Verdict | None:
    """Return `little_changed` where the tuned model answers as the base model does, and the loss is about the same."""
    answers = evidence.answers
    if answers is None or answers.equal < _EQUAL_ANSWERS * answers.prompts:
        return None
    change = _change(numbers)
    if abs(change) >= _LITTLE_CHANGE:
        return None
    numbers |= {"answers": answers.prompts, "equal_answers": answers.equal}
    counts = f"{answers.equal} of {answers.prompts} answers equal" if answers.prompts > 1 else "The only answer equals"
    text = f"{counts} the base model's; {_describe_loss(numbers)}."
    return Verdict(LITTLE_CHANGED, text, _advise_more(evidence), numbers)


def _judge_answers(evidence: Evidence, numbers: dict[str, Any]) -> Verdict | None:
    """Return `broken` where half of the tuned model's answers are empty, loop or do not end."""
    answers = evidence.answers
    if answers is None or answers.after.broken < _BROKEN_ANSWERS * answers.prompts:
        return None
    numbers |= {"answers": answers.prompts, "broken_answers": asdict(answers.after)}
    numbers |= {"broken_answers_of_base": asdict(answers.before)}
    parts = list(_describe_broken(answers.after, answers.prompts))
    base = ", ".join(_describe_broken(answers.before, answers.prompts)) or "none of them"
    loss = f"; {_describe_loss(numbers)}" if "eval_loss_before" in numbers else ""
    text = f"Of {console.format_number_of(answers.prompts, 'answer')} {', '.join(parts)} (base model: {base}){loss}."
    mostly_endless = answers.after.endless > max(answers.after.empty, answers.after.repeating)
    if mostly_endless:
        advice = "Look with `preview` whether the end-of-turn token carries loss. If it does, train longer"
        advice += f" (train.num_train_epochs), or raise train.learning_rate{_now(evidence)}."
    else:
        advice = f"Lower train.learning_rate{_now(evidence)} to a tenth and run again."
    return Verdict(BROKEN, text, advice, numbers)


def _judge_overfitting(evidence: Evidence, numbers: dict[str, Any]) -> Verdict | None:
    """Return `overfitted` where the saved weights are worse than earlier ones, while the train loss fell."""
    after_best = [loss for step, loss in evidence.eval_losses if step > numbers["best_step"]]
    is_confirmed = len(after_best) > 1 and is_risen(after_best[-2], numbers["best_eval_loss"])
    if not is_risen(numbers["eval_loss_after"], numbers["best_eval_loss"]):
        return None
    if numbers["best_step"] and not is_confirmed:  # one evaluation may be noise
        return None
    train = compare_train_losses(evidence.train_losses, numbers["best_step"])
    if train is None or train[1] >= train[0]:
        return None
    numbers |= {"train_loss_at_best": train[0], "train_loss_after": train[1]}
    start = f"{numbers['eval_loss_before']:.4g} -> " if numbers["best_step"] else ""
    text = f"Eval loss {start}{numbers['best_eval_loss']:.4g} at step {numbers['best_step']} -> "
    text += f"{numbers['eval_loss_after']:.4g} at the end, while the train loss fell {train[0]:.4g} -> {train[1]:.4g}."
    if numbers["best_step"]:
        advice = "Set run.early_stopping: true, which saves the weights of the best evaluation and stops, or stop near"
        advice += f" step {numbers['best_step']} (train.max_steps), or add rows."
    else:
        advice = f"Lower train.learning_rate{_now(evidence)}, train for fewer steps, or add rows."
    return Verdict(OVERFITTED, text, advice, numbers)


def _judge_loss(evidence: Evidence, numbers: dict[str, Any]) -> Verdict:
    """Return the verdict by the eval loss, and by the right answers where the loss is about the same."""
    change, answers = _change(numbers), evidence.answers
    text = _capitalize(_describe_loss(numbers))
    p = 1.0
    if answers is not None:
        numbers |= {"answers": answers.prompts, "right_before": answers.right_before}
        numbers |= {"right_after": answers.right_after}
        p = compute_mcnemar(answers.gained, answers.lost)
        if answers.right_before or answers.right_after:
            text += f"; right answers {answers.right_before} -> {answers.right_after} of {answers.prompts}"
    gains = p < _SIGNIFICANT and answers is not None and answers.gained > answers.lost
    loses = p < _SIGNIFICANT and answers is not None and answers.gained < answers.lost
    is_worse = is_risen(numbers["eval_loss_after"], numbers["eval_loss_before"])
    if is_worse or (loses and change > -_SMALL_CHANGE):
        text = f"Worse than the base model: {text[0].lower()}{text[1:]}."
        return Verdict(BROKEN, text, f"Lower train.learning_rate{_now(evidence)} to a tenth and run again.", numbers)
    if abs(change) < _SMALL_CHANGE and not (gains or loses):
        return Verdict(LITTLE_CHANGED, f"{text}.", _advise_more(evidence), numbers)
    if loses:
        advice = "Read samples.jsonl: compare the answers before and after."
        return Verdict(UNKNOWN, f"The two measures disagree: {text[0].lower()}{text[1:]}.", advice, numbers)
    if change > 0 and not gains:
        return Verdict(LITTLE_CHANGED, f"{text}.", f"Lower train.learning_rate{_now(evidence)}.", numbers)
    return Verdict(BETTER, f"{text}.", _advise_longer(evidence, numbers), numbers)


def compare_train_losses(losses: Sequence[tuple[int, float]], step: int) -> tuple[float, float] | None:
    """Return the train loss around a step and at the end, each a mean of three log entries; None without entries.

    Args:
        losses: (step, train loss) of each log entry.
        step: the entries up to it are those around it; where there are none, the first entry.

    """
    if not losses:
        return None
    until = [loss for entry_step, loss in losses if entry_step <= step][-_LAST_LOSSES:] or [losses[0][1]]
    last = [loss for _, loss in losses[-_LAST_LOSSES:]]
    return sum(until) / len(until), sum(last) / len(last)


def _change(numbers: dict[str, Any]) -> float:
    """Return the relative change of the eval loss: -0.1 = a tenth lower."""
    before, after = float(numbers["eval_loss_before"]), float(numbers["eval_loss_after"])
    return (after - before) / before if before else 0.0


def _describe_loss(numbers: dict[str, Any]) -> str:
    """Return the eval loss before and after, with the step that is saved where it is not the last."""
    change = _change(numbers)
    word = "lower" if change < 0 else "higher"
    text = f"eval loss {numbers['eval_loss_before']:.4g} -> {numbers['eval_loss_after']:.4g} ({abs(change):.1%} {word})"
    if "eval_loss_of_last_step" in numbers:
        text += f" with the weights of step {numbers['saved_step']} of {numbers['steps']}"
        if is_risen(numbers["eval_loss_of_last_step"], numbers["eval_loss_after"]):
            text += f", which are saved (the last step: {numbers['eval_loss_of_last_step']:.4g})"
        else:
            text += ", which are saved"
    elif is_risen(numbers["eval_loss_after"], numbers["best_eval_loss"]) and numbers["best_step"]:
        text += f"; it was {numbers['best_eval_loss']:.4g} at step {numbers['best_step']}"
    return text


def _describe_broken(counts: BrokenAnswers, prompts: int) -> Iterator[str]:
    """Yield a phrase for each reason."""
    for number, phrase in (
        (counts.empty, "empty"),
        (counts.repeating, "repeating"),
        (counts.endless, "without an end"),
    ):
        if number:
            yield f"{'all' if number == prompts > 1 else number} {'are' if number != 1 else 'is'} {phrase}"


def _advise_more(evidence: Evidence) -> str:
    """Return what to try where training changed little."""
    longer = "run.early_stopping.patience" if evidence.stopped_early else "train.num_train_epochs"
    return f"Raise train.learning_rate{_now(evidence)}, or train longer ({longer})."


def _advise_longer(evidence: Evidence, numbers: dict[str, Any]) -> str:
    """Return what to try where the eval loss still fell at the end; "" where it did not."""
    losses = evidence.eval_losses
    still_falls = len(losses) > 2 and losses[-1][1] < losses[-2][1] * (1 - _SMALL_CHANGE)
    if not still_falls or numbers["best_step"] != losses[-1][0]:
        return ""
    if evidence.stopped_early and evidence.stopping_metric != EVAL_LOSS:
        return ""  # answers no longer improved, whatever the loss did
    if evidence.stopped_early:
        return "The eval loss still fell at the end: lower run.early_stopping.threshold."
    return "The eval loss still fell at the end: train longer (train.num_train_epochs)."


def _now(evidence: Evidence) -> str:
    """Return the learning rate of the run in brackets; "" where it is unknown."""
    return f" ({evidence.peak_rate:.3g} now)" if evidence.peak_rate else ""


def _capitalize(text: str) -> str:
    """Return a text with a large first letter; the others stay."""
    return text[:1].upper() + text[1:]
