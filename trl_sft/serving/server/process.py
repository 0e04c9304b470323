"""A server from its first byte to its last: it starts, answers a request of its own, waits, and ends on a signal.

Inputs: an `AnswerService` and a bound socket. Outputs: what the first request measured, and a server that has ended
with nothing left. Deliberately not here: what is answered (`app`).
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import uvicorn

from trl_sft.errors import Fault, RecipeError
from trl_sft.publishing.next_commands import COMPLETIONS
from trl_sft.serving.server import address
from trl_sft.serving.server.app import AnswerService, build_app

_START_SECONDS = 30
_FINISH_SECONDS = 5  # that open connections have once the server stops


class FirstAnswer(NamedTuple):
    """What the first request measured."""

    prompt_tokens: int
    tokens: int  # of the answer
    seconds: float  # as the client sees them
    text: str
    finish_reason: str  # OpenAI's word: stop or length


@contextlib.contextmanager
def run(service: AnswerService, listener: socket.socket, host: str) -> Iterator[threading.Event]:
    """Yield, once a server takes requests, the event of its end; after the block it has ended.

    Args:
        service: What answers.
        listener: A bound socket.
        host: As the user names it.

    Raises:
        RecipeError: Another process has taken the port meanwhile, or the server does not start.

    """
    address.listen(listener, host)
    config = uvicorn.Config(
        build_app(service),
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=_FINISH_SECONDS,
    )
    server = uvicorn.Server(config)
    ended = threading.Event()

    def serve() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            ended.set()

    # In a thread, where uvicorn handles no signals: they reach the main thread. That waits for an event, because
    # Thread.join takes a thread for ended if a signal interrupts it (Python 3.10 to 3.12, `_wait_for_tstate_lock`).
    threading.Thread(target=serve, name="server", daemon=True).start()
    try:
        end = time.monotonic() + _START_SECONDS
        while not server.started:
            if ended.is_set() or time.monotonic() > end:
                problem, fix = "the server does not start", "Run the same command again."
                raise RecipeError(Fault("the server", problem, fix, code="serve.first_request"))
            time.sleep(0.02)
        yield ended
    finally:
        server.should_exit = True
        service.close()
        ended.wait(_FINISH_SECONDS + 5)


def ask(url: str, body: dict[str, Any]) -> FirstAnswer:
    """Send a request as any client does, and measure its answer. Raises RecipeError if there is none.

    Args:
        url: Of the server.
        body: Of the request.

    """
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + COMPLETIONS, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands before this machine
    began = time.monotonic()
    try:
        with opener.open(request) as response:
            content = json.load(response)
    except urllib.error.HTTPError as error:
        answer = json.load(error)
        raise RecipeError(_explain(answer["error"]["message"])) from None
    except OSError as error:
        raise RecipeError(_explain(str(error))) from None
    seconds = time.monotonic() - began
    (choice,), usage = content["choices"], content["usage"]
    text = str(choice["message"]["content"])
    return FirstAnswer(usage["prompt_tokens"], usage["completion_tokens"], seconds, text, str(choice["finish_reason"]))


def _explain(reason: str) -> Fault:
    """Return the fault of a server whose first request fails."""
    problem = f"the server does not answer its first request: {reason}"
    fix = "Ask the model with `python -m trl_sft chat` to see whether it answers."
    return Fault("the server", problem, fix, code="serve.first_request")
