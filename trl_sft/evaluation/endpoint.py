"""Answers of a server that speaks OpenAI's protocol: vLLM, llama.cpp, Ollama, `transformers serve`, a hosted model.

Inputs: an address, the name of a model, prompts as messages or as text. Outputs: answers, one call each. Calls that
fail for a moment (429, 5xx, timeouts) are repeated by the client. The server renders chats with its own template. The
client is the package `openai` of the extra `serve`. Not here: what is kept (`answer_cache`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trl_sft.errors import DataError, Fault, LaunchError, first_line
from trl_sft.evaluation import eval_packages
from trl_sft.evaluation.answer_cache import StoredAnswer
from trl_sft.evaluation.thoughts import COMMON_MARKS

_RETRIES = 4  # of a call, with waits that grow
_SECONDS = 300.0  # of a call
_NO_KEY = "none"  # a local server wants no key, and the client wants one
API_KEY = "OPENAI_API_KEY"  # the environment variable of the client
_REASONING = ("reasoning_content", "reasoning")  # fields in which servers return a thought apart


class Endpoint(NamedTuple):
    """A server and a model there."""

    url: str  # up to and with `/v1`
    model: str

    @property
    def digest(self) -> str:
        """What stands for the model in keys of the cache: nobody outside knows its weights."""
        return f"endpoint {self.url} {self.model}"


def answer_prompts(
    endpoint: Endpoint, prompts: Sequence[Any], decoding: Mapping[str, Any]
) -> Iterator[dict[int, StoredAnswer]]:
    """Yield the answer to each prompt, by its number, one after another.

    Args:
        endpoint: the server.
        prompts: each a text, messages, or messages and tools.
        decoding: `max_tokens`, `temperature`, `seed` and the like, as the protocol names them.

    Raises:
        MissingPackage: the client is not installed.
        LaunchError: the server cannot be reached, or refuses the call.

    """
    eval_packages.require_packages("--endpoint", "openai", extra=eval_packages.SERVE_EXTRA)
    import openai

    client = openai.OpenAI(
        base_url=endpoint.url, api_key=os.environ.get(API_KEY) or _NO_KEY, max_retries=_RETRIES, timeout=_SECONDS
    )
    with client:
        for number, prompt in enumerate(prompts):
            try:
                yield {number: _answer(client, endpoint, prompt, decoding=decoding)}
            except openai.OpenAIError as error:
                problem = f"the model {endpoint.model} did not answer prompt {number + 1:,}: {first_line(error)}"
                fix = "Start the server or correct --model, and run the same command again: answers so far are kept."
                raise LaunchError(Fault(endpoint.url, problem, fix, code="evaluation.endpoint_failed")) from None


def choose_decoding(generation: Mapping[str, Any], *, max_new_tokens: int, seed: int) -> dict[str, Any]:
    """Return the decoding of a call, equal to that of a local model.

    Args:
        generation: keys of transformers' GenerationConfig that the recipe or the user sets.
        max_new_tokens: the most tokens of an answer.
        seed: of sampled answers.

    Raises:
        DataError: a key that the protocol does not have.

    """
    names = {"temperature": "temperature", "top_p": "top_p", "max_new_tokens": "max_tokens", "do_sample": ""}
    unknown = [name for name in generation if name not in names]
    if unknown:
        problem = f"a server does not take `{unknown[0]}` of evaluate.generation"
        fix = f"Remove `{unknown[0]}` from the recipe, or evaluate the model without --endpoint."
        raise DataError(Fault("--endpoint", problem, fix, code="evaluation.endpoint_failed"))
    decoding = {"max_tokens": max_new_tokens, "temperature": 0.0, "seed": seed}
    if generation.get("do_sample"):
        decoding["temperature"] = 1.0
        decoding |= {names[name]: generation[name] for name in ("temperature", "top_p") if name in generation}
    return decoding


def _answer(client: Any, endpoint: Endpoint, prompt: Any, *, decoding: Mapping[str, Any]) -> StoredAnswer:
    """Return the answer to one prompt."""
    from trl_sft.evaluation.generate import LIMIT, STOP_TOKEN  # needs torch, which a judge behind an endpoint does not

    if isinstance(prompt, str):
        response = client.completions.create(model=endpoint.model, prompt=prompt, **decoding)
        choice = response.choices[0]
        text = choice.text or ""
    else:
        messages, tools = prompt if isinstance(prompt[0], list) else (prompt, None)
        extra = {"tools": tools} if tools else {}
        response = client.chat.completions.create(model=endpoint.model, messages=messages, **extra, **decoding)
        choice = response.choices[0]
        text = choice.message.content or ""
        thought = next((value for name in _REASONING if (value := getattr(choice.message, name, None))), "")
        if thought:  # as a model without such a server writes it
            text = f"{COMMON_MARKS[0]}{thought}{COMMON_MARKS[1]}{text}"
    tokens = response.usage.completion_tokens if response.usage else None
    return StoredAnswer(text, LIMIT if choice.finish_reason == "length" else STOP_TOKEN, tokens)
