"""A running llama.cpp that has a GGUF file loaded, in a child process of its own.

Inputs: a GGUF file. Outputs: a `LlamaServer` that answers requests over the loopback interface. llama.cpp comes from
the wheel `xllamacpp`. Not here: the child process (`llama_server`), and what is asked (`llama_reader`, `cli.evaluate`).
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trl_sft.serving.proof import llama_server

MARGIN = 64  # tokens of the context beside prompt and answer
_SECONDS = 600  # for one answer
_LOG_HEAD = re.compile(r"^[\d.]+ [A-Z] (?:\w+ +\w+: )?")  # time, level and function of a line of llama.cpp's log


class ServerRefusal(Exception):
    """llama.cpp refused a request."""


class LlamaFailure(Exception):
    """llama.cpp cannot load or use a file; the text is the cause as its log has it."""


class LlamaServer:
    """A running llama.cpp server."""

    def __init__(self, address: str) -> None:
        """Take its address."""
        self._address = address
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no loopback of ours

    def post(self, path: str, content: dict[str, Any]) -> Any:
        """Return the answer to a request. Raises ServerRefusal with the server's message."""
        data = json.dumps(content).encode()
        request = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=_SECONDS) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                text = json.loads(text)["error"]["message"]
            raise ServerRefusal(text.splitlines()[0][:300] if text else str(error)) from None

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """Return the tokens of a text in which special tokens are such, as the server reads prompts."""
        content = {"content": text, "add_special": add_special, "parse_special": True}
        return list(self.post("/tokenize", content)["tokens"])


@contextlib.contextmanager
def serve(path: Path, context: int) -> Iterator[LlamaServer]:
    """Yield a server of a GGUF file.

    Args:
        path: of the file.
        context: tokens of the longest prompt with its answer.

    Raises:
        LlamaFailure: llama.cpp cannot load the file, or ended.

    """
    arguments = [json.dumps(sys.path), str(path), str(context), str(torch.get_num_threads())]
    command = [sys.executable, "-I", str(llama_server.__file__), *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8"
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            if not address:
                process.wait()
                log.seek(0)
                raise LlamaFailure(_find_cause(log.read().decode("utf-8", "replace")))
            try:
                yield LlamaServer(address)
            except (OSError, ServerRefusal) as error:  # urllib's errors are OSErrors
                log.seek(0)
                raise LlamaFailure(_find_cause(f"{log.read().decode('utf-8', 'replace')}\n{error}")) from None
        finally:
            process.kill()
            process.stdin.close()
            process.stdout.close()
            process.wait()


def _find_cause(log: str) -> str:
    """Return the first error of llama.cpp's log."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if " E " in line or "rror" in line]
    cause = (errors or lines or ["it ended without a message"])[0]
    return _LOG_HEAD.sub("", cause).rstrip(":")
