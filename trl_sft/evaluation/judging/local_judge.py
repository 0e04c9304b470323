"""A judge on this machine: the probabilities of the labels (A, B, C or 1 to 5) as the first token of its reply.

Inputs: the folder of a model, and questions. Outputs: judgements in their order. No text is generated, so no reply can
be invalid. Questions are scored one at a time, so that a result does not depend on the others; each is in the log, and
is scored once. Not here: endpoints (`endpoint_judge`).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_sft import console
from trl_sft.errors import EXIT_OUT_OF_MEMORY, DataError, Fault, RunStopped, first_line
from trl_sft.evaluation import answer_cache
from trl_sft.evaluation.call_log import CallLog, ModelAnswer
from trl_sft.evaluation.judging.judge_questions import JudgeQuestion
from trl_sft.evaluation.judging.judge_replies import MISSING, Judgement
from trl_sft.model import positions

_TOO_LONG = "too_long"  # `finish` of a question that has no room in the model


@dataclass
class LocalJudge:
    """Scores labels with a model on this machine.

    Attributes:
        path: the folder of the model.
        digest: of its files.
        log: where every prompt and its probabilities are kept.
        trusts_code: whether Python code that the model brings may run.
        counts: questions that were scored, that the log had, and that are longer than the model was trained for.

    """

    path: Path
    digest: str
    log: CallLog
    trusts_code: bool = False
    counts: dict[str, int] = field(default_factory=lambda: {"made": 0, "saved": 0, "beyond_positions": 0})
    _model: PreTrainedModel | None = None
    _tokenizer: PreTrainedTokenizerBase | None = None

    def count_missing(self, questions: Sequence[JudgeQuestion]) -> int:
        """Return how many questions have to be scored."""
        return len({key for question in questions if (key := self._compute_key(question)) not in self.log.answers})

    def ask(self, questions: Sequence[JudgeQuestion], *, label: str) -> list[Judgement]:
        """Return the judgement on each question, in their order. Raises DataError, RunStopped.

        Args:
            questions: of any kind.
            label: what the progress bar says.

        """
        missing = {
            key: question for question in questions if (key := self._compute_key(question)) not in self.log.answers
        }
        self.counts["saved"] += len(questions) - len(missing)
        for key, question in tqdm(missing.items(), desc=label, unit="question", disable=not console.shows_progress()):
            prompt, answer = self._score(question)
            facts = {"name": question.name, "model": str(self.path), "messages": [{"role": "user", "content": prompt}]}
            self.log.add_answer(key, facts, answer)
            self.counts["made"] += 1
        return [self._read(question) for question in questions]

    def _read(self, question: JudgeQuestion) -> Judgement:
        """Return the judgement on a question that was scored."""
        answer = self.log.answers[self._compute_key(question)]
        if answer.finish == _TOO_LONG:
            return Judgement(MISSING, (), "", "the question is longer than the positions of the judge")
        weights = tuple(json.loads(answer.text)[label] for label in question.labels)
        return Judgement(question.options[weights.index(max(weights))], weights, "", "")

    def _compute_key(self, question: JudgeQuestion) -> str:
        """Return the key of a question."""
        prompt = [question.describe_label_reply(), question.content]
        return answer_cache.compute_key(self.digest, prompt, {"labels": list(question.labels)})

    def _score(self, question: JudgeQuestion) -> tuple[str, ModelAnswer]:
        """Return the prompt of a question, and the probabilities of its labels as JSON."""
        model, tokenizer = self._load()
        prompt, label_ids = self._build_prompt(question), _find_label_ids(tokenizer, question.labels, where=self.path)
        input_ids = torch.tensor([tokenizer(prompt, add_special_tokens=tokenizer.chat_template is None)["input_ids"]])
        limit = positions.read_limit(model.config)
        if limit is not None and input_ids.shape[1] > limit:
            if positions.find_table(model, limit) is not None:
                return prompt, ModelAnswer("{}", _TOO_LONG, "", input_ids.shape[1], 0)
            self.counts["beyond_positions"] += 1
        keywords: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:  # the logits of a long prompt are large
            keywords["logits_to_keep"] = 1
        try:
            with torch.no_grad():
                logits = model(input_ids=input_ids.to(model.device), **keywords).logits[0, -1].float()
        except torch.OutOfMemoryError:
            message = "out of memory while the judge scored a question; the results so far are kept\n"
            message += "Use a smaller judge, or one behind an endpoint."
            raise RunStopped(message, EXIT_OUT_OF_MEMORY, code="run.out_of_memory") from None
        scores = torch.stack([torch.logsumexp(logits[ids], 0) for ids in label_ids])
        if not torch.isfinite(scores).all():
            problem = "the judge computes scores that are not finite: its weights are damaged"
            raise DataError(Fault(str(self.path), problem, "Name another judge.", code="judge.no_model"))
        weights = [round(weight, 9) for weight in torch.softmax(scores, 0).tolist()]
        text = json.dumps(dict(zip(question.labels, weights, strict=True)))
        return prompt, ModelAnswer(text, "scored", "", input_ids.shape[1], 0)

    def _build_prompt(self, question: JudgeQuestion) -> str:
        """Return the text that the model continues with a label."""
        tokenizer = self._load()[1]
        text = f"{question.describe_label_reply()}\n\n{question.content}"
        if tokenizer.chat_template is None:
            return f"{text}\n\nReply:"
        messages = [{"role": "user", "content": text}]  # one message, since not every template has a system role
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        )

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return model and tokenizer; they are loaded once. Raises DataError."""
        if self._model is None or self._tokenizer is None:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trusts_code)
                model = AutoModelForCausalLM.from_pretrained(
                    self.path, dtype="auto", trust_remote_code=self.trusts_code
                )
            except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
                problem = f"the judge cannot be loaded: {first_line(error)}"
                fix = "Name the folder of a whole model with its tokenizer, as `save_pretrained` writes it."
                raise DataError(Fault(str(self.path), problem, fix, code="judge.no_model")) from None
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            self._model = model.to(accelerator or "cpu").eval()
        return self._model, self._tokenizer


def _find_label_ids(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], *, where: Path) -> list[list[int]]:
    """Return the tokens of each label, with and without a space before it. Raises DataError."""
    found: dict[str, set[int]] = {}
    for label in labels:
        forms = [tokenizer.encode(text, add_special_tokens=False) for text in (label, f" {label}")]
        found[label] = {form[0] for form in forms if len(form) == 1}
    ids = [sorted(found[label]) for label in labels]
    if not all(ids) or len({token for tokens in ids for token in tokens}) < sum(map(len, ids)):
        problem = f"the tokenizer of the judge has no token of its own for each of {', '.join(labels)}"
        fix = "Name another judge, or serve this one behind an endpoint."
        raise DataError(Fault(str(where), problem, fix, code="judge.no_labels"))
    return ids
