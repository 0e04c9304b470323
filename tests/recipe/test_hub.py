"""The hub's answers, from a server on loopback that speaks as the hub does."""

import http.server
import json
import os
import socket
import threading

import forks
import pytest

from trl_sft.model import device
from trl_sft.recipe import paths

RECIPE = "model: {name_or_path: %s}\ndata: {train: rows.jsonl}\ntrain: {output_dir: out, max_steps: 1}\n"


class Hub(http.server.BaseHTTPRequestHandler):
    """A server that has org/tiny (the embedded model) and org/gated, and nothing else."""

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, body):
        path = self.path.partition("?")[0]
        if "/tree/" in path:
            return self.refuse(404, "EntryNotFound")  # no folder of further chat templates
        if path.startswith("/api/models/org/tiny"):
            names = sorted(p.name for p in (paths.EMBEDDED / "tiny").iterdir())
            answer = {"id": "org/tiny", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in names]}
            return self.send(200, json.dumps(answer).encode(), body) if "revision" not in path else self.refuse(404)
        if path.startswith("/org/tiny/resolve/"):
            file = paths.EMBEDDED / "tiny" / path.rpartition("/")[2]
            return self.send(200, file.read_bytes(), body) if file.is_file() else self.refuse(404, "EntryNotFound")
        if path.startswith("/api/models/org/gated"):
            return self.send(200, json.dumps({"id": "org/gated", "gated": "manual", "siblings": []}).encode(), body)
        if path.startswith("/org/gated/"):
            return self.refuse(403, "GatedRepo")
        return self.refuse(404, "RepoNotFound")

    def refuse(self, status, code="RevisionNotFound"):
        self.send(status, b"{}", True, {"X-Error-Code": code})

    def send(self, status, content, body, headers=None):
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(content)),
            "ETag": f'"{hash(content) & 0xFFFFFFFF:x}"',
            "X-Repo-Commit": "a" * 40,
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def start_server(port):
    """Start the loopback hub; return it and its thread."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    return server, thread


def stop_server(server, thread):
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def launcher():
    """Return a Python whose hub is on loopback, and the port; each command has the cache of its own folder."""
    with socket.socket() as reserved:  # it does not listen: without a server the port refuses connections
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": "cache", "HF_HUB_DISABLE_XET": "1"}
        python = forks.Launcher(environment)
        yield python, port
        python.close()


@pytest.fixture
def hub(here, launcher):
    """Run the command line against the loopback hub: `hub("org/tiny")` -> exit code, everything printed."""

    def call(name, *words, is_reachable=True):
        (here / "recipe.yaml").write_text(RECIPE % name)
        python, port = launcher
        if not is_reachable:  # nobody listens at the port
            return python.run(here, "recipe.yaml", *words)
        server, thread = start_server(port)
        try:
            return python.run(here, "recipe.yaml", *words)
        finally:
            stop_server(server, thread)

    return call


def test_model_of_the_hub_is_trained_and_then_read_from_the_cache_offline(hub):
    code, output = hub("org/tiny")
    assert code == 0, output
    code, output = hub("org/tiny", "train.output_dir=again", is_reachable=False)
    assert code == 0, output
    assert "The hub cannot be reached. org/tiny is looked up in the cache." in output


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("org/nothing", (), "org/nothing: there is no such path here, and no such id on the hub"),
        (
            "org/gated",
            (),
            "org/gated: access to this repository is restricted\n    -> Ask for access on its page",
        ),
        ("org/tiny", ("model.revision=v9",), "org/tiny: the hub has no such revision of it"),
        (
            "trl_sft:tiny",
            ("data.train=org/nothing",),
            "org/nothing: there is no such path here, and no such id on the hub",
        ),
    ],
)
def test_error_of_the_hub_is_reported_without_a_traceback(hub, name, words, expected):
    code, output = hub(name, *words)
    assert code == 2
    assert expected in output
    assert "Traceback" not in output


def test_unreachable_hub_is_reported_at_once(hub):
    code, output = hub("org/tiny", is_reachable=False)
    assert code == 2
    assert "org/tiny: there is no such path here, it is not in the cache, and the hub cannot be reached" in output
    assert "Retrying" not in output


def test_impossible_push_is_refused_at_its_key_before_the_weights_load(go, monkeypatch):
    code, _, err = go(RECIPE % "trl_sft:tiny", "train.push_to_hub=true")
    assert code == 2
    assert "train.push_to_hub\n    the model cannot be pushed to the hub while HF_HUB_OFFLINE is set" in err
    monkeypatch.setattr(device.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(device, "get_token", lambda: None)
    code, _, err = go(RECIPE % "trl_sft:tiny", "train.push_to_hub=true", command=["check"])
    assert code == 2
    assert "train.push_to_hub\n    the model cannot be pushed to the hub without a token" in err
    assert go(RECIPE % "trl_sft:tiny", "train.push_to_hub=true", "--on", "any", command=["check"])[0] == 0
