"""The body of a request as OpenAI's clients send it, checked: what has no effect here is refused, never ignored.

Inputs: a mapping. Outputs: a `ChatRequest`, the turns of its prompt, and how its answer is decoded. Keys that say
nothing about the answer (`user`, `metadata`) pass. Deliberately not here: rendering (`serving.prompts`).
"""

from __future__ import annotations

import copy
import secrets
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import GenerationConfig

from trl_sft.errors import DataError, Fault, first_line
from trl_sft.suggestions import STRICT, nearest_name

_PLACE = "the request"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
# keys that clients send with their defaults, which mean what happens anyhow; another value is refused
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),  # says how tools are called, and there are none
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "stream_options": ({}, {"include_usage": True}, {"include_usage": False}),
}
_INSTEAD = {
    "tools": "Serve the model with vLLM to have tool calls parsed: `python -m trl_sft export RUN --to vllm`.",
    "functions": "Serve the model with vLLM to have tool calls parsed: `python -m trl_sft export RUN --to vllm`.",
    "n": "Send the request again for another answer.",
    "frequency_penalty": "Send `repetition_penalty` instead.",
    "presence_penalty": "Send `repetition_penalty` instead.",
}


class ChatRequest(BaseModel):
    """A request for the answer to a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str | None = None  # the served model; None = it too
    max_tokens: int | None = Field(None, ge=1)  # None = as the run says
    max_completion_tokens: int | None = Field(None, ge=1)  # OpenAI's newer name
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)  # 0 = greedy; None = as the run says
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None  # texts that end the answer, which has them not
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    n: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    logit_bias: Any = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    store: Any = None
    service_tier: Any = None
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in stops if text)

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer; None = as the run says."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


def read_request(body: Any) -> ChatRequest:
    """Return a checked request. Raises DataError that names the key.

    Args:
        body: The JSON value of the request.

    """
    if not isinstance(body, dict):
        fix = 'Send an object: {"messages": [{"role": "user", "content": TEXT}]}.'
        raise _make_error("the body is no JSON object", fix)
    try:
        request = ChatRequest.model_validate(body)
    except ValidationError as error:
        raise _explain(error) from None
    for key, values in _NEUTRAL.items():
        value = getattr(request, key)
        if value is not None and not any(value == neutral for neutral in values):
            fix = _INSTEAD.get(key, f"Leave out `{key}`.")
            raise _make_error(f"`{key}` has no effect here, and the request sets it to {str(value)[:60]}", fix)
    return request


def choose_config(own: GenerationConfig, request: ChatRequest) -> GenerationConfig:
    """Return how an answer is decoded: as in `chat`, with what the request sets.

    Args:
        own: As `chat` decodes.
        request: Whose keys win.

    Raises:
        DataError: A key cannot be used with the others.

    """
    config = copy.deepcopy(own)
    if request.limit is not None:
        config.max_new_tokens = request.limit
    if request.stops:
        config.stop_strings = list(dict.fromkeys([*(_list_stops(own)), *request.stops]))
    if request.repetition_penalty is not None:
        config.repetition_penalty = request.repetition_penalty
    if request.temperature is not None:
        config.do_sample = request.temperature > 0
    blank = GenerationConfig()
    for name in _SAMPLING:
        value = getattr(request, name)
        if not config.do_sample:
            if value not in (None, 0, 1) and name != "temperature":
                fix = "Send a `temperature` above 0 with it, or leave it out."
                raise _make_error(f"`{name}` has no effect on a greedy answer", fix)
            setattr(config, name, getattr(blank, name))
        elif value is not None:
            setattr(config, name, value)
    try:
        config.validate()
    except (ValueError, TypeError) as error:
        raise _make_error(first_line(error), "Correct the key.") from None
    return config


def choose_seed(own: int, config: GenerationConfig, request: ChatRequest) -> int:
    """Return the seed of an answer: that of the request; without one sampled answers differ each time."""
    if request.seed is not None:
        return request.seed
    return secrets.randbelow(2**31) if config.do_sample else own


def _list_stops(config: GenerationConfig) -> list[str]:
    """Return the texts that end an answer already."""
    stops = config.stop_strings or []
    return [stops] if isinstance(stops, str) else list(stops)


def _explain(error: ValidationError) -> DataError:
    """Return the fault of a body that does not have the form of a request."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"])) or "the body"
    names = [name for name in ChatRequest.model_fields if name not in _NEUTRAL]
    if first["type"] == "extra_forbidden":
        nearest = nearest_name(key, names, cutoff=STRICT)
        fix = f"Did you mean `{nearest}`?" if nearest else f"Leave out `{key}`. The keys are {', '.join(names)}."
        return _make_error(f"there is no key `{key}`", fix)
    if first["type"] == "missing":
        return _make_error(f"`{key}` is missing", f"Send `{key}`.")
    message = str(first["msg"])
    return _make_error(f"`{key}`: {message[:1].lower()}{message[1:]}", f"Correct `{key}`.")


def _make_error(problem: str, fix: str) -> DataError:
    """Return the fault of a request."""
    return DataError(Fault(_PLACE, problem, fix, code="serve.bad_request"))
