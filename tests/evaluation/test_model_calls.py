"""Calls of a model: in order whatever arrives first, repeated within bounds, within a budget, and never made twice."""

import gc
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from model_server import Answer, Failure, ModelServer

from trl_sft import redaction
from trl_sft.errors import LaunchError
from trl_sft.evaluation.call_log import CallLog
from trl_sft.evaluation.endpoint import Endpoint
from trl_sft.evaluation.model_calls import CALLS, ERRORS, MONEY, CallLimits, ModelCaller, ModelRequest


def build_requests(number, **decoding):
    decoding = {"max_tokens": 10, "temperature": 0.0, "seed": 1} | decoding
    return [ModelRequest(f"row {n}", [{"role": "user", "content": f"say {n}"}], decoding) for n in range(number)]


def echo(request):
    return request["messages"][-1]["content"].removeprefix("say ")


@pytest.fixture
def call(tmp_path):
    """Return a function that sends requests to a server that answers so; it returns (answers, caller, server)."""

    def send(answer, requests, **limits):
        with ModelServer(answer) as server, CallLog(tmp_path / "calls.jsonl") as log:
            caller = ModelCaller(Endpoint(server.url, "m"), log, CallLimits(**{"first_wait": 0.001} | limits))
            answers = [None if found is None else found.text for found in caller.call(requests)]
        return answers, caller, server

    return send


def test_answers_come_in_the_order_of_requests_whatever_arrives_first(call):
    slow_first = [0.06, 0.04, 0.02, 0.0]
    answers, caller, server = call(
        lambda request: Answer(echo(request), seconds=slow_first[int(echo(request)) % 4]),
        build_requests(9),
        concurrent=4,
    )
    assert answers == list("012345678")
    assert server.most_at_once == 4
    assert caller.counts.describe() == {
        **{"made": 9, "saved": 0, "failed": 0, "not_made": 0, "unmetered": 0, "cost": 0.0},
        **{"input_tokens": 900, "output_tokens": 90},
    }


def test_each_request_is_sent_once_and_every_prompt_and_answer_is_kept(call, tmp_path):
    requests = build_requests(3)
    assert call(echo, [*requests, requests[0]])[0] == ["0", "1", "2", "0"]
    answers, caller, server = call(echo, requests)
    assert (answers, server.calls, caller.counts.saved, caller.counts.made) == (["0", "1", "2"], [], 3, 0)
    lines = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert sorted((line["name"], line["messages"][0]["content"], line["text"]) for line in lines) == [
        (f"row {n}", f"say {n}", str(n)) for n in range(3)
    ]
    other_seed, other_prompt = build_requests(1, seed=2), build_requests(4)[3:]
    assert len(call(echo, [*other_seed, *other_prompt])[2].calls) == 2
    with_schema = [ModelRequest("row 0", requests[0].messages, requests[0].decoding, {"type": "object"})]
    sent = call(echo, with_schema)[2].calls
    assert [body["response_format"]["json_schema"]["schema"] for body in sent] == [{"type": "object"}]


@pytest.mark.parametrize(
    ("first", "problem"),
    [
        (Failure(429, retry_after="0.01"), "429"),
        (Failure(500), "500"),
        (Failure(503, body="<html>busy</html>", content_type="text/html"), "503"),
        (Failure(200, body="not JSON"), ""),
        (Failure(200, body="hello", content_type="text/plain"), "protocol"),
        (Failure(200, body='{"object": "chat.completion", "choices": []}'), "protocol"),
        (Answer("late", seconds=0.5), "time limit"),
    ],
)
def test_what_fails_for_a_moment_is_repeated_within_bounds(call, tmp_path, first, problem):
    answers, caller, _ = call(
        lambda request: echo(request) if request["number"] else first, build_requests(1), seconds=0.2
    )
    assert (answers, caller.counts.made, caller.counts.failed) == (["0"], 2, 0)
    (tmp_path / "calls.jsonl").unlink()
    answers, caller, server = call(lambda _: first, build_requests(1), retries=1, seconds=0.05)
    assert (answers, len(server.calls), caller.counts.failed) == ([None], 2, 1)
    assert problem in caller.problems[0][1]
    assert problem in json.loads((tmp_path / "calls.jsonl").read_text())["problem"]


def test_request_that_the_server_refuses_is_not_repeated_and_others_go_on(call):
    answers, caller, server = call(
        lambda request: Failure(400) if echo(request) == "1" else echo(request), build_requests(3), concurrent=1
    )
    assert (answers, len(server.calls), caller.counts.failed, caller.stop) == (["0", None, "2"], 3, 1, "")


def test_calls_stop_after_errors_in_a_row(call):
    answers, caller, server = call(
        lambda request: Failure(500) if int(echo(request)) > 1 else echo(request),
        build_requests(20),
        concurrent=1,
        retries=0,
        errors_in_row=3,
    )
    assert answers == ["0", "1", *[None] * 18]
    assert (len(server.calls), caller.stop, caller.counts.failed, caller.counts.not_made) == (5, ERRORS, 3, 15)


def test_calls_that_fail_at_once_with_the_first_print_no_traceback(call, caplog, capsys):
    with pytest.raises(LaunchError, match="cannot be called: 401"):
        call(lambda _: Failure(401), build_requests(16), concurrent=16)
    gc.collect()  # asyncio prints then what nobody has read, with what the server said: some quote the key
    assert not any("never retrieved" in text for text in (caplog.text, *capsys.readouterr()))


@pytest.mark.parametrize("status", [401, 404])
def test_wrong_key_or_name_of_a_model_ends_at_the_first_call(call, status):
    with pytest.raises(LaunchError, match=f"cannot be called: {status}"):
        call(lambda _: Failure(status), build_requests(5), concurrent=1)


def test_absent_server_is_a_failure_that_costs_nothing(tmp_path):
    with ModelServer(echo) as server:
        url = server.url
    with CallLog(tmp_path / "calls.jsonl") as log:
        limits = CallLimits(first_wait=0.001, retries=1, errors_in_row=2, max_cost=1, input_price=1, output_price=1)
        caller = ModelCaller(Endpoint(url, "m"), log, limits)
        assert caller.call(build_requests(3)) == [None] * 3
    assert (caller.stop, caller.counts.cost, caller.counts.unmetered) == (ERRORS, 0.0, 0)


def test_refusal_of_the_model_is_an_answer_with_its_reason(tmp_path):
    with ModelServer(lambda _: Answer(None, refusal="I cannot judge this.")) as server:
        for _ in range(2):
            with CallLog(tmp_path / "calls.jsonl") as log:
                (answer,) = ModelCaller(Endpoint(server.url, "m"), log, CallLimits()).call(build_requests(1))
            assert (answer.text, answer.refusal) == ("", "I cannot judge this.")
    assert len(server.calls) == 1


def test_budget_of_calls_counts_attempts_that_failed_too(call):
    answers, caller, server = call(echo, build_requests(10), concurrent=4, max_calls=7)
    assert answers == [*"0123456", None, None, None]
    assert (len(server.calls), caller.stop, caller.counts.not_made) == (7, CALLS, 3)
    answers, caller, server = call(
        lambda _: Failure(500), build_requests(20)[10:], max_calls=6, retries=9, concurrent=2
    )
    assert (set(answers), len(server.calls), caller.stop) == ({None}, 6, CALLS)


def test_budget_of_money_is_never_exceeded_whatever_a_call_costs(call):
    prices = {"input_price": 10.0, "output_price": 100.0}
    limits = CallLimits(**prices)
    cost = limits.compute_cost(100, 10)
    assert cost == pytest.approx(0.002)
    answers, caller, _ = call(echo, build_requests(40), concurrent=4, max_cost=0.03, **prices)
    made = 40 - answers.count(None)
    assert answers == [*map(str, range(made)), *[None] * (40 - made)]
    assert caller.stop == MONEY
    assert caller.counts.cost == pytest.approx(made * cost)
    assert 0.03 - 0.006 < caller.counts.cost <= 0.03  # the most that one more call could cost is left over
    # a server that counts no tokens, and one that never answers: the upper bound counts
    _, caller, _ = call(lambda _: Answer("x", input_tokens=None), build_requests(60)[40:], max_cost=0.03, **prices)
    assert caller.counts.cost <= 0.03
    assert caller.counts.unmetered == caller.counts.made > 1
    _, caller, _ = call(
        lambda _: Answer("x", seconds=0.3), build_requests(80)[60:], max_cost=0.03, seconds=0.05, retries=1, **prices
    )
    assert 0 < caller.counts.cost <= 0.03


def test_budget_of_money_without_prices_is_refused(tmp_path):
    with CallLog(tmp_path / "calls.jsonl") as log, pytest.raises(LaunchError, match="needs the prices"):
        ModelCaller(Endpoint("http://127.0.0.1:1/v1", "m"), log, CallLimits(max_cost=1.0, input_price=1.0))


def test_log_of_another_process_is_refused(tmp_path):
    with CallLog(tmp_path / "calls.jsonl"), pytest.raises(LaunchError, match="another process writes"):
        CallLog(tmp_path / "calls.jsonl")


def test_half_a_last_line_is_removed_and_its_call_made_again(call, tmp_path):
    path = tmp_path / "calls.jsonl"
    call(echo, build_requests(3), concurrent=1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    answers, _, server = call(echo, build_requests(3))
    assert (answers, [echo(body) for body in server.calls]) == (["0", "1", "2"], ["2"])
    assert path.read_bytes() == whole
    path.write_bytes(b"no JSON\n" + whole + b'{"key": 1}\n[]\n' + b"{" * 200_000)  # other damage is passed over
    assert call(echo, build_requests(3))[2].calls == []
    assert path.read_bytes() == b"no JSON\n" + whole + b'{"key": 1}\n[]\n'


def test_calls_that_follow_quickly_share_one_confirmation_of_the_disk(call, tmp_path, monkeypatch):
    confirmed = []
    monkeypatch.setattr(os, "fsync", lambda file: confirmed.append(os.fstat(file).st_size))
    monkeypatch.setattr("trl_sft.evaluation.call_log._SYNC_SECONDS", 60.0)
    call(echo, build_requests(20))
    assert len(confirmed) == 2  # at the first answer, and at the end
    assert confirmed[-1] == (tmp_path / "calls.jsonl").stat().st_size


CALLER = """
import json, sys
from trl_sft.evaluation.call_log import CallLog
from trl_sft.evaluation.endpoint import Endpoint
from trl_sft.evaluation.model_calls import CallLimits, ModelCaller, ModelRequest
from pathlib import Path
decoding = {"max_tokens": 10, "temperature": 0.0, "seed": 1}
requests = [ModelRequest(f"row {n}", [{"role": "user", "content": f"say {n}"}], decoding) for n in range(12)]
with CallLog(Path(sys.argv[2])) as log:
    ModelCaller(Endpoint(sys.argv[1], "m"), log, CallLimits(concurrent=2)).call(requests)
"""


def test_killed_process_leaves_exactly_the_calls_that_are_missing(call, tmp_path):
    path = tmp_path / "calls.jsonl"

    def answer(request):
        return Answer(echo(request), seconds=60 if request["number"] >= 7 else 0)

    with ModelServer(answer) as server:
        process = subprocess.Popen([sys.executable, "-c", CALLER, server.url, str(path)])
        deadline = time.monotonic() + 60
        while server.running < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        stored = {json.loads(line)["text"] for line in path.read_text().splitlines()}
    assert len(stored) == 7
    answers, _, server = call(echo, build_requests(12))
    assert answers == [str(n) for n in range(12)]
    assert {echo(body) for body in server.calls} == {str(n) for n in range(12)} - stored
    assert len(server.calls) == 5


def test_secrets_do_not_reach_the_log_and_answers_are_the_same_from_it(call, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-abcdefghijklmnop1234")
    redaction._known.clear()
    first = call(lambda _: "the key is sk-abcdefghijklmnop1234", build_requests(1))[0]
    assert "sk-abcdefghijklmnop1234" not in (tmp_path / "calls.jsonl").read_text()
    assert call(echo, build_requests(1))[0] == first
