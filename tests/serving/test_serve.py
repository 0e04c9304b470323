"""`serve`: the official client gets the answers of `chat`; what a request may say; start, end, and bad input."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import chat_runs
import openai
import pytest
from chat_runs import SCHEMA
from conftest import QUESTIONS

from trl_sft import cli
from trl_sft.cli import serve as serve_command
from trl_sft.evaluation import generate
from trl_sft.publishing import next_commands
from trl_sft.serving import answers
from trl_sft.serving.server import address, app, parts, process, request
from trl_sft.tokenization.thinking import ThoughtMarks

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "serve.md"
EXAMPLE = re.search(r"<!-- example: serve -->\n```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
PAGE_WORDS = [line.split()[0] for line in EXAMPLE.splitlines()]
PROMPT = "What is 3 plus 3?"
LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def serving(chat, name):
    """Serve a model; yield the official client and the service."""
    service = app.AnswerService(chat, name)
    with address.bind(LOOPBACK, 0) as listener, process.run(service, listener, LOOPBACK):
        url = address.format_url(LOOPBACK, address.get_port(listener))
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield client, service


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return chat_runs.train_runs(tmp_path_factory)


@pytest.fixture(scope="module")
def chats(runs):
    return chat_runs.load_chats(runs)


@pytest.fixture(scope="module")
def clients(chats):
    """Return a client for each of the models, which are served at once."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(serving(chat, name))[0] for name, chat in chats.items()}


def ask(client, name, content=PROMPT, **options):
    """Return the completion of a prompt."""
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    return client.chat.completions.create(model=name, messages=messages, **options)


@pytest.mark.parametrize("name", ["full", "lora", "alpaca"])
def test_official_client_gets_the_answers_of_chat(name, clients, chats):
    chat = chats[name]
    for row in QUESTIONS[:2]:
        prompt = chat.renderer.render(row["question"])
        expected = chat.answer(prompt)
        assert expected.text
        completion = ask(clients[name], name, row["question"])
        choice = completion.choices[0]
        assert choice.message.content == expected.text
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (
            len(prompt.ids),
            len(expected.tokens),
        )
        assert choice.finish_reason == {"stop_token": "stop", "max_new_tokens": "length"}[expected.stop_reason]
        chunks = list(ask(clients[name], name, row["question"], stream=True, stream_options={"include_usage": True}))
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        assert "".join(choice.delta.content or "" for choice in choices) == expected.text
        assert choices[-1].finish_reason == choice.finish_reason
        assert chunks[-1].usage == completion.usage


def test_turns_and_special_tokens_are_rendered_as_in_training(clients, chats):
    chat = chats["full"]
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "What is 1 plus 1?"}]},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": PROMPT},
    ]
    plain = [*turns[:1], {"role": "user", "content": "What is 1 plus 1?"}, *turns[2:]]
    expected = chat.tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat.renderer.render_request(turns).ids == expected
    assert ask(clients["full"], "full", turns).usage.prompt_tokens == len(expected)
    turns[0]["role"] = "developer"
    assert ask(clients["full"], "full", turns).usage.prompt_tokens == len(expected)
    with pytest.raises(openai.BadRequestError, match="special token of this tokenizer"):
        ask(clients["full"], "full", f"What is {chat.tokenizer.eos_token} plus 3?")


def test_request_sets_limit_stop_and_sampling(clients, chats):
    client, whole = clients["full"], chats["full"].answer(chats["full"].renderer.render(PROMPT))
    assert len(whole.tokens) > 2
    short = ask(client, "full", max_tokens=1).choices[0]
    assert (short.finish_reason, whole.text.startswith(short.message.content)) == ("length", True)
    assert ask(client, "full", max_completion_tokens=1).choices[0] == short
    stop = whole.text.strip()[1:3]
    expected = whole.text[: whole.text.index(stop)]
    cut = ask(client, "full", stop=stop).choices[0]
    assert (cut.message.content, cut.finish_reason) == (expected, "stop")
    chunks = [chunk.choices[0] for chunk in ask(client, "full", stop=[stop], stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].finish_reason == "stop"
    sampled = [ask(client, "full", temperature=5, top_p=0.9, seed=seed).choices[0] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert len({ask(client, "full", temperature=9).choices[0].message.content for _ in range(4)}) > 1
    assert (
        ask(client, "full", temperature=0, top_p=1, n=1, frequency_penalty=0).choices[0].message.content == whole.text
    )


REFUSED = {
    "unknown key": ({"temprature": 1}, "Did you mean `temperature`?"),
    "two answers": ({"n": 2}, "`n` has no effect here"),
    "tools": ({"tools": [{"type": "function"}]}, "export RUN --to vllm"),
    "format": ({"response_format": {"type": "json_object"}}, "Leave out `response_format`"),
    "no tokens": ({"max_tokens": 0}, "`max_tokens`"),
    "text for a number": ({"temperature": "hot"}, "`temperature`"),
    "greedy with top_k": ({"top_k": 5}, "`temperature` above 0"),
    "no turn": ({"messages": []}, "`messages`"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
    "answer last": ({"messages": [{"role": "assistant", "content": "x"}]}, "Remove the last turn"),
    "empty prompt": ({"messages": [{"role": "user", "content": ""}]}, "."),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image"),
    "another model": ({"model": "gpt-5"}, "Write `full`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_effect_is_refused_and_never_ignored(name, clients):
    values, words = REFUSED[name]
    body = {"model": "full", "messages": [{"role": "user", "content": PROMPT}]} | values
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            clients["full"].post("/chat/completions", body=body | {"stream": stream}, cast_to=object)
        assert caught.value.status_code == (404 if name == "another model" else 400)
        assert words in caught.value.body["message"]


def test_turns_where_rows_are_no_chats_are_refused(clients):
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": PROMPT}]
    with pytest.raises(openai.BadRequestError, match="Send one user turn"):
        ask(clients["alpaca"], "alpaca", turns)


def test_full_context_is_an_error_of_the_request(chats):
    with serving(dataclasses.replace(chats["full"], positions=10), "full") as (client, _):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="the context is full"):
                ask(client, "full", stream=stream)


def test_page_of_the_web_cannot_send_a_request(clients):
    data = json.dumps({"messages": [{"role": "user", "content": PROMPT}]}).encode()
    sent = urllib.request.Request(f"{clients['full'].base_url}chat/completions", data, {"Content-Type": "text/plain"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(sent)
    assert "Content-Type: application/json" in json.load(caught.value)["error"]["message"]
    caught.value.close()
    models = clients["full"].models.list().data
    assert [model.id for model in models] == ["full"]
    assert clients["full"].models.retrieve("full").owned_by == "trl_sft"
    with pytest.raises(openai.NotFoundError, match="is not served"):
        clients["full"].embeddings.create(model="full", input="x")


@pytest.mark.parametrize(
    ("generated", "is_open", "expected"),
    [
        ("<think>\nfour plus\nfour\n</think>\n\n8", False, ("four plus\nfour", "8")),
        ("four</think>\n\n8 </think>", True, ("four", "8 </think>")),
        ("<think>four</think>8", True, ("four", "8")),
        ("8 <think>", False, ("", "8 <think>")),
        ("<thi", False, ("", "<thi")),
        ("no end of the <b>thought", True, ("no end of the <b>thought", "")),
        ("8 END of it", False, ("", "8 ")),
        ("8 EN", False, ("", "8 EN")),
    ],
)
def test_stream_has_thought_and_answer_of_the_whole_text(generated, is_open, expected):
    marks = ThoughtMarks("<think>", "</think>", "")
    for size in (1, 2, 5, 100):
        splitter = parts.PartSplitter(marks, is_open=is_open, stops=["END"])
        sent = [splitter.take(generated[start : start + size]) for start in range(0, len(generated), size)]
        sent.append(splitter.finish(*answers.split_thought(marks, is_open, generated)))
        assert ("".join(part.thought for part in sent), "".join(part.text for part in sent)) == expected


def test_thought_is_reasoning_content_and_no_part_of_the_answer(chats, monkeypatch):
    marks = ThoughtMarks("<think>", "</think>", "")

    def answer(self, prompt, show, is_cancelled):
        for part in ("<think>", "three and three", "</think>\n\n", "6"):
            if show is not None:
                show(part)
        return answers.ChatAnswer("6", "three and three", generate.STOP_TOKEN, [1, 2], 0.1)

    monkeypatch.setattr(answers.ChatModel, "answer", answer)
    monkeypatch.setattr(answers.ChatModel, "thoughts", marks)
    with serving(chats["full"], "full") as (client, _):
        message = ask(client, "full").choices[0].message
        assert (message.content, message.reasoning_content) == ("6", "three and three")
        deltas = [chunk.choices[0].delta for chunk in ask(client, "full", stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == "6"
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "three and three"


def test_answer_ends_when_the_client_goes_or_the_server_stops(chats, monkeypatch):
    ended = threading.Semaphore(0)

    def answer(self, prompt, show, is_cancelled):
        """Generate until somebody ends it."""
        end = time.monotonic() + 60
        while not is_cancelled() and time.monotonic() < end:
            if show is not None:
                show("word ")
            time.sleep(0.01)
        ended.release()
        return answers.ChatAnswer("", "", answers.INTERRUPTED, [1], 0.1)

    monkeypatch.setattr(answers.ChatModel, "answer", answer)
    began = time.monotonic()
    with serving(chats["full"], "full") as (client, service):
        stream = ask(client, "full", stream=True)
        assert next(iter(stream)).choices[0].delta.role == "assistant"
        stream.close()
        assert ended.acquire(timeout=20)
        with pytest.raises(openai.APITimeoutError):
            ask(client, "full", timeout=0.3)
        assert ended.acquire(timeout=20)
        waiting = ask(client, "full", stream=True)
        next(iter(waiting))
    assert ended.acquire(timeout=1)
    assert service.counts.requests == 0
    assert time.monotonic() - began < 30


def test_error_of_the_model_is_told_and_the_server_goes_on(chats, monkeypatch, capsys):
    def fail(self, prompt, show, is_cancelled):
        raise RuntimeError("CUDA out of memory")

    whole = chats["full"].answer(chats["full"].renderer.render(PROMPT))
    with serving(chats["full"], "full") as (client, _):
        with monkeypatch.context() as patch:
            patch.setattr(answers.ChatModel, "answer", fail)
            with pytest.raises(openai.InternalServerError, match="out of memory"):
                ask(client, "full")
        assert ask(client, "full").choices[0].message.content == whole.text
    assert "a request failed: RuntimeError: CUDA out of memory" in capsys.readouterr().err


def serve_once(words, use, capsys):
    """Run `serve` in this process until `use`, called once it is ready, returns; return exit code and output."""
    is_running, screen, failures = threading.Event(), [], []
    is_running.set()
    print_line = next_commands.format_curl

    def format_curl(body, url):
        screen.append((url, body, print_line(body, url)))
        return screen[-1][2]

    def act():
        end = time.monotonic() + 120
        while not screen and is_running.is_set() and time.monotonic() < end:
            time.sleep(0.05)
        try:
            if screen:
                use(*screen[0])
        except BaseException as error:
            failures.append(error)
        if is_running.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=act)
    thread.start()
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(next_commands, "format_curl", format_curl)
        try:
            code = cli.main(["serve", *map(str, words)])
        finally:
            is_running.clear()
            thread.join()
    if failures:
        raise failures[0]
    return code, capsys.readouterr()


def test_command_prints_a_curl_line_that_answers_as_chat_and_ends_on_a_signal(runs, capsys):
    cli.main(["chat", str(runs / "lora"), "--prompt", PROMPT, "--json"])
    expected = json.loads(capsys.readouterr().out)
    answered = {}

    def use(url, body, line):
        shown = subprocess.run(["bash", "-c", f"{line} --silent"], check=True, capture_output=True, text=True)
        answered["curl"] = json.loads(shown.stdout)["choices"][0]["message"]["content"]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            answered["client"] = ask(client, "lora").choices[0].message.content

    code, output = serve_once([runs / "lora", "--port", 0, "--json"], use, capsys)
    content = json.loads(output.out)
    SCHEMA.validate(content)
    assert (code, content["ok"], content["signal"], content["requests"]) == (0, True, "SIGTERM", 3)
    assert answered == {"curl": content["first_request"]["answer"], "client": expected["answer"]}
    assert content["first_request"]["prompt"] in {row["question"] for row in QUESTIONS}  # a held-out one
    screen = output.err[output.err.index("model  ") :].splitlines()
    assert [line.split()[0] for line in screen] == [*PAGE_WORDS, "request", "request", "stopped"]
    for words in ("adapter of", "greedy, at most 6 tokens", "a first request:", "tokens/s", "Ctrl-C ends the server"):
        assert words in output.err
    host, _, port = content["endpoint"].removeprefix("http://").removesuffix("/v1").partition(":")
    with pytest.raises(ConnectionRefusedError), socket.create_connection((host, int(port))):
        pass  # nothing is left


BAD = {
    "no folder": (["gone"], "chat.no_model"),
    "no model": (["."], "chat.no_model"),
    "no step": (["full", "--at", "3"], "chat.no_checkpoint"),
    "no port": (["full", "--port", "70000"], "run.bad_option"),
    "no host": (["full", "--host", "192.0.2.7", "--port", "0"], "serve.bad_address"),
    "unfinished": (["open"], "chat.unfinished_run"),
    "base is gone": (["orphan"], "model.missing_base"),
    "no package": (["full"], "package.missing"),
    "port in use": (["full"], "serve.port_in_use"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_fault(name, runs, tmp_path, monkeypatch, capsys):
    words, code = BAD[name]
    monkeypatch.chdir(runs if words[0] in ("full", "gone", ".") else tmp_path)
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        if name == "unfinished":
            shutil.copytree(runs / "full" / "checkpoint-2", tmp_path / "open" / "checkpoint-2")
            (tmp_path / "open" / "run.json").write_text('{"outcome": "running"}')
        if name == "base is gone":
            shutil.copytree(runs / "lora", tmp_path / "orphan")
            record = json.loads((tmp_path / "orphan" / "adapter_config.json").read_text(encoding="utf-8"))
            record["base_model_name_or_path"] = str(tmp_path / "nothing")
            (tmp_path / "orphan" / "adapter_config.json").write_text(json.dumps(record))
        if name == "no package":
            monkeypatch.setattr(serve_command, "_PACKAGES", ("uvicorn", "no_such_package"))
        if name == "port in use":
            words = [*words, "--port", str(port)]
        capsys.readouterr()
        exit_code = cli.main(["serve", *words, "--json"])
        (fault,) = json.loads(capsys.readouterr().out)["faults"]
    assert (exit_code, fault["code"]) == (2, code)
    if name == "no package":
        assert fault["fix"] == "Run: pip install 'trl-sft[serve]'"
    if name == "port in use":
        assert str(port) in fault["problem"]
        free = int(re.fullmatch(r"Write `--port (\d+)`\.", fault["fix"])[1])
        assert free > port
    if name == "unfinished":
        assert "`--at 2`" in fault["fix"]


@pytest.mark.parametrize(
    ("host", "is_loopback", "url"),
    [
        ("127.0.0.1", True, "http://127.0.0.1:8000"),
        ("localhost", True, "http://localhost:8000"),
        ("::1", True, "http://[::1]:8000"),
        ("0.0.0.0", False, "http://127.0.0.1:8000"),
        ("::", False, "http://[::1]:8000"),
        ("192.0.2.7", False, "http://192.0.2.7:8000"),
    ],
)
def test_address_is_told_as_it_is_reached(host, is_loopback, url):
    assert (address.is_loopback(host), address.format_url(host, 8000)) == (is_loopback, url)


def test_other_host_is_told_before_the_model_is_loaded(runs, monkeypatch, capsys):
    monkeypatch.setattr(serve_command, "_serve", lambda *_: 0)
    assert cli.main(["serve", str(runs / "full"), "--port", "0", "--host", "0.0.0.0"]) == 0
    assert "0.0.0.0 is reached from other machines, and no password is asked for" in capsys.readouterr().err


def test_first_request_that_fails_is_a_fault(runs, monkeypatch, capsys):
    def fail(self, prompt, show, is_cancelled):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(answers.ChatModel, "answer", fail)
    assert cli.main(["serve", str(runs / "full"), "--port", "0", "--json"]) == 2
    (fault,) = json.loads(capsys.readouterr().out)["faults"]
    assert (fault["code"], "no kernel image" in fault["problem"]) == ("serve.first_request", True)


def test_config_of_a_request_leaves_that_of_the_run(chats):
    own = chats["full"].config
    before = own.to_dict()
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "temperature": 0.5, "stop": "x"}
    config = request.choose_config(own, request.read_request(body))
    assert (config.max_new_tokens, config.do_sample, config.temperature, config.stop_strings) == (3, True, 0.5, ["x"])
    assert own.to_dict() == before
    assert SimpleNamespace(**before).max_new_tokens == 6
