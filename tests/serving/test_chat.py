"""`chat`: prompts are those of training, answers those before and after training; the commands, and bad input."""

import dataclasses
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import chat_runs
import pytest
from chat_runs import SCHEMA
from conftest import QUESTIONS
from transformers import AutoTokenizer

from trl_sft import cli, errors
from trl_sft.serving import answers, session
from trl_sft.tokenization.thinking import ThoughtMarks

TURNS = [{"role": "user", "content": "What is 3 plus 3?"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return chat_runs.train_runs(tmp_path_factory)


@pytest.fixture(scope="module")
def chats(runs):
    return chat_runs.load_chats(runs)


@pytest.fixture
def ask(capsys):
    """Return a function that runs `chat` under `--json` and returns the object."""

    def call(*words):
        capsys.readouterr()
        code = cli.main(["chat", *map(str, words), "--json"])
        content = json.loads(capsys.readouterr().out)
        SCHEMA.validate(content)
        assert content["exit_code"] == code
        return content

    return call


def read_samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["full", "lora", "alpaca"])
def test_greedy_answers_equal_those_before_and_after_training(name, chats, runs):
    samples = read_samples(runs / name)
    assert len(samples) == 8
    questions = {row["question"] for row in QUESTIONS}
    for sample in samples:
        prompt = sample["prompt"]
        text = prompt[-1]["content"] if isinstance(prompt, list) else re.search(r"Instruction:\n(.*)\n", prompt)[1]
        assert text in questions
        rendered = chats[name].renderer.render(text)
        assert rendered.content == prompt
        assert chats[name].answer(rendered).text == sample["after"]
        assert chats[name].answer(rendered, side=answers.BASE).text == sample["before"]
    assert any(sample["before"] != sample["after"] for sample in samples)


def test_rendered_prompt_equals_the_generation_prompt_of_the_template(chats, runs):
    tokenizer = AutoTokenizer.from_pretrained(runs / "full")
    expected = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chats["full"].renderer.render(TURNS[0]["content"]).ids == expected
    alpaca = chats["alpaca"].renderer.render(TURNS[0]["content"])
    assert alpaca.ids == tokenizer(alpaca.content)["input_ids"]
    assert alpaca.content.endswith("### Response:")


def test_answer_ends_with_the_stop_token_of_training(chats):
    chat = chats["full"]
    stop = chat.tokenizer.eos_token_id
    stops = chat.config.eos_token_id if isinstance(chat.config.eos_token_id, list) else [chat.config.eos_token_id]
    assert stop in stops
    answer = chat.answer(chat.renderer.render(TURNS[0]["content"]))
    if answer.stop_reason == answers.STOP_TOKEN:
        assert answer.tokens[-1] in stops
    assert answer.stop_reason in (answers.STOP_TOKEN, answers.LIMIT)
    ending = dataclasses.replace(chat, config=type(chat.config)(**chat.config.to_diff_dict()))
    ending.config.eos_token_id = answer.tokens[0]  # whatever comes first ends the answer
    stopped = ending.answer(chat.renderer.render(TURNS[0]["content"]))
    assert (stopped.tokens, stopped.stop_reason) == (answer.tokens[:1], answers.STOP_TOKEN)


def test_next_prompt_follows_the_earlier_turns_and_the_system_prompt(chats, monkeypatch, capsys):
    chat = chats["full"]
    prompts = []

    def answer(self, prompt, **_):
        prompts.append(prompt)
        return answers.ChatAnswer("6", "a thought", answers.STOP_TOKEN, [1], 0.1)

    monkeypatch.setattr(answers.ChatModel, "answer", answer)
    talk = session.Session(chat, compares_base=False)
    lines = iter(["/system Be short.", "What is 3 plus 3?", "And 4?", "/reset", "Again"])
    talk.run(lambda _: next(lines, None) or raise_end())
    system = {"role": "system", "content": "Be short."}
    chat_turns = [system, *TURNS, {"role": "assistant", "content": "6"}, {"role": "user", "content": "And 4?"}]
    for prompt, turns in zip(
        prompts, [chat_turns[:2], chat_turns, [system, {"role": "user", "content": "Again"}]], strict=True
    ):
        expected = chat.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        assert prompt.ids == expected["input_ids"]
    assert "a thought" not in str(prompts[1].content)


def raise_end():
    raise EOFError


def test_ctrl_c_stops_the_answer_and_not_the_program(chats, capsys):
    chat = chats["full"]
    parts = []

    def interrupt(part):
        parts.append(part)
        if len(parts) == 1:
            raise errors.Interrupted

    prompt = chat.renderer.render(TURNS[0]["content"])
    whole = chat.answer(prompt, side=answers.BASE)
    answer = chat.answer(prompt, side=answers.BASE, show=interrupt)
    assert answer.stop_reason == answers.INTERRUPTED
    assert 0 < len(answer.tokens) < len(whole.tokens)
    assert answer.tokens == whole.tokens[: len(answer.tokens)]
    lines = iter([errors.Interrupted, "/exit"])

    def read(_):
        line = next(lines)
        if line is errors.Interrupted:
            raise line
        return line

    session.Session(chat, compares_base=False).run(read)
    assert "Ctrl-D or /exit ends the program." in capsys.readouterr().out


def test_full_context_names_reset_and_an_answer_that_meets_it_says_so(chats):
    prompt = chats["full"].renderer.render(TURNS[0]["content"])
    full = dataclasses.replace(chats["full"], positions=len(prompt.ids))
    with pytest.raises(errors.DataError, match="the context is full") as raised:
        full.answer(prompt)
    assert "/reset" in raised.value.faults[0].fix
    nearly = dataclasses.replace(chats["full"], positions=len(prompt.ids) + 1)
    answer = nearly.answer(prompt)
    assert (len(answer.tokens), answer.stop_reason) in [(1, answers.CONTEXT), (1, answers.STOP_TOKEN)]


def test_control_characters_of_prompt_and_answer_are_escaped(chats, monkeypatch, capsys):
    monkeypatch.setattr(
        answers.ChatModel,
        "answer",
        lambda self, prompt, side, show: (
            show("a\x1b[2Jb") or answers.ChatAnswer("a\x1b[2Jb", "", answers.STOP_TOKEN, [1], 0)
        ),
    )
    lines = iter(["hello \x1b]0;evil\x07", "/\x1b[2Jfoo", "/exit"])
    session.Session(chats["full"], compares_base=False).run(lambda _: next(lines))
    out = capsys.readouterr().out
    assert "a\\x1b[2Jb" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("parts", "is_open", "expected"),
    [
        (["<thi", "nk>\nfour", "</th", "ink>\n\n8"], False, ("(thinks) \nfour", "8")),
        (["four</think>", "\n\n8"], True, ("four", "8")),
        (["8 <think>"], False, ("", "8 <think>")),
        (["<thi"], False, ("", "<thi")),
    ],
)
def test_thought_is_shown_as_such_and_is_no_part_of_the_answer(parts, is_open, expected, capsys):
    marks = ThoughtMarks("<think>", "</think>", "")
    screen = session._AnswerScreen("tuned", SimpleNamespace(thoughts=marks), is_open=is_open)
    for part in parts:
        screen.show(part)
    screen.close()
    shown = capsys.readouterr().out
    thought, answer = expected
    assert (thought in shown, shown.rstrip().endswith(answer)) == (True, True)
    split = answers.split_thought(marks, is_open, "".join(parts))
    assert split == (thought.removeprefix("(thinks) ").strip(), answer)


def test_answer_for_a_program_has_both_sides(ask, runs):
    sample = read_samples(runs / "lora")[0]
    content = ask(runs / "lora", "--prompt", sample["prompt"][-1]["content"], "--against", "base")
    assert (content["answer"], content["base"]["answer"]) == (sample["after"], sample["before"])
    assert content["stop_reason"] in ("stop_token", "max_new_tokens")
    assert 0 < content["tokens"] <= 6
    assert content["prompt_tokens"] > 10


def test_checkpoint_and_folder_of_an_adapter_alone_answer(ask, runs, tmp_path):
    prompt = read_samples(runs / "lora")[0]["prompt"][-1]["content"]
    last = ask(runs / "lora", "--prompt", prompt)["answer"]
    assert ask(runs / "lora", "--prompt", prompt, "--at", 4)["answer"] == last
    shutil.copytree(runs / "lora", tmp_path / "adapter", ignore=shutil.ignore_patterns("run.json", "checkpoint-*"))
    assert ask(tmp_path / "adapter", "--prompt", prompt, "--max-new-tokens", 6)["answer"] == last
    (tmp_path / "open").mkdir()
    shutil.copytree(runs / "lora" / "checkpoint-2", tmp_path / "open" / "checkpoint-2")
    (tmp_path / "open" / "run.json").write_text('{"outcome": "running"}')
    (fault,) = ask(tmp_path / "open", "--prompt", prompt)["faults"]
    assert (fault["code"], "`--at 2`" in fault["fix"]) == ("chat.unfinished_run", True)
    assert ask(tmp_path / "open", "--prompt", prompt, "--at", 2)["ok"]


def test_changed_or_missing_base_is_refused(ask, runs, tmp_path):
    shutil.copytree(runs / "base", tmp_path / "base")
    shutil.copytree(runs / "lora", tmp_path / "lora")
    record = json.loads((tmp_path / "lora" / "run.json").read_text(encoding="utf-8"))
    adapter = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    record["inference"]["base"] = adapter["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "lora" / "run.json").write_text(json.dumps(record))
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(adapter))
    assert ask(tmp_path / "lora", "--prompt", "hi")["ok"]
    weights = next((tmp_path / "base").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert ask(tmp_path / "lora", "--prompt", "hi")["faults"][0]["code"] == "model.other_base"
    shutil.rmtree(tmp_path / "base")
    assert ask(tmp_path / "lora", "--prompt", "hi")["faults"][0]["code"] == "model.missing_base"


BAD = {
    "no folder": (["gone", "--prompt", "x"], "chat.no_model"),
    "no model": ([".", "--prompt", "x"], "chat.no_model"),
    "no step": (["full", "--prompt", "x", "--at", "3"], "chat.no_checkpoint"),
    "no prompt": (["full"], "run.bad_option"),
    "empty prompt": (["full", "--prompt", " "], "data.empty_value"),
    "no template": (["plain", "--prompt", "x"], "template.missing"),
    "no tokens": (["full", "--prompt", "x", "--max-new-tokens", "0"], "run.bad_option"),
    "no number": (["full", "--prompt", "x", "--temperature", "nan"], "run.bad_option"),
    "damaged": (["cut", "--prompt", "x"], "chat.unreadable_model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_fault(name, ask, runs, monkeypatch):
    words, code = BAD[name]
    monkeypatch.chdir(runs)
    if words[0] in ("plain", "cut") and not Path(words[0]).exists():
        shutil.copytree("full", words[0], ignore=shutil.ignore_patterns("run.json", "checkpoint-*", "chat_template*"))
        config = json.loads(Path("full/tokenizer_config.json").read_text(encoding="utf-8"))
        config.pop("chat_template", None)
        if words[0] == "plain":
            Path("plain/tokenizer_config.json").write_text(json.dumps(config))
        else:
            shutil.copytree("full", "cut", dirs_exist_ok=True)
            weights = Path("cut/model.safetensors")
            weights.write_bytes(weights.read_bytes()[:1000])
    content = ask(*words)
    assert (content["exit_code"], [fault["code"] for fault in content["faults"]]) == (2, [code])
    if name == "no step":
        assert "2, 4" in content["faults"][0]["problem"]


def test_system_prompt_is_refused_where_rows_are_no_chats(chats, capsys):
    lines = iter(["/system Be short.", "/exit"])
    session.Session(chats["alpaca"], compares_base=False).run(lambda _: next(lines))
    assert "the rows of this run have no system prompt" in capsys.readouterr().out


def test_session_in_a_terminal_takes_commands_and_saves(runs, tmp_path):
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "trl_sft", "chat", str(runs / "lora"), "--against", "base"]
    environment = os.environ | {"TERM": "dumb", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment, start_new_session=True
    )
    os.close(theirs)
    screen = ""
    try:
        for line in ("What is 3 plus 3?", "/system Be short.", "hello", "/save chat.json", "/reset", "/help"):
            screen += read_until(ours, "you> ")
            os.write(ours, line.encode() + b"\n")
        screen += read_until(ours, "you> ")
        # readline misses a signal that comes between its prompt and its wait for a key: press again, as people do
        for _ in range(60):
            process.send_signal(signal.SIGINT)
            if select.select([ours], [], [], 1)[0]:
                break
        screen += read_until(ours, "you> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    for words in ("tuned> ", "base> ", "a new chat begins with this system prompt", "wrote chat.json: 1 turn", "/exit"):
        assert words in screen
    assert "Ctrl-D or /exit ends the program." in screen
    saved = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert (saved["system"], [turn["prompt"] for turn in saved["turns"]]) == ("Be short.", ["hello"])
    assert set(saved["turns"][0]["base"]) == {"answer", "thought", "stop_reason", "tokens", "seconds"}


def read_until(descriptor, text):
    """Return what a terminal shows up to a text, which has to come within a minute."""
    shown, end = "", time.monotonic() + 60
    while text not in shown:
        assert select.select([descriptor], [], [], max(0, end - time.monotonic()))[0], shown
        shown += os.read(descriptor, 4096).decode(errors="replace")
    return shown
