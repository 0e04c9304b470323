"""A path that cannot be used is refused before it is opened, wherever it enters: no traceback, no waiting."""

import json
import os
import shutil
import signal
import socket

import pytest

from trl_sft import cli, errors, load_recipe, user_paths
from trl_sft.recipe import folder_decision
from trl_sft.recipe.paths import EMBEDDED

RECIPE = """\
model: {name_or_path: "trl_sft:tiny"}
data: {train: {path: rows.jsonl, format: question_answer}}
train: {output_dir: out, max_steps: 2}
"""
LONG = "a" * 300
KINDS = {  # what a user writes -> the code of the fault
    "pipe": "path.special_file",
    "/dev/zero": "path.special_file",
    "socket": "path.special_file",
    "loop1": "path.link_loop",
    "loop1/x.yaml": "path.link_loop",
    LONG: "path.too_long",
    f"{'a/' * 2500}b": "path.too_long",
    "rows.jsonl/x": "path.is_file",
    "half\udc00\ud800": "path.invalid_character",
}
# commands with a path, for which `{}` stands; the first code is of the path itself
COMMANDS = {
    "check": ["check", "{}", "--fast"],
    "train": ["{}"],
    "preview": ["preview", "{}"],
    "prepare": ["prepare", "{}"],
    "explain": ["explain", "train.packing", "{}"],
    "fix": ["fix", "{}", "--fast"],
    "fix -o": ["fix", "recipe.yaml", "-o", "{}", "--fast"],
    "import": ["import", "axolotl", "{}"],
    "import -o": ["import", "axolotl", "settings.yaml", "-o", "{}"],
    "import --dataset-info": ["import", "llamafactory", "settings.yaml", "--dataset-info", "{}"],
    "init model": ["init", "{}", "rows.jsonl", "-o", "new.yaml"],
    "init data": ["init", "trl_sft:tiny", "{}", "-o", "new.yaml"],
    "init -o": ["init", "trl_sft:tiny", "rows.jsonl", "-o", "{}"],
    "report": ["report", "{}"],
    "runs": ["runs", "{}"],
    "judge": ["judge", "{}", "-o", "page.html"],
    "judge -o": ["judge", ".", "-o", "{}"],
    "votes key": ["votes", "{}", "votes.json"],
    "schema -o": ["schema", "-o", "{}"],
}
KEYS = ("model.name_or_path", "data.train.path", "data.eval", "tokenizer.chat_template", "train.output_dir")
KEYS += ("train.accelerator_config", "run.resume", "model.cache_dir", "tokenizer.cache_dir", "data.train.cache_dir")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a recipe, and with what is no ordinary file."""
    folder = tmp_path_factory.mktemp("paths")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "settings.yaml").write_text("base_model: a/b\nmodel_name_or_path: a/b\n")
    (folder / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n' * 4)
    (folder / "loop1").symlink_to("loop2")
    (folder / "loop2").symlink_to("loop1")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        descriptor = os.open(folder, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{descriptor}/socket")  # the path of a socket is short
        os.close(descriptor)
    return folder


@pytest.fixture
def answer(folder, monkeypatch, capsys):
    """Return a function that runs a command with a limit of time, and returns its exit code and its JSON answer."""
    monkeypatch.chdir(folder)

    def give_up(*_):
        raise AssertionError("the command waits")

    before = signal.signal(signal.SIGALRM, give_up)

    def run(*arguments):
        signal.alarm(20)
        code = cli.main([*arguments, "--json"])
        signal.alarm(0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, json.loads(out)

    yield run
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_path_that_cannot_be_used(command, answer):
    for path, expected in KINDS.items():
        code, values = answer(*[word.replace("{}", path) for word in COMMANDS[command]])
        assert code == 2, path[:40]
        assert [fault["code"] for fault in values["faults"]] == [expected], path[:40]
        assert values["faults"][0]["fix"]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_with_a_path_refuses_one_that_cannot_be_used(key, answer):
    for path, expected in [*KINDS.items(), ('"\\0"', "path.invalid_character")]:
        if path.startswith("half"):
            continue  # a recipe takes no half of a character, whatever its key
        code, values = answer("check", "recipe.yaml", "--fast", f"{key}={path}")
        assert code == 2, path[:40]
        assert expected in [fault["code"] for fault in values["faults"]], (path[:40], values["faults"])
        assert all(fault["where"]["key"] == key.split(".") for fault in values["faults"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "the file is no JSON"),
        ("[" * 100_000, "the file is no JSON"),
        ("[1]", "the file holds no JSON object"),
        ('{"split_batchs": true}', "does not take split_batchs"),
        ('{"split_batches": "often"}', "does not take split_batches"),
        ('{"split_batches": false}', ""),
    ],
)
def test_json_file_of_accelerator_config_is_checked_as_its_mapping_is(content, problem, answer, folder):
    (folder / "accelerator.json").write_text(content)
    code, values = answer("check", "recipe.yaml", "--fast", "train.accelerator_config=accelerator.json")
    assert code == (2 if problem else 0)
    assert problem in "".join(fault["problem"] for fault in values["faults"])


def test_pipe_in_a_model_or_a_run_folder_is_not_waited_for(answer, folder):
    shutil.copytree(EMBEDDED / "tiny", folder / "model")
    os.mkfifo(folder / "model" / "special_tokens_map.json")
    code, values = answer("check", "recipe.yaml", "--fast", "model.name_or_path=model")
    assert code == 2
    assert values["faults"][0]["problem"] == "special_tokens_map.json: this is a named pipe, not a file or a folder"
    run = folder / "run"
    run.mkdir()
    os.mkfifo(run / "run.json")
    with pytest.raises(errors.RecipeError, match="holds files that are not a run"):
        folder_decision.check_folder(load_recipe("recipe.yaml", ["train.output_dir=run"]))
    assert answer("report", "run")[0] == 2
    (run / "run.json").unlink()
    (run / "run.json").write_text('{"outcome": "done"}')
    os.mkfifo(run / "log.jsonl")
    assert answer("report", "run", "-o", "page.html")[0] == 0


def test_output_is_never_written_over_a_device(answer):
    code, values = answer("schema", "-o", "/dev/null")
    assert (code, values["faults"][0]["code"]) == (2, "path.special_file")


def test_path_that_can_be_used_or_is_not_there_has_no_problem(folder):
    assert user_paths.find_problem(folder, user_paths.FOLDER) is None
    assert user_paths.find_problem(folder / "recipe.yaml", user_paths.FILE) is None
    assert user_paths.find_problem(folder / "absent" / "deeper", user_paths.FILE) is None
    assert user_paths.find_problem(folder / ("é" * 127), user_paths.FILE) is None  # 254 bytes
    assert user_paths.find_problem(folder / ("é" * 128), user_paths.FILE).code == "path.too_long"
    assert user_paths.find_problem(folder, user_paths.FILE).code == "path.is_folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_path_without_permission_is_refused(tmp_path):
    (tmp_path / "locked").touch(mode=0)
    assert user_paths.find_problem(tmp_path / "locked", user_paths.FILE).code == "path.unreadable"
