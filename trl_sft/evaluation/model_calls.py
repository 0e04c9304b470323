"""Calls of a model behind an OpenAI-compatible endpoint: several at once, repeated, within a budget, each made once.

Inputs: requests, the limits of the calls, and a `CallLog`. Outputs: the answers in the order of the requests, whatever
the order in which they arrive, and counts of calls, tokens and money. A request whose answer the log has is not sent.
The client is the package `openai`. Not here: what the prompts say, and what an answer means.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tqdm.auto import tqdm

from trl_sft import console
from trl_sft.errors import Fault, LaunchError, first_line
from trl_sft.evaluation import answer_cache, eval_packages
from trl_sft.evaluation.call_log import CallLog, ModelAnswer
from trl_sft.evaluation.endpoint import API_KEY, Endpoint

CALLS, MONEY, ERRORS = "calls", "money", "errors"  # why a caller stopped before the last request
_LONGEST_WAIT = 60.0  # seconds between two attempts, also where the server asks for more
_TEMPLATE_TOKENS = 256  # that a server's template adds to a prompt, at most
_PER_MILLION = 1e-6
_NO_KEY = "none"  # a local server wants no key, and the client wants one
_HOPELESS = (401, 403, 404)  # the key, the rights or the name of the model: no call can succeed
_REPEATED = (408, 409, 425, 429)  # and from 500 on
_OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class ModelRequest:
    """One request.

    Attributes:
        name: what it is for, for readers of the log: `row 7 quality`.
        messages: of the chat, each with `role` and `content`.
        decoding: `max_tokens` or `max_completion_tokens`, and `temperature`, `seed` and the like, as the protocol
            names them.
        schema: a JSON Schema that the server is asked to keep to; None = free text. Not every server keeps to it.

    """

    name: str
    messages: Sequence[Mapping[str, Any]]
    decoding: Mapping[str, Any]
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class CallLimits:
    """How calls are made, and when to stop.

    Attributes:
        concurrent: calls that are under way at once.
        retries: further attempts after a refusal for a moment (429, 5xx), a timeout, or an answer of no form.
        first_wait: seconds before the second attempt; each further wait is twice as long, at most a minute.
        seconds: that one attempt may take.
        errors_in_row: stop after so many requests in a row without an answer.
        max_calls: the most attempts of this process; None = no limit.
        max_cost: the most money of this process, in the currency of the prices; None = no limit.
        input_price: of a million tokens of prompts; None = not known.
        output_price: of a million tokens of answers; None = not known.

    """

    concurrent: int = 8
    retries: int = 4
    first_wait: float = 1.0
    seconds: float = 300.0
    errors_in_row: int = 5
    max_calls: int | None = None
    max_cost: float | None = None
    input_price: float | None = None
    output_price: float | None = None

    @property
    def has_prices(self) -> bool:
        """Tell whether the cost of a call can be said."""
        return self.input_price is not None and self.output_price is not None

    def compute_cost(self, input_tokens: float, output_tokens: float) -> float:
        """Return the money that tokens cost; 0 without prices."""
        if self.input_price is None or self.output_price is None:
            return 0.0
        return (input_tokens * self.input_price + output_tokens * self.output_price) * _PER_MILLION


@dataclass
class CallCounts:
    """What the calls of this process were.

    Attributes:
        made: attempts that were sent, also those that failed.
        saved: requests whose answer was in the log, or that equal another one.
        failed: requests without an answer after all attempts.
        not_made: requests that were not sent, because the caller stopped.
        input_tokens: as the server counted them.
        output_tokens: likewise.
        unmetered: attempts whose tokens the server did not say; their cost is counted with its upper bound.
        cost: money; 0 without prices.

    """

    made: int = 0
    saved: int = 0
    failed: int = 0
    not_made: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    unmetered: int = 0
    cost: float = 0.0

    def describe(self) -> dict[str, Any]:
        """Return the counts as a mapping that JSON can write."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass
class ModelCaller:
    """Sends requests to one model.

    Attributes:
        endpoint: the server and the model.
        log: where every prompt and answer is kept.
        limits: of the calls.
        counts: of all calls so far.
        stop: CALLS, MONEY or ERRORS where the caller has stopped; "" = it has not. A caller that has stopped sends
            nothing more.
        problems: of failed requests: (name, what went wrong).

    """

    endpoint: Endpoint
    log: CallLog
    limits: CallLimits
    counts: CallCounts = field(default_factory=CallCounts)
    stop: str = ""
    problems: list[tuple[str, str]] = field(default_factory=list)
    _reserved: float = 0.0  # money of the attempts that are under way
    _errors_in_row: int = 0

    def __post_init__(self) -> None:
        """Check the limits. Raises LaunchError for a budget of money without prices."""
        if self.limits.max_cost is not None and not self.limits.has_prices:
            problem = "a budget in money needs the prices of the model"
            fix = "Give the prices of a million tokens of prompts and of answers."
            raise LaunchError(Fault(self.endpoint.model, problem, fix, code="evaluation.no_prices"))

    def compute_key(self, request: ModelRequest) -> str:
        """Return the key of a request: of the model's name, the prompt, the schema and the decoding with its seed.

        The address is no part of it: a server that starts on another port is the same model.
        """
        return answer_cache.compute_key(
            f"endpoint {self.endpoint.model}", [list(request.messages), request.schema], request.decoding
        )

    def find_missing(self, requests: Sequence[ModelRequest]) -> list[ModelRequest]:
        """Return the requests that have to be sent: each different one whose answer the log does not have."""
        missing = {self.compute_key(request): request for request in reversed(requests)}
        return [request for key, request in reversed(missing.items()) if key not in self.log.answers]

    def call(self, requests: Sequence[ModelRequest], *, label: str = "calls") -> list[ModelAnswer | None]:
        """Return the answer to each request, in their order; None = none came, or the caller stopped before.

        Args:
            requests: equal ones are one call.
            label: what the progress bar says.

        Raises:
            MissingPackage: the client is not installed.
            LaunchError: the server cannot be reached, refuses the key, or does not have the model.

        """
        missing = self.find_missing(requests)
        self.counts.saved += len(requests) - len(missing)
        if missing:
            eval_packages.require_packages("the endpoint", "openai", extra=eval_packages.JUDGE_EXTRA)
            _run_to_end(self._call_all(missing, label))
        return [self.log.answers.get(self.compute_key(request)) for request in requests]

    async def _call_all(self, missing: Sequence[ModelRequest], label: str) -> None:
        """Send requests in their order, at most `concurrent` at once."""
        import openai

        client = openai.AsyncOpenAI(
            base_url=self.endpoint.url,
            api_key=os.environ.get(API_KEY) or _NO_KEY,
            max_retries=0,  # attempts are counted here
            timeout=self.limits.seconds,
        )
        bar = tqdm(total=len(missing), desc=label, unit="call", disable=not console.shows_progress())
        running: set[asyncio.Task[None]] = set()
        sent = 0
        async with client:
            try:
                for request in missing:
                    while running and (len(running) >= self.limits.concurrent or not self._fits(request)):
                        running = await _wait_for_one(running, bar)
                    if self.stop or not self._admits(request):
                        break
                    running.add(asyncio.create_task(self._call(client, request)))
                    await asyncio.sleep(0)  # the task reserves its money
                    sent += 1
                while running:
                    running = await _wait_for_one(running, bar)
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
                bar.close()
        self.counts.not_made += len(missing) - sent

    async def _call(self, client: Any, request: ModelRequest) -> None:
        """Send one request until it is answered, and write what came of it. Raises LaunchError."""
        problem = ""
        key, facts = self.compute_key(request), self._describe(request)
        for attempt in range(self.limits.retries + 1):
            if self.stop or not self._admits(request):
                self.counts.not_made += 1
                return
            try:
                response = await self._attempt(client, request)
                answer = _read_response(response)
            except Exception as error:  # of the client, and of a body that is no JSON
                failure = _explain(error)
                problem = failure.problem
                if failure.is_hopeless:
                    self.log.add_failure(key, facts, problem)
                    self._refuse(problem)
                if not failure.is_repeated or attempt == self.limits.retries:
                    break
                await asyncio.sleep(_choose_wait(self.limits.first_wait, attempt, asked=failure.wait))
                continue
            self.log.add_answer(key, facts, answer)
            self._errors_in_row = 0
            return
        self.log.add_failure(key, facts, problem)
        self.counts.failed += 1
        self.problems.append((request.name, problem))
        self._errors_in_row += 1
        if self._errors_in_row >= self.limits.errors_in_row:
            self.stop = self.stop or ERRORS

    async def _attempt(self, client: Any, request: ModelRequest) -> Any:
        """Send a request once, and count it."""
        extra: dict[str, Any] = {}
        if request.schema is not None:
            schema = {"name": "answer", "strict": True, "schema": dict(request.schema)}
            extra["response_format"] = {"type": "json_schema", "json_schema": schema}
        bound = self._bound_cost(request)
        self.counts.made += 1
        self._reserved += bound
        cost = bound  # where nobody says what the server counted
        is_billed = True
        try:
            async with asyncio.timeout(self.limits.seconds):  # the client's own limit is one for each part of an answer
                response = await client.chat.completions.create(
                    model=self.endpoint.model, messages=list(request.messages), **request.decoding, **extra
                )
            tokens = _read_tokens(response)
            if tokens is not None:
                self.counts.input_tokens += tokens[0]
                self.counts.output_tokens += tokens[1]
                cost = self.limits.compute_cost(*tokens)
            self.counts.unmetered += tokens is None
            return response
        except Exception as error:
            is_billed = not hasattr(error, "status_code") and not _is_unsent(error)  # a refused call costs nothing
            self.counts.unmetered += is_billed
            raise
        finally:
            self._reserved -= bound
            self.counts.cost += cost if is_billed else 0.0

    def _fits(self, request: ModelRequest) -> bool:
        """Tell whether one more attempt is within the budget of money, if those under way cost as much as they can."""
        if self.limits.max_cost is None:
            return True
        # a millionth of the smallest unit is rounding
        return self.counts.cost + self._reserved + self._bound_cost(request) <= self.limits.max_cost + 1e-9

    def _admits(self, request: ModelRequest) -> bool:
        """Tell whether the budget has room for one more attempt; else stop."""
        if self.limits.max_calls is not None and self.counts.made >= self.limits.max_calls:
            self.stop = self.stop or CALLS
        elif not self._fits(request):
            self.stop = self.stop or MONEY
        return not self.stop

    def _bound_cost(self, request: ModelRequest) -> float:
        """Return the most that a call can cost: a token has at least one byte."""
        if not self.limits.has_prices:
            return 0.0
        prompt = json.dumps([list(request.messages), request.schema], ensure_ascii=False)
        limits = [request.decoding[name] for name in _OUTPUT_LIMITS if name in request.decoding]
        output = min(limits) if limits else math.inf
        return self.limits.compute_cost(len(prompt.encode("utf-8", "replace")) + _TEMPLATE_TOKENS, output)

    def _describe(self, request: ModelRequest) -> dict[str, Any]:
        """Return what a line of the log says of a request."""
        facts = {"name": request.name, "model": self.endpoint.model, "messages": list(request.messages)}
        return facts | {"decoding": dict(request.decoding), "schema": request.schema}

    def _refuse(self, problem: str) -> NoReturn:
        """Raise LaunchError: no call can succeed."""
        text = f"the model {self.endpoint.model} cannot be called: {problem}"
        fix = f"Correct the address, the name of the model, or the key in {API_KEY}, and run the same command again."
        raise LaunchError(Fault(self.endpoint.url, text, fix, code="evaluation.endpoint_failed"))


@dataclass(frozen=True)
class _CallFailure:
    """Why an attempt brought no answer."""

    problem: str
    is_repeated: bool  # whether another attempt may succeed
    is_hopeless: bool = False  # whether no call can succeed
    wait: float = 0.0  # seconds for which the server asks


class _NoAnswerError(ValueError):
    """The body of a response has no answer."""


def _run_to_end(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end; beside the event loop of a notebook, in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as threads:
        threads.submit(asyncio.run, work).result()


async def _wait_for_one(running: set[asyncio.Task[None]], bar: Any) -> set[asyncio.Task[None]]:
    """Wait until a call ends; return those that are still under way. Raises what a call raised."""
    done, others = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    bar.update(len(done))
    running.intersection_update(others)
    failures = [failure for task in done if (failure := task.exception()) is not None]  # all are read: asyncio prints
    if failures:  # the others with their tracebacks, in which a server may quote the key
        raise failures[0]
    return others


def _explain(error: Exception) -> _CallFailure:
    """Return what an error of the client means. Raises an error that is none of the client or of a response."""
    import openai

    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return _CallFailure("no answer within the time limit of a call", True)
    if isinstance(error, openai.APIStatusError):
        code = error.status_code
        wait = 0.0
        with contextlib.suppress(ValueError):
            wait = float(error.response.headers.get("retry-after", 0))
        is_repeated = code in _REPEATED or code >= 500
        return _CallFailure(f"{code}: {first_line(error)}", is_repeated, is_hopeless=code in _HOPELESS, wait=wait)
    if isinstance(error, json.JSONDecodeError):
        return _CallFailure("the answer is no JSON: the address may be that of a web page or of a proxy", True)
    if isinstance(error, openai.OpenAIError | ValueError):  # no connection, or a body of no form
        return _CallFailure(first_line(error), True)
    raise error


def _is_unsent(error: Exception) -> bool:
    """Tell whether the server surely never got a call: no connection came about."""
    cause = error.__cause__
    return cause is not None and type(cause).__name__ in ("ConnectError", "ConnectTimeout")


def _choose_wait(first: float, attempt: int, *, asked: float) -> float:
    """Return how many seconds to wait after an attempt; `asked`: by the server."""
    asked = asked if math.isfinite(asked) else 0.0
    return min(max(first * 2.0**attempt, asked), _LONGEST_WAIT)


def _read_response(response: Any) -> ModelAnswer:
    """Return the answer in a response. Raises _NoAnswerError."""
    choices = getattr(response, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    if choice is None or message is None:
        raise _NoAnswerError("the response has no answer: it is not of OpenAI's protocol")
    content, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
    tokens = _read_tokens(response)
    return ModelAnswer(
        text=content if isinstance(content, str) else "",
        finish=str(getattr(choice, "finish_reason", None) or "stop"),
        refusal=refusal if isinstance(refusal, str) else "",
        input_tokens=tokens[0] if tokens else None,
        output_tokens=tokens[1] if tokens else None,
    )


def _read_tokens(response: Any) -> tuple[int, int] | None:
    """Return the tokens of prompt and answer as the server counted them; None = it did not."""
    usage = getattr(response, "usage", None)
    prompt, completion = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    return max(prompt, 0), max(completion, 0)
