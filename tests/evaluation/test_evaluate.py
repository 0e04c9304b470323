"""`evaluate`: both sides get the prompts of training, answers are kept, and every number follows from the records."""

import contextlib
import dataclasses
import functools
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import jsonschema
import numpy as np
import pytest
import torch
from conftest import QUESTIONS, jsonl
from scipy import stats
from transformers import AutoTokenizer, GenerationConfig

from trl_sft import cli, load_recipe
from trl_sft.evaluation import answer_cache, before_after, generate, items, verdict
from trl_sft.evaluation.answer_cache import StoredAnswer
from trl_sft.recipe import paths
from trl_sft.serving import base_tensors, model_folder, model_loading, prompts
from trl_sft.serving.export import gguf_file as gguf_files
from trl_sft.serving.export import gguf_vocabulary
from trl_sft.tokenization import encode
from trl_sft.training import stages

RECIPE = """\
model: {{name_or_path: base}}
data: {{train: {{path: rows.jsonl}}, eval_fraction: 0.2}}
{lora}
train:
  output_dir: {name}
  max_steps: 4
  per_device_train_batch_size: 4
  learning_rate: 0.02
  save_steps: 2
"""
ROWS = [row | {"task": "low" if n < 20 else "high"} for n, row in enumerate(QUESTIONS)]
ASKED = [  # no training row has these prompts
    {"question": f"What is {n} plus {n}?", "answer": str(n + n), "task": "low" if n < 120 else "high"}
    for n in range(100, 140)
]
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json.md"
BLOCK = re.search(r"<!-- schema -->\n```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
SCHEMA = jsonschema.Draft202012Validator(json.loads(BLOCK))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train LoRA on a base model of its own; return the folder with the run and with forty rows to evaluate."""
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(paths.EMBEDDED / "tiny", folder / "base")
    jsonl(folder / "rows.jsonl", ROWS)
    jsonl(folder / "asked.jsonl", ASKED)
    (folder / "lora.yaml").write_text(
        RECIPE.format(lora="lora: {r: 4, target_modules: all-linear}", name=folder / "lora"), encoding="utf-8"
    )
    assert cli.main([str(folder / "lora.yaml")]) == 0
    return folder


@pytest.fixture
def evaluate(capsys):
    """Return a function that runs `evaluate` under `--json` and returns the object."""

    def call(*words):
        capsys.readouterr()
        code = cli.main(["evaluate", *map(str, words), "--json"])
        content = json.loads(capsys.readouterr().out)
        SCHEMA.validate(content)
        assert content["exit_code"] == code
        return content

    return call


@pytest.fixture
def server():
    """Serve right answers to `What is N plus N?`; `server.fails_after` calls it refuses, `server.calls` were made."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            here = self.server
            if len(here.calls) >= here.fails_after:
                self.send_error(400)
                return
            here.calls.append(body)
            number = int(body["messages"][-1]["content"].split()[2])
            message = {"role": "assistant", "content": here.words.format(2 * number)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            text = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.calls, running.fails_after, running.words = [], math.inf, "{}"
        running.url = f"http://127.0.0.1:{running.server_port}/v1"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def recompute(records, base="base", tuned="tuned"):
    """Return the numbers of a verdict from the records alone: an implementation of its own, of thirty lines."""
    scores = defaultdict(lambda: ([], []))
    for record in records:
        for values, side in zip(scores[record["prompt_key"]], (base, tuned), strict=True):
            values.append(record["scores"][side][record["check"]])
    pairs = np.array([[sum(values) / len(values) for values in sides] for sides in scores.values()])
    differences = pairs[:, 1] - pairs[:, 0]
    better, worse = int((differences > 1e-9).sum()), int((differences < -1e-9).sum())
    low = high = differences.mean()
    if np.ptp(differences) > 0:
        interval = stats.bootstrap((differences,), np.mean, method="BCa", rng=np.random.default_rng(0))
        low, high = interval.confidence_interval
    n, z = len(pairs), stats.norm.ppf(0.975)
    share = better / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    width = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    tail = sum(math.comb(better + worse, k) for k in range(min(better, worse) + 1)) / 2 ** (better + worse)
    return {
        "prompts": n,
        "base": pairs[:, 0].mean(),
        "tuned": pairs[:, 1].mean(),
        "average_improvement": {"value": differences.mean(), "low": low, "high": high},
        "improvement_rate": {"better": better, "tied": n - better - worse, "worse": worse}
        | {"value": share, "low": middle - width, "high": middle + width},
        "sign_test_p": 1.0 if better == worse else min(1, 2 * tail),
    }


def check_numbers(part, expected):
    for key, value in expected.items():
        if isinstance(value, dict):
            check_numbers(part[key], value)
        else:
            assert part[key] == pytest.approx(value, abs=1e-9), key


def test_right_answers_of_a_server_are_an_improvement_and_each_number_is_recomputed(evaluate, runs, server, tmp_path):
    words = [runs / "lora", "--data", runs / "asked.jsonl", "--endpoint", server.url, "--model", "m"]
    content = evaluate(*words, "-o", tmp_path, "--max-new-tokens", 4)
    assert content["ok"], content["faults"]
    result = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["evaluation"]
    assert result["verdict"]["code"] == "improved"
    assert result["sides"]["tuned"]["template"] == "chat template of the server"
    assert {body["max_tokens"] for body in server.calls} == {4}
    assert {body["temperature"] for body in server.calls} == {0}
    records = read_lines(tmp_path / "evaluation.jsonl")
    assert {record["check"] for record in records} == {"numeric"}
    check_numbers(result, recompute(records))
    check_numbers(result["few_shot"], recompute(records, base="base_few_shot"))
    for task, part in result["tasks"].items():
        check_numbers(part, recompute([record for record in records if record["task"] == task]))
        assert part["resolution"] == "not_resolved"  # twenty prompts
    holm = sorted(part["sign_test_p"] for part in result["tasks"].values())
    assert sorted(part["holm_p"] for part in result["tasks"].values()) == pytest.approx(
        [min(1, 2 * holm[0]), max(min(1, 2 * holm[0]), holm[1])], abs=1e-9
    )
    table = result["checks"]["exact"]["mcnemar"]["table"]
    right = [[record["scores"][side]["exact"] for side in ("base", "tuned")] for record in records]
    assert table == [[right.count([a, b]) for b in (1, 0)] for a in (1, 0)]
    assert result["regressions"]["ids"] == [
        r["id"] for r in records if r["scores"]["tuned"]["numeric"] < r["scores"]["base"]["numeric"]
    ]


def test_interrupted_evaluation_makes_exactly_the_missing_calls_and_writes_the_same_files(
    evaluate, runs, server, tmp_path
):
    words = [runs / "lora", "--data", runs / "asked.jsonl", "--endpoint", server.url, "--model", "m", "--few-shot", 0]
    words += ["--max-new-tokens", 4]
    evaluate(*words, "-o", tmp_path / "whole")
    server.calls.clear()
    server.fails_after = 13
    stopped = evaluate(*words, "-o", tmp_path / "resumed")
    assert stopped["faults"][0]["code"] == "evaluation.endpoint_failed"
    assert len(server.calls) == 13
    with (tmp_path / "resumed" / "answers.jsonl").open("a") as file:
        file.write('{"key": "half a li')  # what a killed process leaves
    server.fails_after = math.inf
    resumed = evaluate(*words, "-o", tmp_path / "resumed")
    assert resumed["calls"]["tuned"]["generated"] == len(server.calls) - 13 == 27
    again = evaluate(*words, "-o", tmp_path / "resumed")
    assert len(server.calls) == 40
    assert {side: counts["generated"] for side, counts in again["calls"].items()} == {"tuned": 0, "base": 0}
    for name in ("eval.json", "evaluation.jsonl"):
        files = [(tmp_path / folder / name).read_bytes() for folder in ("whole", "resumed")]
        assert files[0] == files[1]


def test_held_out_prompts_have_the_answers_of_training_and_the_report_its_chapter(evaluate, runs):
    content = evaluate(runs / "lora", "--few-shot", 2)
    assert content["ok"], content["faults"]
    samples = read_lines(runs / "lora" / "samples.jsonl")
    records = read_lines(runs / "lora" / "evaluation.jsonl")
    assert [record["row"] for record in records] == [sample["row"] for sample in samples]
    for sample, record in zip(samples, records, strict=True):
        assert record["answers"]["base"]["text"] == sample["before"]
        assert record["answers"]["tuned"]["text"] == sample["after"]
        assert record["prompt"] == sample["prompt"]
    kept = json.loads((runs / "lora" / "eval.json").read_text(encoding="utf-8"))
    assert set(kept) >= {"before", "after", "evaluation"}
    assert kept["evaluation"]["verdict"]["code"] == "not_resolved"
    assert kept["evaluation"]["sides"]["base"]["thinking"] == "none"
    page = (runs / "lora" / "report.html").read_text(encoding="utf-8")
    assert "Base against tuned" in page
    assert kept["evaluation"]["verdict"]["text"].split(":")[0] in page


def test_prompts_have_the_tokens_that_training_gave_them(runs, monkeypatch):
    """Also those of a chat with tools and with a token of the template in its text, which samples.jsonl keeps."""
    monkeypatch.chdir(runs)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    turns = [{"role": "user", "content": "What <|im_end|> is it?"}, {"role": "assistant", "content": "4"}]
    jsonl(runs / "tools.jsonl", [{"messages": turns, "tools": [tool]}] * 2 + [{"messages": turns}] * 6)
    text = RECIPE.format(lora="", name=runs / "tools").replace("rows.jsonl", "tools.jsonl")
    text = (
        RECIPE.format(lora="", name=runs / "tools")
        .replace("rows.jsonl", "tools.jsonl")
        .replace("max_steps: 4", "max_steps: 1")
    )
    text = text.replace(
        "eval_fraction: 0.2", "eval: {path: tools.jsonl}, drop_leaked: false, special_tokens_in_text: text"
    )
    text = text.replace("model: {name_or_path: base}", "model: {name_or_path: base}\ntokenizer: {chat_template: qwen3}")
    (runs / "tools.yaml").write_text(text, encoding="utf-8")
    assert cli.main([str(runs / "tools.yaml"), "train.max_steps=1"]) == 0
    run = load_recipe(runs / "tools.yaml")
    inputs = stages.prepare(run)
    encode_prompt = functools.partial(encode.encode_prompt, inputs.datasets.encoder)
    expected = before_after.select_prompts(run, inputs.rows, encode=encode_prompt, ledger=inputs.datasets.ledger)
    source = model_folder.find_model(runs / "tools")
    renderer = prompts.build_renderer(source, model_loading.load_tokenizer(source, trusts_code=False))
    asked = items.read_samples(before_after.read_samples(runs / "tools" / "samples.jsonl"))
    assert [renderer.render_worded(item.prompt, item.tools).ids for item in asked] == expected.ids
    assert len({len(ids) for ids in expected.ids}) == 2


def test_same_model_on_both_sides_is_no_difference(evaluate, runs, tmp_path):
    content = evaluate(
        *(runs / "lora", "--tuned", runs / "base", "--against", runs / "base", "--data", runs / "asked.jsonl"),
        *("--few-shot", 0, "--max-new-tokens", 2, "-o", tmp_path),
    )
    result = content["evaluation"]
    assert result["verdict"]["code"] == "no_difference"
    assert result["best_tasks"] == result["best_improved"] == []
    assert set(result["average_improvement"].values()) == {0}
    assert (result["improvement_rate"]["better"], result["improvement_rate"]["tied"]) == (0, 40)
    assert result["ids"] == {"better": [], "worse": []}
    assert result["format_only"]
    assert result["sign_test_p"] == 1
    assert "no_difference" in {given["rule"] for given in result["advice"]}
    assert content["calls"]["base"] == {"generated": 0, "cached": 40, "seconds": content["calls"]["base"]["seconds"]}


def test_adapter_and_merged_model_give_the_same_answers_and_so_do_the_base_with_the_adapter_off_and_alone(
    evaluate, runs, tmp_path
):
    assert cli.main(["merge", str(runs / "lora"), "-o", str(tmp_path / "merged")]) == 0
    options = ["--data", runs / "asked.jsonl", "--few-shot", 0, "--max-new-tokens", 12]
    texts = []
    for name, words in (("adapter", []), ("merged", ["--tuned", tmp_path / "merged", "--against", runs / "base"])):
        content = evaluate(runs / "lora", *options, *words, "-o", tmp_path / name)
        assert content["ok"], content["faults"]
        assert content["calls"]["tuned"]["generated"] == content["calls"]["base"]["generated"] == 40
        records = read_lines(tmp_path / name / "evaluation.jsonl")
        texts.append([[record["answers"][side]["text"] for side in ("base", "tuned")] for record in records])
    assert texts[0] == texts[1]
    assert any(base != tuned for base, tuned in texts[0])


@pytest.fixture(scope="module")
def gguf_file(runs):
    """Write the base model as a GGUF file; return its path."""
    tokenizer = AutoTokenizer.from_pretrained(runs / "base")
    planned = gguf_files.plan(runs / "base", base_tensors.load_on_meta(runs / "base"), "f32", where="the model")
    stops = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    built = gguf_vocabulary.build(tokenizer, planned.config.vocab_size, stops, adds_bos=False, where="the model")
    vocabulary = dataclasses.replace(built, pre="llama-bpe")
    gguf_files.write(planned, vocabulary, runs / "base.gguf", metadata={"general.name": "base"})
    return runs / "base.gguf"


def test_gguf_file_answers_as_the_model_that_it_was_written_from(evaluate, runs, gguf_file, tmp_path):
    options = ["--data", runs / "asked.jsonl", "--against", runs / "base", "--few-shot", 0, "--max-new-tokens", 8]
    content = evaluate(runs / "lora", *options, "--tuned", gguf_file, "-o", tmp_path)
    assert content["ok"], content["faults"]
    assert content["evaluation"]["verdict"]["code"] == "no_difference"
    model = content["evaluation"]["sides"]["tuned"]["model"]
    assert (model["kind"], model["name"]) == ("GGUF file", "base.gguf")
    for record in read_lines(tmp_path / "evaluation.jsonl"):
        assert record["answers"]["tuned"] == record["answers"]["base"]
    assert content["calls"]["tuned"]["generated"] == 40
    again = evaluate(runs / "lora", *options, "--tuned", gguf_file, "-o", tmp_path)
    assert again["calls"]["tuned"]["generated"] == 0
    assert again["evaluation"] == content["evaluation"]


def test_gguf_file_that_is_cut_or_of_another_model_is_refused(evaluate, runs, gguf_file, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:5000])
    tokenizer = AutoTokenizer.from_pretrained(runs / "base")
    other = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(other, "llama")
    writer.add_token_list([f"other {n}" for n in range(len(tokenizer))])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    for path, code in (
        (cut, "proof.unreadable_export"),
        (other, "evaluation.other_vocabulary"),
        (tmp_path / "none.gguf", "chat.no_model"),
    ):
        content = evaluate(runs / "lora", "--data", runs / "asked.jsonl", "--tuned", path, "-o", tmp_path / "out")
        assert [fault["code"] for fault in content["faults"]] == [code]
    assert not (tmp_path / "out" / "answers.jsonl").exists()


@pytest.fixture
def transformers_serve():
    """Start `transformers serve`, which loads a folder on request; return its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.2)
        assert process.poll() is None
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_model_behind_transformers_serve_answers_as_the_same_model_does_here(
    evaluate, runs, transformers_serve, tmp_path
):
    """The server renders the chat with its own template; the server of the other tests is scripted."""
    words = [runs / "lora", "--data", runs / "asked.jsonl", "--against", runs / "base", "--few-shot", 0]
    words += ["--max-new-tokens", 8, "--endpoint", transformers_serve, "--model", runs / "base", "-o", tmp_path]
    content = evaluate(*words)
    assert content["ok"], content["faults"]
    assert content["evaluation"]["verdict"]["code"] == "no_difference"
    assert content["evaluation"]["sign_test_p"] == 1
    for record in read_lines(tmp_path / "evaluation.jsonl"):
        base, tuned = (record["answers"][side] for side in ("base", "tuned"))
        assert {name: base[name] for name in ("text", "stop", "tokens")} == {
            name: tuned[name] for name in ("text", "stop", "tokens")
        }
    again = evaluate(*words)
    assert {side: counts["generated"] for side, counts in again["calls"].items()} == {"tuned": 0, "base": 0}


def test_checkpoints_are_a_curve_whose_last_point_is_the_verdict(evaluate, runs, tmp_path):
    options = ["--few-shot", 0, "--max-new-tokens", 2, "-o", tmp_path]
    result = evaluate(runs / "lora", "--at", "2,4", *options)["evaluation"]
    assert [point["step"] for point in result["checkpoints"]] == [2, 4]
    assert result["checkpoints"][-1]["tuned"] == result["tuned"]
    assert result["sides"]["tuned"]["model"]["digest"] == result["sides"]["step_4"]["model"]["digest"]
    assert result["sides"]["step_2"]["model"]["digest"] != result["sides"]["step_4"]["model"]["digest"]


def test_answers_of_a_batch_equal_those_of_each_prompt_alone(runs):
    source = model_folder.find_model(runs / "lora")
    tokenizer = model_loading.load_tokenizer(source, trusts_code=False)
    renderer = prompts.build_renderer(source, tokenizer)
    model = model_loading.load_model(source, tokenizer, trusts_code=False)
    texts = ["Hi", "What is 3 plus 3?", "What is 12 plus 12, and please say it in many words?", "x"]
    ids = [renderer.render(text).ids for text in texts]
    config = generate.choose_generation(
        model.generation_config, tokenizer, max_new_tokens=8, generation={"min_new_tokens": 4}
    )

    def answer(rows, size):
        batches = generate.generate_batches(model, tokenizer, rows, config=config, batch_size=size)
        return {answer.number: answer for batch in batches for answer in batch}

    together = answer(ids, 4)
    assert together == answer(ids, 1)
    for number, row in enumerate(ids):  # transformers' own, without padding
        reference = model.generate(
            input_ids=torch.tensor([row]),
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            generation_config=config,
        )[0, len(row) :].tolist()
        assert together[number].tokens == reference


def test_sampled_answers_do_not_depend_on_their_order(evaluate, runs, tmp_path):
    rows = read_lines(runs / "asked.jsonl")[:4]
    texts = []
    for name, part in (("one", rows), ("other", rows[::-1])):
        jsonl(tmp_path / f"{name}.jsonl", part)
        options = ["--data", tmp_path / f"{name}.jsonl", "--temperature", 2, "--few-shot", 0, "-o", tmp_path / name]
        content = evaluate(runs / "lora", *options, "--max-new-tokens", 6, "--allow-missing-tasks")
        assert content["evaluation"]["sides"]["tuned"]["decoding"]["seed"] == 42
        records = read_lines(tmp_path / name / "evaluation.jsonl")
        texts.append({record["prompt"]: record["answers"]["tuned"]["text"] for record in records})
    assert texts[0] == texts[1]
    assert len(set(texts[0].values())) > 1


def make_records(base, tuned, task=""):
    side = {"text": "a", "thought": "", "is_closed": True, "stop": generate.STOP_TOKEN}
    return [
        {
            "id": n,
            "task": task,
            "prompt": f"p{n}",
            "prompt_key": f"{task}{n}",
            "reference": "a",
            "check": "exact",
            "answers": {"base": side, "tuned": side},
            "scores": {"base": {"exact": one}, "tuned": {"exact": other}},
        }
        for n, (one, other) in enumerate(zip(base, tuned, strict=True))
    ]


@pytest.mark.parametrize(
    ("base", "tuned", "code"),
    [
        ([0] * 100, [1] * 40 + [0] * 60, "improved"),
        ([1] * 40 + [0] * 60, [0] * 100, "worse"),
        ([1, 0] * 50, [1, 0] * 50, "no_difference"),
        ([0, 1] * 50, [1, 0] * 50, "not_resolved"),
        ([0] * 20, [1] * 20, "not_resolved"),
    ],
)
def test_planted_scores_give_their_verdict(base, tuned, code):
    records = make_records(base, tuned)
    result = verdict.build(records, {"base": {}, "tuned": {}})
    assert result["verdict"]["code"] == code
    check_numbers(result, recompute(records))
    assert result["regressions"]["rows"] == sum(a > b for a, b in zip(base, tuned, strict=True))


def test_tasks_are_ranked_by_the_bound_of_their_interval_and_corrected_together():
    records = make_records([0] * 60, [1] * 30 + [0] * 30, "steady") + make_records(
        [1] * 60, [0] * 40 + [1] * 20, "lost"
    )
    records += make_records([0] * 60, [1] * 50 + [0] * 10, "strong")
    result = verdict.build(records, {"base": {}, "tuned": {}})
    assert result["best_tasks"] == ["strong", "steady"]
    assert result["attention_tasks"] == ["lost"]
    assert {given["rule"] for given in result["advice"]} >= {"task_worse", "regressions", "format_only"}


def test_rows_of_one_prompt_count_once():
    records = make_records([0] * 40, [1] * 40)
    for record in records:
        record["prompt_key"] = "the same"
    assert verdict.build(records, {"base": {}, "tuned": {}})["prompts"] == 1


def test_cache_keeps_the_batches_before_a_failure(tmp_path):
    path = tmp_path / "answers.jsonl"

    def generate_two_then_fail(missing):
        yield {number: StoredAnswer(f"answer {number}", "stop_token", 1) for number in missing[:2]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_cache.fill(path, ["a", "b", "a", "c"], generate_two_then_fail, label="tuned")
    asked = []

    def generate_rest(missing):
        asked.extend(missing)
        yield {number: StoredAnswer(f"answer {number}", "stop_token", 1) for number in missing}

    answers, counts = answer_cache.fill(path, ["a", "b", "a", "c"], generate_rest, label="tuned")
    assert asked == [3]
    assert counts == (1, 2)
    assert [answer.text for answer in answers] == ["answer 0", "answer 1", "answer 0", "answer 3"]


def test_key_of_an_answer_changes_with_model_prompt_and_decoding():
    keys = {
        answer_cache.compute_key("m", [1, 2], {"max_new_tokens": 3}),
        answer_cache.compute_key("n", [1, 2], {"max_new_tokens": 3}),
        answer_cache.compute_key("m", [1, 3], {"max_new_tokens": 3}),
        answer_cache.compute_key("m", [1, 2], {"max_new_tokens": 4}),
        answer_cache.compute_key("m", "[1, 2]", {"max_new_tokens": 3}),
    }
    assert len(keys) == 5
    assert answer_cache.compute_key("m", [1], GenerationConfig().to_diff_dict()) == answer_cache.compute_key(
        "m", [1], GenerationConfig().to_diff_dict()
    )


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--check", "exakt"], "evaluation.bad_check"),
        (["--check", "code"], "evaluation.code_not_permitted"),
        (["--check", "high=regex"], "evaluation.bad_check"),
        (["--check", "hihg=exact", "--data", "asked.jsonl"], "evaluation.bad_check"),
        (["--at", "7"], "chat.no_checkpoint"),
        (["--at", "x"], "run.bad_option"),
        (["--endpoint", "127.0.0.1:8000", "--model", "m"], "run.bad_option"),
        (["--endpoint", "http://127.0.0.1:9/v1"], "run.bad_option"),
        (["--batch-size", "0"], "run.bad_option"),
        (["--tuned", "base", "--at", "2"], "run.bad_option"),
        (["--tuned", "missing"], "chat.no_model"),
        (["--data", "missing.jsonl"], "data.unreadable_source"),
        (["--data", "empty.jsonl"], "data.no_rows"),
        (["--data", "broken.jsonl"], "data.invalid_json"),
        (["--data", "no_reference.jsonl"], "evaluation.no_check"),
    ],
)
def test_bad_input_is_a_fault_before_any_answer(words, code, evaluate, runs, monkeypatch, tmp_path):
    monkeypatch.chdir(runs)
    (runs / "empty.jsonl").write_text("\n")
    (runs / "broken.jsonl").write_text('{"prompt": "a", "reference": "b"}\n{"prompt": \n')
    (runs / "no_reference.jsonl").write_text('{"prompt": "a"}\n')
    content = evaluate(runs / "lora", *words, "-o", tmp_path)
    assert [fault["code"] for fault in content["faults"]][:1] == [code]
    assert content["exit_code"] == 2
    assert not (tmp_path / "answers.jsonl").exists()


def test_file_may_be_a_list_and_rows_name_their_checks(evaluate, runs, tmp_path):
    rows = [
        {"question": "Say yes.", "check": "contains", "reference": "yes", "task": "a"},
        {
            "prompt": [{"role": "user", "content": "Write JSON."}],
            "checks": ["json", {"instructions": {"max_words": 9}}],
        },
        {"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "2"}], "task": "b"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    content = evaluate(
        *(runs / "lora", "--data", tmp_path / "rows.json", "--check", "b=exact,numeric", "-o", tmp_path / "out"),
        *("--max-new-tokens", 2, "--few-shot", 0, "--allow-missing-tasks"),
    )
    assert content["ok"], content["faults"]
    records = read_lines(tmp_path / "out" / "evaluation.jsonl")
    checks = [list(record["scores"]["tuned"]) for record in records]
    assert checks == [["contains"], ["json", "instructions"], ["exact", "numeric"]]
    assert [record["reference"] for record in records] == ["yes", "", "2"]
    assert list(content["evaluation"]["tasks"]) == ["", "a", "b"]


def test_recipe_without_a_run_says_how_to_train_it(evaluate, runs):
    text = (runs / "lora.yaml").read_text(encoding="utf-8").replace(f"{runs / 'lora'}", f"{runs / 'never'}")
    (runs / "never.yaml").write_text(text, encoding="utf-8")
    content = evaluate(runs / "never.yaml")
    assert content["faults"][0]["code"] == "evaluation.no_run"
    assert not (runs / "never").exists()


def test_a_trained_task_without_a_row_stops_the_evaluation_unless_it_is_allowed(evaluate, runs, tmp_path):
    low = [row for row in ASKED if row["task"] == "low"]
    leak = {"question": QUESTIONS[0]["question"].upper(), "answer": "0", "task": "low"}
    held_out = {sample["prompt"][-1]["content"] for sample in read_lines(runs / "lora" / "samples.jsonl")}
    leak["question"] = next(row["question"] for row in QUESTIONS if row["question"] not in held_out).upper()
    jsonl(tmp_path / "low.jsonl", [*low, leak])
    words = [runs / "lora", "--data", tmp_path / "low.jsonl", "--few-shot", 0, "--max-new-tokens", 1, "-o", tmp_path]
    (fault,) = evaluate(*words)["faults"]
    assert fault["code"] == "evaluation.missing_task"
    assert "no row to evaluate has the task high" in fault["problem"]
    assert not (tmp_path / "answers.jsonl").exists()
    found = evaluate(*words, "--allow-missing-tasks")["evaluation"]["training_set"]
    assert found["missing_tasks"] == ["high"]
    assert found["leaks"]["exact"] == 1
    (match,) = [match for match in found["matches"] if match["kind"] == "exact"]
    assert match["evaluation"] == f"low.jsonl row {len(low) + 1}"
    assert match["training"].startswith("rows.jsonl row ")
