"""The commands that a run ends with: they exist, they fit the run, and the model card has the same."""

import argparse
import json
import re
import shlex

import chat_runs
import pytest

from trl_sft import cli
from trl_sft.publishing import next_commands
from trl_sft.serving.export import gguf_architectures


class Accepted(Exception):
    """A parser has accepted the words."""


@pytest.fixture
def is_accepted(monkeypatch):
    """Return a function that tells whether the parser of a command accepts words; the command does not run."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self, words=None, namespace=None):
        parse_args(self, words, namespace)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)

    def call(words):
        with pytest.raises(Accepted):
            cli.main(words)
        return True

    return call


def test_architectures_are_those_that_export_writes():
    assert set(next_commands.GGUF_ARCHITECTURES) == set(gguf_architectures.ARCHITECTURES)


@pytest.mark.parametrize("is_adapter", [False, True])
@pytest.mark.parametrize(
    ("architecture", "form"), [("LlamaForCausalLM", "gguf"), ("NewForCausalLM", "vllm"), ("", "vllm")]
)
def test_commands_of_a_run_exist_and_fit_it(architecture, form, is_adapter, is_accepted):
    commands = next_commands.list_next_commands("runs/a b", is_adapter=is_adapter, architecture=architecture)
    names = [command.words[0] for command in commands]
    assert names == ["chat", *(["merge"] if is_adapter else []), "export", "serve"]
    assert commands[-2].words == ("export", "runs/a b", "--to", form)
    assert all(is_accepted(list(command.words)) for command in commands)


def test_last_screen_and_model_card_end_with_chat_export_and_serve(tmp_path_factory, tmp_path, capsys, is_accepted):
    runs = chat_runs.train_runs(tmp_path_factory)
    recipe = (runs / "lora.yaml").read_text(encoding="utf-8").replace(str(runs / "lora"), str(tmp_path / "it's"))
    (runs / "again.yaml").write_text(recipe, encoding="utf-8")
    capsys.readouterr()
    assert cli.main([str(runs / "again.yaml"), "train.max_steps=1", "evaluate=false", "train.save_steps=1"]) == 0
    screen = capsys.readouterr().out
    lines = screen[screen.index("Next: talk to the model") :].splitlines()
    commands = [shlex.split(line) for line in lines if " -m trl_sft " in line]
    assert [words[3] for words in commands] == ["chat", "merge", "export", "serve"]
    folder = str(tmp_path / "it's")
    for words in commands:
        assert words[4] == folder
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            assert is_accepted(words[3:])
    (curl,) = [line for line in lines if line.strip().startswith("curl ")]
    words = shlex.split(curl)
    assert json.loads(words[-1])["model"] == "it's"
    assert words[1] == f"http://{next_commands.DEFAULT_HOST}:{next_commands.DEFAULT_PORT}/v1/chat/completions"
    card = (tmp_path / "it's" / "README.md").read_text(encoding="utf-8")
    use = card[card.index("## Use") :]
    first = re.search(r"```(\w+)\n(.*?)```", use, re.DOTALL)
    assert first[1] == "sh"
    assert re.findall(r"^python -m trl_sft (\w+)", first[2], re.MULTILINE) == ["chat", "merge", "export", "serve"]
    assert curl.strip() in first[2]
