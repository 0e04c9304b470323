"""A judge behind an endpoint: each question is one call, and its reply a JSON object with its reasoning.

Inputs: questions. Outputs: judgements in their order. A reply that cannot be read is asked for once more, with what is
wrong with it. Not here: the calls (`model_calls`), and how a reply is read (`judge_replies`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trl_sft.evaluation.call_log import ModelAnswer
from trl_sft.evaluation.judging import judge_replies
from trl_sft.evaluation.judging.judge_questions import JudgeQuestion
from trl_sft.evaluation.judging.judge_replies import INVALID, MISSING, Judgement
from trl_sft.evaluation.model_calls import ModelCaller, ModelRequest

DECODING = {"temperature": 0.0, "max_tokens": 1024}
_TYPICAL_TOKENS = 120  # of a reply; the estimate of the cost before any reply is there


class CallPlan(NamedTuple):
    """What questions will take."""

    questions: int
    calls: int  # of questions whose reply is not in the log
    input_tokens: int  # of these calls
    output_tokens: int  # likewise; a guess from the replies in the log, or from their usual length
    cost: float
    most_cost: float  # if every reply is as long as it may be


@dataclass
class EndpointJudge:
    """Asks a model behind an endpoint.

    Attributes:
        caller: makes the calls.
        decoding: as the protocol names it, with the seed.
        sends_schema: whether the server is asked to keep to the schema of a reply; it is checked here in any case.
        used: every answer that a judgement rests on, by its key.

    """

    caller: ModelCaller
    decoding: Mapping[str, Any]
    sends_schema: bool = True
    used: dict[str, ModelAnswer] = field(default_factory=dict)

    def plan(self, questions: Sequence[JudgeQuestion], count_tokens: Callable[[str], int]) -> CallPlan:
        """Return what questions will take, before the first call; a retry is not foreseen."""
        missing = self.caller.find_missing([self._build_request(question) for question in questions])
        tokens = sum(count_tokens(message["content"]) for request in missing for message in request.messages)
        known = [
            answer.output_tokens for answer in self.caller.log.answers.values() if answer.output_tokens is not None
        ]
        typical = sum(known) / len(known) if known else _TYPICAL_TOKENS
        most = max(int(self.decoding.get(name) or 0) for name in ("max_tokens", "max_completion_tokens"))
        typical = min(typical, most)
        compute = self.caller.limits.compute_cost
        return CallPlan(
            questions=len(questions),
            calls=len(missing),
            input_tokens=tokens,
            output_tokens=round(typical * len(missing)),
            cost=compute(tokens, typical * len(missing)),
            most_cost=compute(tokens, most * len(missing)),
        )

    def ask(self, questions: Sequence[JudgeQuestion], *, label: str) -> list[Judgement]:
        """Return the judgement on each question, in their order. Raises LaunchError, MissingPackage.

        Args:
            questions: of any kind.
            label: what the progress bar says.

        """
        requests = [self._build_request(question) for question in questions]
        answers = self._call(requests, label)
        judgements = [
            Judgement(MISSING, (), "", "the model did not answer")
            if answer is None
            else judge_replies.read_reply(answer, question)
            for answer, question in zip(answers, questions, strict=True)
        ]
        again = [number for number, judgement in enumerate(judgements) if judgement.choice == INVALID]
        retries = [
            self._build_retry(
                requests[number], answers[number], questions[number].describe_retry(judgements[number].problem)
            )
            for number in again
        ]
        for number, answer in zip(again, self._call(retries, f"{label}, again"), strict=True):
            if answer is not None:
                judgements[number] = judge_replies.read_reply(answer, questions[number])
            elif self.caller.stop:  # the budget ended before the second reply, so nothing is known
                judgements[number] = Judgement(MISSING, (), "", "the budget ended before the retry")
        return judgements

    def _call(self, requests: Sequence[ModelRequest], label: str) -> list[ModelAnswer | None]:
        """Return the answers to requests, and remember them."""
        answers = self.caller.call(requests, label=label)
        for request, answer in zip(requests, answers, strict=True):
            if answer is not None:
                self.used[self.caller.compute_key(request)] = answer
        return answers

    def _build_request(self, question: JudgeQuestion) -> ModelRequest:
        """Return the request of a question."""
        messages = [
            {"role": "system", "content": question.describe_json_reply()},
            {"role": "user", "content": question.content},
        ]
        schema = question.build_schema() if self.sends_schema else None
        return ModelRequest(question.name, messages, self.decoding, schema)

    def _build_retry(self, request: ModelRequest, answer: ModelAnswer | None, text: str) -> ModelRequest:
        """Return the request for a second reply."""
        first = answer.text or answer.refusal if answer is not None else ""
        messages = [*request.messages, {"role": "assistant", "content": first}, {"role": "user", "content": text}]
        return ModelRequest(f"{request.name}, again", messages, request.decoding, request.schema)
