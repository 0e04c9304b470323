"""`build` against a scripted model server: the same bytes in any order, resumed to the call, within its budget."""

import asyncio
import hashlib
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import forks
import pytest
from scripted_model import Reply, ScriptedServer, make_chance, name_step, write

from trl_sft import cli
from trl_sft.building import output

SPEC = """\
plan: {rows: 12}
seeds: {topics: {nature: [rivers, trees], crafts: [bread, chairs]}}
axes:
  task: {question: 2, summary: 1}
  domain: [nature, crafts]
  difficulty: [easy, hard]
generator: {endpoint: URL, model: writer, concurrent: 4, first_wait: 0.01, retries: 3, seconds: 2}
augmentation: {}
output: {folder: set, eval_fraction: 0.25}
"""


@pytest.fixture
def build(here, capsys, monkeypatch):
    """Return a function that builds SPEC with changes and returns the JSON answer."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # 10 ms a call on a busy disk

    def call(server, *overrides, spec=SPEC):
        (here / "spec.yaml").write_text(spec.replace("URL", server.url), encoding="utf-8")
        capsys.readouterr()
        cli.main(["build", "spec.yaml", *overrides, "--json"])
        return json.loads(capsys.readouterr().out)

    return call


def read(name):
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def hash_files(folder):
    names = ("train.jsonl", "eval.jsonl", "rejects.jsonl")
    return {name: hashlib.sha256(Path(folder, name).read_bytes()).hexdigest() for name in names}


def test_set_has_its_quotas_its_provenance_and_its_card(build):
    with ScriptedServer(write) as server:
        content = build(server)
    assert content["ok"], content["faults"]
    train, held_out = read("set/train.jsonl"), read("set/eval.jsonl")
    parents = [row for row in train + held_out if not row["provenance"]["parent"]]
    assert len(parents) == content["rows"]["taken"] == 12
    assert len(held_out) == 3
    assert not content["partial"]
    assert content["shortfalls"] == []
    assert Counter(row["task"] for row in parents) == {"question": 8, "summary": 4}
    assert Counter(row["provenance"]["cell"]["family"] for row in parents) == dict.fromkeys(
        ("basic", "multi_turn", "task", "chain_of_thought"), 3
    )
    for row in train + held_out:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert row["provenance"]["generator"] == "writer"
        assert len(row["provenance"]["template_sha256"]) == 12
    parts = {row["id"]: part for part, rows in (("train", train), ("eval", held_out)) for row in rows}
    children = [row for row in train + held_out if row["provenance"]["parent"]]
    assert children
    assert all(parts[row["provenance"]["parent"]] == parts[row["id"]] == "train" for row in children)
    assert len(train) <= 2 * 9
    card = Path("set/README.md").read_text(encoding="utf-8")
    assert "PARTIAL" not in card
    for file in content["files"].values():
        assert file["sha256"] in card


def test_same_seed_gives_the_same_bytes_whatever_the_order_of_answers(build):
    def write_slowly(request):
        return Reply(write(request), wait=make_chance(request).random() * 0.02)

    with ScriptedServer(write) as server:
        build(server)
    with ScriptedServer(write_slowly) as server:
        build(server, "output.folder=again", "generator.concurrent=3")
        build(server, "output.folder=other", "plan.seed=1")
    assert hash_files("set") == hash_files("again")
    assert hash_files("set")["train.jsonl"] != hash_files("other")["train.jsonl"]


@pytest.mark.long
def test_killed_build_makes_exactly_the_missing_calls_and_the_same_set(build, here):
    with ScriptedServer(write) as server:
        whole = build(server, "output.folder=whole")["calls"]["all"]
    with ScriptedServer(lambda request: Reply(write(request), wait=0.02)) as server:
        (here / "spec.yaml").write_text(SPEC.replace("URL", server.url), encoding="utf-8")
        process = forks.start(here, "build", "spec.yaml")
        while server.answered < 12:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = len(read("set/calls.jsonl"))
    assert 0 < done < whole
    with ScriptedServer(write) as server:
        build(server)
        assert len(server.requests) == whole - done
        build(server)
        assert len(server.requests) == whole - done
    assert hash_files("set") == hash_files("whole")


def test_budget_of_calls_stops_the_build_and_labels_what_there_is(build):
    with ScriptedServer(write) as server:
        content = build(server, "budget.calls=17")
        assert len(server.requests) == 17
        assert content["partial"]
        assert content["stop"] == "calls"
        assert build(server, "budget.calls=17")["rows"] == content["rows"]  # earlier processes count
        assert len(server.requests) == 17
        assert "PARTIAL" in Path("set/README.md").read_text(encoding="utf-8")
        assert content["shortfalls"]
        whole = build(server)
        assert not whole["partial"]
        assert len(server.requests) == whole["calls"]["in_file"]  # exactly the missing calls were made
        build(server, "output.folder=fresh")
    assert hash_files("set") == hash_files("fresh")


def test_budget_of_money_is_never_exceeded(build):
    prices = ("generator.input_price=1000", "generator.output_price=1000", "generator.max_tokens=100")
    with ScriptedServer(write) as server:
        content = build(server, "budget.money=3", *prices)
        assert content["stop"] == "money"
        assert 0 < content["calls"]["money"] <= 3
        assert len(server.requests) < 40


def test_errors_of_the_server_are_repeated_and_a_dead_server_ends_the_build(build):
    seen = Counter()

    def fail_first(request):
        key = json.dumps(request, sort_keys=True)
        seen[key] += 1
        if seen[key] > 2:
            return write(request)
        faults = [
            Reply(status=429),
            Reply(status=500),
            Reply(raw=b"junk"),
            Reply(raw=b'{"choices": []}'),
            Reply(wait=1),
        ]
        return faults[make_chance(request).randrange(5)]

    with ScriptedServer(fail_first) as server:
        content = build(server, "plan.rows=4", "augmentation=null", "generator.seconds=0.3")
        assert content["rows"]["taken"] == 4
        assert len(server.requests) == 3 * content["calls"]["in_file"]
    with ScriptedServer(lambda _: Reply(status=503)) as server:
        few = build(server, "output.folder=few", "plan.rows=2")
        assert [fault["code"] for fault in few["faults"]] == ["evaluation.endpoint_failed"]
        earlier = hash_files("set")
        again = build(server, "plan.rows=2", "plan.seed=99", "augmentation=null")
        assert [fault["code"] for fault in again["faults"]] == ["evaluation.endpoint_failed"]
        assert hash_files("set") == earlier
        server.requests.clear()
        content = build(server, "output.folder=dead", "plan.rows=30")
        assert content["exit_code"] == 2
        assert [fault["code"] for fault in content["faults"]] == ["evaluation.endpoint_failed"]
        assert content["stop"] == "errors"
        assert len(server.requests) < 120


PLANTED = {  # kind -> (the answer, the gate that has to catch it)
    "cut off": (Reply("The river carries the bridge and the", finish="length"), "complete"),
    "empty": ("  ", "empty"),
    "refusal": ("I'm sorry, but I can't help with that request.", "refusal"),
    "self": ("As an AI language model, I do not have feelings about rivers. They carry water.", "artefact"),
    "token": ("The bakery is warm.<|im_end|> And the garden is quiet.", "artefact"),
    "other language": ("河流带来面包，因为花园需要修理。图书馆会改变大桥。", "language"),
    "open fence": ("Here is the code:\n```python\nprint('river')\n", "complete"),
    "loop": ("The kettle sings. " + "It is warm in the kitchen. " * 14, "complete"),
    "personal": ("Please write to maria.lopez@gmail.com about the garden.", "personal"),
    "wrong encoding": ("The cafÃ© near the naÃ¯ve river sells bread.", "form"),
    "long": ("word " * 200, "length"),
    "half of a character": ("The river \ud83d carries the bridge.", "form"),
}


def test_every_planted_fault_is_caught_by_its_gate_and_no_clean_row_is_lost(build):
    planted, clean = {}, set()

    def respond(request):
        chance, step = make_chance(request), name_step(request)
        if step == "question":
            return "" if chance.random() < 0.1 else write(request)
        question = request["messages"][-1]["content"]
        if not question:
            raise AssertionError("nothing is answered that nobody asked")
        if chance.random() < 0.5:
            answer, planted[question] = PLANTED[chance.choice(list(PLANTED))]
            return answer
        clean.add(question)
        return write(request)

    with ScriptedServer(respond) as server:
        content = build(
            server,
            "plan.rows=80",
            "plan.attempts=3",
            "augmentation=null",
            "templates.families=[basic, task]",
            "gates.max_tokens=150",
        )
    rows = read("set/train.jsonl") + read("set/eval.jsonl")
    assert {row["messages"][0]["content"] for row in rows} == clean
    rejects = read("set/rejects.jsonl")
    caught = {reject["messages"][0]["content"]: reject["gate"] for reject in rejects}
    assert caught.pop("") == "generation"
    assert caught == planted
    assert set(planted.values()) == {gate for _, gate in PLANTED.values()}
    assert sum(gate["rejected"] for gate in content["gates"]) == len(rejects)
    assert content["rows"]["planned"] - content["rows"]["taken"] == sum(
        shortfall["planned"] - shortfall["rows"] for shortfall in content["shortfalls"]
    )


def test_row_with_a_faulty_or_cut_request_ends_before_its_answer_is_paid_for(build):
    def respond(request):
        if name_step(request) != "question":
            return write(request)
        kind = len(server.requests) % 3
        if kind == 0:
            return "Question: " + write(request)
        return "I'm ready to help. What do you need?" if kind == 1 else Reply(write(request), finish="length")

    with ScriptedServer(respond) as server:
        content = build(server, "augmentation=null", "templates.families=[basic]", "plan.attempts=1")
        steps = [name_step(request) for request in server.requests]
    gate = next(gate for gate in content["gates"] if gate["gate"] == "request")
    assert gate["checked"] == 12
    assert gate["rejected"] == 12 - steps.count("answer")
    assert 0 < steps.count("answer") < 12
    reasons = {reject["reason"].partition(":")[0] for reject in read("set/rejects.jsonl")}
    assert "the request is written as by the assistant" in reasons
    assert "the generator reached its limit of tokens before the row was whole" in reasons
    assert not any(row["messages"][0]["content"].startswith("Question") for row in read("set/train.jsonl"))


def test_solution_without_its_final_line_is_rejected_and_a_boxed_answer_passes(build):
    endings = {}

    def respond(request):
        if name_step(request) != "solution":
            return write(request)
        problem = request["messages"][-1]["content"]
        endings[problem] = ("\n#### 12", "\nSo it is \\boxed{12}.", "\nSo it is clear.", "\n####")[len(endings) % 4]
        return write(request).partition("\n####")[0] + endings[problem]

    with ScriptedServer(respond) as server:
        build(server, "augmentation=null", "templates.families=[chain_of_thought]", "plan.attempts=1")
    rows = read("set/train.jsonl") + read("set/eval.jsonl")
    assert {row["messages"][0]["content"] for row in rows} == {text for text in endings if "12" in endings[text]}
    assert {reject["gate"] for reject in read("set/rejects.jsonl")} == {"final_answer"}
    assert len(rows) == 6


def test_budget_below_the_price_of_one_call_is_a_fault_that_says_so(build):
    with ScriptedServer(write) as server:
        prices = ("generator.input_price=1", "generator.output_price=10", "budget.money=0.004")
        content = build(server, *prices, "augmentation=null")
        assert not server.requests
    (fault,) = content["faults"]
    assert fault["code"] == "build.no_rows"
    assert "is less than the next call may cost" in fault["problem"]
    assert "Lower `max_tokens`" in fault["fix"]


def test_repeated_rows_and_similar_requests_are_rejected_but_for_the_first(build):
    def respond(request):
        chance = make_chance(request)
        if name_step(request) == "question":
            asked = ("How does a river carry a {} from the mountain to the sea in spring?", "Who repairs this {} {}?")
            words = chance.sample(["bridge", "stone", "boat"], 2)
            return chance.choice(asked).format(*words) if chance.random() < 0.5 else write(request)
        return write(request | {"seed": 0})  # the same question has the same answer

    with ScriptedServer(respond) as server:
        build(server, "plan.rows=40", "plan.attempts=2", "augmentation=null", "templates.families=[basic]")
    rows = read("set/train.jsonl") + read("set/eval.jsonl")
    rivers = [row for row in rows if row["messages"][0]["content"].startswith("How does a river")]
    assert len(rivers) == 1
    gates = Counter(reject["gate"] for reject in read("set/rejects.jsonl"))
    assert set(gates) == {"duplicate", "novelty"}


def test_judge_rejects_low_scores_and_unreadable_judgements_and_orders_the_rest(build):
    def judge(request):
        if name_step(request) != "judge":
            return write(request)
        chance = make_chance(request)
        kind = chance.randrange(6)
        if kind == 0:
            return "I would say it is fine."
        scores = dict.fromkeys(("relevance", "correctness", "completeness", "safety"), 3 + chance.randrange(3))
        return json.dumps(scores | ({"safety": 1} if kind == 1 else {}))

    spec = SPEC + "judge: {endpoint: URL, model: judge}\nbalance: {min_score: 3.5}\n"
    with ScriptedServer(judge) as server:
        content = build(server, "plan.surplus=2", "augmentation=null", spec=spec)
    assert content["ok"], content["faults"]
    rows = read("set/train.jsonl") + read("set/eval.jsonl")
    assert all(row["provenance"]["score"] >= 3.5 and min(row["provenance"]["scores"].values()) >= 3 for row in rows)
    reasons = Counter(reject["reason"] for reject in read("set/rejects.jsonl"))
    assert reasons["safety has 1 of 5, and 3 is the least"]
    assert any("unreadable" in reason or "no answer" in reason for reason in reasons)
    assert all("trl_sft" not in json.dumps(request["messages"]) for request in server.requests)


def test_known_final_answers_are_checked(build, here):
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"#### {2 * n}"} for n in range(1, 9)]
    (here / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def solve(request):
        number = int(request["messages"][-1]["content"].split()[2])
        wrong = number == 3 or (number == 5 and make_chance(request).random() < 0.5)
        return f"I add {number} and {number}.\n#### {2 * number + wrong}"

    spec = "plan: {rows: 8, attempts: 4}\nseeds: {rows: seeds.jsonl}\ntemplates: {families: [chain_of_thought]}\n"
    spec += "generator: {endpoint: URL, model: writer, first_wait: 0.01}\noutput: {folder: set, eval_fraction: 0}\n"
    with ScriptedServer(solve) as server:
        content = build(server, spec=spec)
    questions = {row["messages"][0]["content"] for row in read("set/train.jsonl")}
    assert questions == {row["question"] for row in rows} - {"What is 3 plus 3?"}
    assert [(shortfall["planned"], shortfall["rows"]) for shortfall in content["shortfalls"]] == [(8, 7)]
    assert Counter(reject["gate"] for reject in read("set/rejects.jsonl"))["final_answer"] >= 4


def test_children_that_changed_a_number_or_a_name_are_rejected(build):
    def change(request):
        step, text = name_step(request), request["messages"][-1]["content"]
        if step == "question":
            return f"How did Marie Curie weigh {make_chance(request).randrange(1000, 9999)} grams?"
        if step == "paraphrase":
            parent = text.split("\n\n")[1]
            number = parent.split()[-2]
            kinds = (parent.replace(number, str(int(number) + 1)), parent.replace("Curie", "Currie"), parent)
            return kinds[int(number) % 3] if int(number) % 4 else f"Please say: {parent}"
        return write(request)

    with ScriptedServer(change) as server:
        build(
            server,
            "augmentation.methods=[paraphrase]",
            "templates.families=[basic]",
            "plan.rows=24",
            "output.eval_fraction=0",
        )
    rejects = [reject for reject in read("set/rejects.jsonl") if reject["gate"] == "augmentation"]
    rows = read("set/train.jsonl")
    children = [row for row in rows if row["provenance"]["parent"]]
    assert children
    assert all(row["messages"][0]["content"].startswith("Please say") for row in children)
    assert len(children) + len(rejects) == 24
    found = " ".join(reject["reason"] for reject in rejects)
    for words in ("the number", "`Curie` is lost", "the instruction is that of its parent"):
        assert words in found


def test_folder_with_other_files_and_rows_changed_by_hand_are_not_replaced(build, here):
    (here / "set").mkdir()
    (here / "set" / "notes.txt").write_text("mine", encoding="utf-8")
    with ScriptedServer(write) as server:
        assert [fault["code"] for fault in build(server)["faults"]] == ["build.folder_in_use"]
        assert server.requests == []
        (here / "set" / "notes.txt").unlink()
        assert build(server, "plan.rows=4", "augmentation=null")["ok"]
        path = here / "set" / "train.jsonl"
        path.write_text(path.read_text(encoding="utf-8").replace("the", "THE"), encoding="utf-8")
        assert [fault["code"] for fault in build(server)["faults"]] == ["build.changed_file"]


def test_dry_run_counts_the_calls_that_the_build_then_makes(build, here, capsys):
    with ScriptedServer(write) as server:
        planned = build(server, "--dry-run", "generator.input_price=1", "generator.output_price=2")
        assert server.requests == []
        assert not Path("set").exists()
        build(server)
        assert len(server.requests) == planned["calls"]
    assert planned["cost"] > 0


def test_build_runs_beside_the_event_loop_of_a_notebook(build):
    async def run_cell(server):
        return build(server, "plan.rows=2", "augmentation=null")

    with ScriptedServer(write) as server:
        assert asyncio.run(run_cell(server))["ok"]


def test_parquet_has_the_rows_of_the_jsonl_file(build):
    import pyarrow.parquet

    with ScriptedServer(write) as server:
        build(server, "plan.rows=4")
        build(server, "plan.rows=4", "output.folder=table", "output.format=parquet")
    assert pyarrow.parquet.read_table("table/train.parquet").to_pylist() == read("set/train.jsonl")
    assert {path.name for path in Path("table").iterdir()} >= {output.CALLS, output.BUILD, output.CARD, "eval.parquet"}


LOCAL = """\
plan: {rows: 3, attempts: 1}
seeds: {topics: [rivers]}
templates: {families: [basic]}
generator: {model: trl_sft:tiny, max_tokens: 8, temperature: 0.7}
output: {folder: set, eval_fraction: 0}
"""


def test_local_model_writes_rows_once_and_the_same_again(here, capsys):
    """The embedded model cannot write instructions: each row is rejected, and the build says so."""
    (here / "local.yaml").write_text(LOCAL, encoding="utf-8")
    contents = []
    for overrides in ([], [], ["output.folder=again"], ["output.folder=third", "budget.calls=1"]):
        capsys.readouterr()
        assert cli.main(["build", "local.yaml", *overrides, "--json"]) in (0, 2)
        contents.append(json.loads(capsys.readouterr().out))
    assert [fault["code"] for fault in contents[0]["faults"]] == ["build.no_rows"]
    assert [content["generator"]["this_process"]["made"] for content in contents[1:]] == [
        0,
        contents[0]["generator"]["this_process"]["made"],
        1,
    ]
    assert Path("set/rejects.jsonl").read_bytes() == Path("again/rejects.jsonl").read_bytes()
    assert contents[3]["partial"]


def test_example_in_chinese_builds_as_it_is_with_another_server(here, capsys, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    assert cli.main(["build", "--example", "zh", "-o", "mine.yaml"]) == 0
    assert cli.main(["build", "--example", "zh", "-o", "mine.yaml"]) == 2  # no file is replaced
    with ScriptedServer(write) as server:
        assert cli.main(["build", "mine.yaml", f"generator.endpoint={server.url}", "plan.rows=8"]) == 0
    rows = read("data/instructions/train.jsonl")
    assert "领域" in server.requests[0]["messages"][0]["content"]
    assert all("因为" in row["messages"][1]["content"] for row in rows)
    assert {row["task"] for row in rows} <= {"问答", "摘要", "分类", "改写", "创意写作", "推理"}
    assert "--dry-run" in capsys.readouterr().out
