"""A model on this machine answers requests, as a server would.

Inputs: a loaded model with its tokenizer, requests, and the file of calls. Outputs: answers, each made once. Answers
are sampled one at a time with the seed of their request, so that they do not depend on the order. Not here: the choice
and loading of a model (`cli.build`), and servers (`evaluation.model_calls`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_sft import console
from trl_sft.building.call_budget import CallBudget
from trl_sft.evaluation import answer_cache, generate
from trl_sft.evaluation.call_log import CallLog, ModelAnswer
from trl_sft.evaluation.model_calls import CALLS, CallCounts, ModelRequest

_SAMPLING = ("temperature", "top_p")


@dataclass
class LocalCaller:
    """Answers requests with one model.

    Attributes:
        model: In eval mode.
        tokenizer: Has a chat template.
        name: As the spec names the model.
        digest: Of its weights, for the keys of answers.
        log: Where every prompt and answer is kept.
        budget: Of the build.
        counts: Of this process.
        stop: `calls` where the budget is used up.

    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    digest: str
    log: CallLog
    budget: CallBudget
    counts: CallCounts = field(default_factory=CallCounts)
    stop: str = ""
    problems: list[tuple[str, str]] = field(default_factory=list)

    def call(self, requests: Sequence[ModelRequest], *, label: str = "calls") -> list[ModelAnswer | None]:
        """Return the answer to each request, in their order; None = the budget was used up before."""
        keys = [self._compute_key(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.log.answers}
        self.counts.saved += len(requests) - len(missing)
        bar = tqdm(total=len(missing), desc=label, unit="call", disable=not console.shows_progress())
        for key, request in missing.items():
            if self.budget.calls is not None and self.budget.spent_calls >= self.budget.calls:
                self.stop = CALLS
            if self.stop:
                self.counts.not_made += 1
                continue
            self.log.add_answer(key, self._describe(request), self._answer(request))
            self.budget.spent_calls += 1
            self.counts.made += 1
            bar.update()
        bar.close()
        return [self.log.answers.get(key) for key in keys]

    def _answer(self, request: ModelRequest) -> ModelAnswer:
        """Return the answer of the model to one request."""
        decoding = dict(request.decoding)
        limit, seed = decoding.pop("max_tokens"), decoding.pop("seed")
        is_sampled = decoding["temperature"] > 0
        generation: dict[str, Any] = {"do_sample": is_sampled}
        if is_sampled:
            generation |= {name: decoding[name] for name in _SAMPLING if name in decoding}
        generation |= {name: value for name, value in decoding.items() if name not in _SAMPLING}
        own = self.model.generation_config
        config = generate.choose_generation(own, self.tokenizer, max_new_tokens=limit, generation=generation)
        messages = [dict(message) for message in request.messages]
        encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        ids = list(encoded["input_ids"])
        batches = generate.generate_batches(
            self.model, self.tokenizer, [ids], config=config, batch_size=1, seeds=[seed] if is_sampled else None
        )
        _, tokens, stop = next(iter(batches))[0]
        self.counts.input_tokens += len(ids)
        self.counts.output_tokens += len(tokens)
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        finish = "stop" if stop == generate.STOP_TOKEN else "length"
        return ModelAnswer(text, finish, "", len(ids), len(tokens))

    def _compute_key(self, request: ModelRequest) -> str:
        """Return the key of a request."""
        return answer_cache.compute_key(self.digest, list(request.messages), request.decoding)

    def _describe(self, request: ModelRequest) -> dict[str, Any]:
        """Return what a line of the file of calls says of a request."""
        return {
            "name": request.name,
            "model": self.name,
            "messages": list(request.messages),
            "decoding": dict(request.decoding),
            "schema": None,
        }
