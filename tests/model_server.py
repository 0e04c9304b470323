"""A server with OpenAI's protocol that answers as a test says: for the judge, and for the building of data.

`ModelServer(answer)` calls `answer(request)` for each call; `request` is the body, with `number` (from 0) added. It
returns a text, an `Answer`, or a `Failure`. `server.calls` has every body in the order of arrival.
"""

import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """What the server sends as the answer of the model."""

    text: str | None
    finish: str = "stop"
    refusal: str | None = None
    input_tokens: int | None = 100  # None = the server counts no tokens
    output_tokens: int = 10
    seconds: float = 0.0  # that it takes


@dataclass
class Failure:
    """A response without an answer."""

    status: int
    retry_after: str = ""
    body: str = '{"error": {"message": "no"}}'
    content_type: str = "application/json"


class Handler(BaseHTTPRequestHandler):
    """Answers one call."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        here = self.server
        with here.lock:
            body["number"] = len(here.calls)
            here.calls.append(body)
            here.running += 1
            here.most_at_once = max(here.most_at_once, here.running)
        try:
            answer = here.answer(body)
            answer = Answer(answer) if isinstance(answer, str) else answer
            if isinstance(answer, Answer):
                time.sleep(answer.seconds)
        finally:
            with here.lock:
                here.running -= 1
        if isinstance(answer, Failure):
            headers = {"Retry-After": answer.retry_after} if answer.retry_after else {}
            self.send(answer.status, answer.body, headers | {"Content-Type": answer.content_type})
            return
        message = {"role": "assistant", "content": answer.text, "refusal": answer.refusal}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish}
        content = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        if answer.input_tokens is not None:
            tokens = {"prompt_tokens": answer.input_tokens, "completion_tokens": answer.output_tokens}
            content["usage"] = tokens | {"total_tokens": answer.input_tokens + answer.output_tokens}
        self.send(200, json.dumps(content), {"Content-Type": "application/json"})

    def send(self, status, text, headers):
        data = text.encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


class ModelServer(ThreadingHTTPServer):
    """The server, on a port of its own, as a context."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.calls, self.lock = answer, [], threading.Lock()
        self.running = self.most_at_once = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_error):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_words):
        """Say nothing of a client that went away."""
