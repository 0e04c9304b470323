"""The hub's answers, from a server on loopback that speaks as the hub does."""

import os
import socket

import forks
import hub_server
import pytest

from trl_sft.publishing import repository

RECIPE = "model: {name_or_path: %s}\ndata: {train: rows.jsonl}\ntrain: {output_dir: out, max_steps: 1}\n"


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
        with hub_server.running(port):
            return python.run(here, "recipe.yaml", *words)

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
    monkeypatch.setattr(repository.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(repository, "get_token", lambda: None)
    code, _, err = go(RECIPE % "trl_sft:tiny", "train.push_to_hub=true", command=["check"])
    assert code == 2
    assert "train.push_to_hub\n    the model cannot be pushed to the hub without a token" in err
    assert go(RECIPE % "trl_sft:tiny", "train.push_to_hub=true", "--on", "any", command=["check"])[0] == 0
