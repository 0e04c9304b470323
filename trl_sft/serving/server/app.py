"""The endpoint: OpenAI's chat completions, answered one after the other by the same functions as in `chat`.

Inputs: a `ChatModel`. Outputs: a FastAPI application, and counts of what it answered. It is no `transformers serve`:
that renders without the run's wording and its treatment of special tokens, raises the limit of an answer to 1,024
tokens, ignores keys that it does not know, and loads any model of the hub on request (transformers 5.17 to 5.23,
`cli/serving`). Deliberately not here: sockets and signals (`process`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from trl_sft import console, errors
from trl_sft.errors import UserError
from trl_sft.evaluation.generate import STOP_TOKEN
from trl_sft.publishing.next_commands import COMPLETIONS
from trl_sft.serving.answers import INTERRUPTED, ChatAnswer, ChatModel, prompt_opens_thought
from trl_sft.serving.server.parts import AnswerPart, PartSplitter, cut_at_stop
from trl_sft.serving.server.request import ChatRequest, choose_config, choose_seed, read_request

_POLL_SECONDS = 0.5  # between two looks whether the client is still there
_CLIENT_GONE = 499  # nginx' status; nobody reads it


@dataclass
class Counts:
    """What a server has answered."""

    requests: int = 0
    tokens: int = 0  # of answers
    seconds: float = 0  # of generation


class _Failure(NamedTuple):
    """Why a request has no answer, or no whole one."""

    message: str
    status: int
    code: str


class _Completion(NamedTuple):
    """A whole answer, with the tokens of its prompt."""

    answer: ChatAnswer
    prompt_tokens: int
    rest: AnswerPart  # what a stream has not sent yet


_Item = AnswerPart | _Completion | _Failure


@dataclass
class AnswerService:
    """Answers requests, one at a time.

    Attributes:
        chat: the model.
        name: of the model, as clients write it.
        counts: what was answered so far.
        closing: once it is set, answers end and new ones are refused.
        is_announced: whether each answer is a line on the screen.
        created: when the server began, in seconds since 1970.

    """

    chat: ChatModel
    name: str
    counts: Counts = field(default_factory=Counts)
    closing: threading.Event = field(default_factory=threading.Event)
    is_announced: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    _worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="answers"))

    def close(self) -> None:
        """End the running answer and refuse further ones."""
        self.closing.set()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def start(self, request: ChatRequest, cancelled: threading.Event) -> asyncio.Queue[_Item]:
        """Put a request behind those that wait; return the queue that gets the parts of its answer, then its end."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[_Item]()

        def put(item: _Item) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def is_cancelled() -> bool:
            return cancelled.is_set() or self.closing.is_set()

        def work() -> None:
            try:
                put(self._answer(request, put, is_cancelled))
            except UserError as error:
                fault = error.faults[0]
                put(_Failure(f"{fault.problem}. {fault.fix}", 400, fault.code))
            except Exception as error:  # of the model: the server goes on
                console.say_error(f"trl_sft: a request failed: {type(error).__name__}: {errors.first_line(error)}")
                put(_Failure(f"{type(error).__name__}: {errors.first_line(error)}", 500, "run.internal_error"))

        self._worker.submit(work)
        return queue

    def _answer(
        self, request: ChatRequest, put: Callable[[_Item], None], is_cancelled: Callable[[], bool]
    ) -> _Completion | _Failure:
        """Answer a request; `put` gets the parts. Raises DataError."""
        if is_cancelled():
            return _Failure("the client has gone, or the server stops", 503, "run.interrupted")
        prompt = self.chat.renderer.render_request(_read_turns(request))
        config = choose_config(self.chat.config, request)
        chat = dataclasses.replace(self.chat, config=config, seed=choose_seed(self.chat.seed, config, request))
        is_open = prompt_opens_thought(chat, prompt)
        splitter = PartSplitter(chat.thoughts, is_open=is_open, stops=request.stops)

        def show(text: str) -> None:
            part = splitter.take(text)
            if any(part):
                put(part)

        answer = chat.answer(prompt, show=show if request.stream else None, is_cancelled=is_cancelled)
        if answer.stop_reason == INTERRUPTED:
            return _Failure("the client has gone, or the server stops", 503, "run.interrupted")
        rest = splitter.finish(answer.thought, answer.text)
        counts = self.counts
        counts.requests += 1
        counts.tokens += len(answer.tokens)
        counts.seconds += answer.seconds
        if self.is_announced:
            number = len(answer.tokens)
            speed = f"{number / max(answer.seconds, 1e-9):,.1f} tokens/s"
            tokens = f"prompt {len(prompt.ids):,} tokens, answer {number:,} in {answer.seconds:.2f} s"
            console.say(f"request   {tokens}, {speed}")
        return _Completion(answer, len(prompt.ids), rest)


def build_app(service: AnswerService) -> FastAPI:
    """Return the application of an endpoint."""
    app = FastAPI(title=service.name, openapi_url=None, docs_url=None, redoc_url=None)

    @app.post(COMPLETIONS)
    async def complete_chat(request: Request) -> Response:
        return await _complete(service, request)

    @app.get("/v1/models")
    async def list_models() -> Response:
        return _send_json({"object": "list", "data": [_describe_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        return _send_json(_describe_model(service)) if name == service.name else _refuse_model(service, name)

    @app.get("/health")
    async def show_health() -> Response:
        return _send_json({"status": "ok"})

    @app.exception_handler(HTTPException)
    async def explain_status(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path} is not served. Send POST {COMPLETIONS}, or GET /v1/models."
        return _send_failure(_Failure(message, error.status_code, "serve.bad_request"))

    return app


async def _complete(service: AnswerService, request: Request) -> Response:
    """Return the response to a request for a chat completion."""
    try:
        body = read_request(await _read_body(request))
    except UserError as error:
        fault = error.faults[0]
        return _send_failure(_Failure(f"{fault.problem}. {fault.fix}", 400, fault.code))
    if body.model not in (None, service.name):
        return _refuse_model(service, str(body.model))
    cancelled = threading.Event()
    queue = service.start(body, cancelled)
    item = await _wait_for_item(queue, request, cancelled)
    while not body.stream and isinstance(item, AnswerPart):
        item = await _wait_for_item(queue, request, cancelled)
    if isinstance(item, _Failure):
        return _send_failure(item)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    if isinstance(item, _Completion) and not body.stream:
        return _send_json(_describe_completion(head, item, body))
    stream = _stream(queue, item, head, body, cancelled)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _read_body(request: Request) -> Any:
    """Return the JSON value of a request. Raises DataError.

    A page of the web can send a form or plain text to this machine without asking, but not JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    code = "serve.bad_request"
    if kind != "application/json":
        fix = "Send the header `Content-Type: application/json`."
        raise errors.DataError(errors.Fault("the request", f"the content type is {kind or 'not set'}", fix, code=code))
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        problem = f"the body is no JSON: {errors.first_line(error)}"
        raise errors.DataError(errors.Fault("the request", problem, "Send a JSON object.", code=code)) from None


async def _wait_for_item(queue: asyncio.Queue[_Item], request: Request, cancelled: threading.Event) -> _Item:
    """Return the next item of an answer; end the answer if the client goes away."""
    while True:
        try:
            return await asyncio.wait_for(queue.get(), _POLL_SECONDS)
        except asyncio.TimeoutError:  # noqa: UP041 (another class than TimeoutError in Python 3.10)
            if await request.is_disconnected():
                cancelled.set()
                return _Failure("the client has gone", _CLIENT_GONE, "run.interrupted")


async def _stream(
    queue: asyncio.Queue[_Item],
    item: _Item,
    head: dict[str, Any],
    body: ChatRequest,
    cancelled: threading.Event,
) -> AsyncIterator[str]:
    """Yield the events of a stream; `item` is the first item of its answer."""
    head = head | {"object": "chat.completion.chunk"}

    def write(delta: dict[str, Any], reason: str | None = None) -> str:
        return _write_event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    try:
        yield write({"role": "assistant", "content": ""})
        while isinstance(item, AnswerPart):
            yield write(_describe_part(item))
            item = await queue.get()
        if isinstance(item, _Failure):
            yield _write_event(_describe_failure(item))
            return
        if any(item.rest):
            yield write(_describe_part(item.rest))
        yield write({}, _find_reason(item.answer, body))
        if body.wants_usage:
            yield _write_event(head | {"choices": [], "usage": _count_tokens(item)})
        yield "data: [DONE]\n\n"
    finally:
        cancelled.set()  # the client may have gone


def _read_turns(request: ChatRequest) -> list[dict[str, Any]]:
    """Return the turns of a request; OpenAI's role `developer` is what others call `system`."""
    turns = []
    for message in request.messages:
        turn = {key: value for key, value in message.items() if value is not None}
        if turn.get("role") == "developer":
            turn["role"] = "system"
        turns.append(turn)
    return turns


def _describe_completion(head: dict[str, Any], item: _Completion, body: ChatRequest) -> dict[str, Any]:
    """Return the body of a whole answer."""
    answer = item.answer
    message = {"role": "assistant", "content": cut_at_stop(answer.text, body.stops)}
    if answer.thought:
        message["reasoning_content"] = answer.thought
    choice = {"index": 0, "message": message, "finish_reason": _find_reason(answer, body)}
    return head | {"object": "chat.completion", "choices": [choice], "usage": _count_tokens(item)}


def _describe_part(part: AnswerPart) -> dict[str, str]:
    """Return the change that a part of an answer makes."""
    values = {"reasoning_content": part.thought, "content": part.text}
    return {name: value for name, value in values.items() if value}


def _find_reason(answer: ChatAnswer, body: ChatRequest) -> str:
    """Return why an answer ended, in OpenAI's words."""
    is_cut = cut_at_stop(answer.text, body.stops) != answer.text
    return "stop" if is_cut or answer.stop_reason == STOP_TOKEN else "length"


def _count_tokens(item: _Completion) -> dict[str, int]:
    """Return the numbers of tokens of a request."""
    answer_tokens = len(item.answer.tokens)
    total = item.prompt_tokens + answer_tokens
    return {"prompt_tokens": item.prompt_tokens, "completion_tokens": answer_tokens, "total_tokens": total}


def _describe_model(service: AnswerService) -> dict[str, Any]:
    """Return the served model as OpenAI lists models."""
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "trl_sft"}


def _refuse_model(service: AnswerService, name: str) -> Response:
    """Return the response to a request for another model."""
    message = f"the model {name[:200]} is not served here. Write `{service.name}`, or leave out `model`."
    return _send_failure(_Failure(message, 404, "model_not_found"))


def _describe_failure(failure: _Failure) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kind = "invalid_request_error" if failure.status < 500 else "server_error"
    return {"error": {"message": failure.message, "type": kind, "param": None, "code": failure.code}}


def _send_failure(failure: _Failure) -> Response:
    """Return the response of an error."""
    return _send_json(_describe_failure(failure), failure.status)


def _send_json(content: dict[str, Any], status: int = 200) -> Response:
    """Return a response with a JSON object."""
    return JSONResponse(content, status_code=status)


def _write_event(content: dict[str, Any]) -> str:
    """Return an event of a stream."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
