"""`merge`: the merged folder equals peft's own merge, is proved, and appears whole or not at all."""

import json
import os
import shutil
import signal
import warnings

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sft import cli
from trl_sft.cli import merge as merge_command
from trl_sft.model import base_digest, patches
from trl_sft.recipe import paths
from trl_sft.serving import base_tensors, merge, merge_proof

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
ROWS = [{"name": "row", "segments": [[f"What is {n} plus {n}? {2 * n}", True, False]]} for n in range(3)]


def build_base(folder, name="Llama", *, dtype="float32", tied=False, **values):
    """Write an untrained model of an architecture, with the toy tokenizer; return its folder."""
    tokenizer = AutoTokenizer.from_pretrained(paths.EMBEDDED / "tiny")
    sizes = (GPT2 if name == "GPT2" else SIZES) | values
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), tie_word_embeddings=tied, **sizes)
    torch.manual_seed(0)
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, name + suffix)(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


def build_run(folder, base, *, rows=None, scale=0.2, **lora):
    """Write the folder of a finished run with an adapter of random values; return the folder."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | lora))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.save_pretrained(folder)
    inference = {"base": str(base), "base_digest": base_digest.compute_digest(str(base))}
    (folder / "run.json").write_text(json.dumps({"outcome": "done", "inference": inference}), encoding="utf-8")
    (folder / "resolved.yaml").write_text(f"model: {{name_or_path: {base}}}\n", encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return folder


def merge_with_peft(run, base, *, rows=None):
    """Return the tensors of peft's own merge in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, run).merge_and_unload().state_dict()


@pytest.fixture
def run_merge(tmp_path, capsys):
    """Return a function that runs `merge` in this process: exit code, the text, merge.json."""

    def call(run, *options, output="merged"):
        folder = tmp_path / output
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = cli.main(["merge", str(run), "-o", str(folder), *options])
        record = json.loads((folder / "merge.json").read_text()) if (folder / "merge.json").is_file() else {}
        captured = capsys.readouterr()
        return code, captured.out + captured.err, record

    return call


def load_merged(folder):
    """Return the tensors of a merged folder as plain transformers loads it."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.state_dict()


LINEAR = {"target_modules": "all-linear"}
KINDS = {
    "lora": ("Llama", {}, LINEAR),
    "rslora with patterns": (
        "Llama",
        {},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2}}
        | {"alpha_pattern": {"layers.1.self_attn.v_proj": 32}},
    ),
    "dora": ("Llama", {}, LINEAR | {"use_dora": True}),
    "lora_bias": ("Qwen2", {}, {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "embedding": ("Llama", {}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "rows of new tokens, tied": (
        "Llama",
        {"tied": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    ),
    "rows of new tokens": (
        "Llama",
        {},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]}},
    ),
    "whole modules": ("Llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "Conv1D": ("GPT2", {"tied": True}, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "parameters": ("Llama", {}, {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_merged_tensors_equal_those_of_peft(kind, tmp_path, run_merge):
    name, values, lora = KINDS[kind]
    base = build_base(tmp_path / "base", name, **values)
    run = build_run(tmp_path / "run", base, **lora)
    code, text, record = run_merge(run)
    assert code == 0, text
    merged, expected = load_merged(tmp_path / "merged"), merge_with_peft(run, base)
    assert set(merged) == set(expected)
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
    assert record["proof"]["covers"] == "logits"
    assert record["proof"]["base_against_tuned"]["relative"] > 100 * record["proof"]["merged_against_tuned"]["relative"]
    assert record["base"]["compared_with_run"] is True


@pytest.mark.filterwarnings("ignore")
def test_embedding_with_an_adapter_of_its_own_is_separated_from_the_tied_head(tmp_path, run_merge):
    """peft's own merge changes the tied head too, which the adapter in training does not."""
    base = build_base(tmp_path / "base", tied=True)
    run = build_run(tmp_path / "run", base, target_modules=["embed_tokens", "q_proj"])
    code, text, record = run_merge(run)
    assert code == 0, text
    assert record["tied_weights_separated"] is True
    assert record["proof"]["merged_against_tuned"]["relative"] < 1e-5
    merged = load_merged(tmp_path / "merged")
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


@pytest.mark.filterwarnings("ignore")
def test_rows_of_tokens_that_the_base_lacks_are_merged(tmp_path, run_merge):
    base = build_base(tmp_path / "base")
    rows = len(AutoTokenizer.from_pretrained(base)) + 2
    indices = {"embed_tokens": [rows - 2, rows - 1], "lm_head": [rows - 2, rows - 1]}
    run = build_run(tmp_path / "run", base, rows=rows, target_modules=["q_proj"], trainable_token_indices=indices)
    code, text, _ = run_merge(run)
    assert code == 0, text
    merged, expected = load_merged(tmp_path / "merged"), merge_with_peft(run, base, rows=rows)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in merged.items())
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == rows


@pytest.fixture
def qwen(tmp_path):
    """Return base and run of a Qwen2 in bfloat16."""
    base = build_base(tmp_path / "base", "Qwen2", dtype="bfloat16", tied=True)
    return base, build_run(tmp_path / "run", base, **LINEAR)


@pytest.mark.filterwarnings("ignore")
def test_weights_in_several_shards_and_another_dtype_equal_the_rounded_merge(qwen, tmp_path, run_merge, monkeypatch):
    monkeypatch.setattr(merge, "SHARD_BYTES", 20_000)
    base, run = qwen
    code, text, record = run_merge(run, "--dtype", "float16")
    assert code == 0, text
    assert len(record["files"]) >= 3
    assert (record["dtype"], record["proof"]["tolerance"]) == ("float16", merge_proof.TOLERANCES["float16"])
    merged, expected = load_merged(tmp_path / "merged"), merge_with_peft(run, base)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}
    assert all(torch.equal(tensor, expected[key].half()) for key, tensor in merged.items())


@pytest.mark.filterwarnings("ignore")
def test_folder_holds_template_stop_token_and_no_quantization(qwen, tmp_path, run_merge):
    _, run = qwen
    assert run_merge(run)[0] == 0
    ours, trained = AutoTokenizer.from_pretrained(tmp_path / "merged"), AutoTokenizer.from_pretrained(run)
    chat = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(chat) == trained.apply_chat_template(chat)
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == trained.eos_token_id
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantization", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
def test_weights_of_training_equal_those_that_bitsandbytes_restores(quantization, qwen):
    base, _ = qwen
    config = transformers.BitsAndBytesConfig(**quantization)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config)
    tensors = base_tensors.BaseTensors(base, base_tensors.load_on_meta(base))
    tensors.set_quantization(base, quantization, None)
    name = "model.layers.0.mlp.down_proj"
    patches.repair(model)
    expected = peft.utils.integrations.dequantize_module_weight(model.get_submodule(name))
    assert torch.equal(tensors.read_dequantized(f"{name}.weight").float(), expected.float())
    assert "lm_head.weight" not in tensors.quantized


@pytest.mark.filterwarnings("ignore")
def test_adapter_of_qlora_is_merged_into_either_base_with_what_changes(qwen, tmp_path, run_merge):
    _, run = qwen
    with (run / "resolved.yaml").open("a") as file:
        file.write("quantization: {load_in_4bit: true}\n")
    code, text, original = run_merge(run)
    assert code == 0, text
    assert 0.08 < original["quantization"]["relative"] < 0.16  # FP4; a third where scales are read wrongly
    assert (
        original["proof"]["merged_against_quantized"]["mean_kl"] > original["proof"]["merged_against_tuned"]["mean_kl"]
    )
    code, text, dequantized = run_merge(run, "--base", "dequantized", output="second")
    assert code == 0, text
    assert "merged_against_quantized" not in dequantized["proof"]
    first, second = load_file(tmp_path / "merged/model.safetensors"), load_file(tmp_path / "second/model.safetensors")
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], second["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(("mean_kl", "is_noted"), [(1.5, True), (0.01, False)])
def test_merge_that_is_far_from_the_quantized_model_names_the_other_base(mean_kl, is_noted):
    numbers = {"relative": 0.1, "mean_kl": mean_kl, "worst_kl": 9.0, "equal_tokens": 0.6}
    proof = {"covers": "logits", "rows": 8, "rows_from": "held-out rows", "tokens": 240, "tolerance": 0.15}
    proof |= dict.fromkeys(("merged_against_tuned", "base_against_tuned", "merged_against_quantized"), numbers)
    merged = merge.MergedFolder(None, "bfloat16")
    lines = merge_command._describe_proof(proof, merged)
    assert any("--base dequantized" in text for _, text in lines) is is_noted


def change_json(path, **values):
    """Set values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")


def change_weight(base, run):
    path = sorted(base.glob("*.safetensors"))[0]
    tensors = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def zero_adapter(base, run):
    path = run / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def make_checkpoint(base, run):
    change_json(run / "run.json", outcome="running")
    checkpoint = run / "checkpoint-3"
    checkpoint.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / name, checkpoint)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')


FAULTS = {
    "merge.no_run": lambda base, run: (run / "run.json").unlink(),
    "merge.unfinished_run": make_checkpoint,
    "merge.missing_base": lambda base, run: shutil.rmtree(base),
    "merge.other_base": change_weight,
    "merge.nothing_to_merge": lambda base, run: (run / "adapter_config.json").unlink(),
    "merge.damaged_adapter": lambda base, run: change_json(run / "adapter_config.json", r=8),
    "merge.inert_adapter": zero_adapter,
    "merge.unsupported": lambda base, run: change_json(run / "adapter_config.json", init_lora_weights="pissa"),
    "merge.output_exists": lambda base, run: (run.parent / "merged").mkdir() or (run.parent / "merged/a").touch(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_and_nothing_is_left_behind(fault, qwen, tmp_path, capsys):
    base, run = qwen
    FAULTS[fault](base, run)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    capsys.readouterr()
    assert cli.main(["merge", str(run), "-o", str(tmp_path / "merged"), "--json"]) == 2
    assert [entry["code"] for entry in json.loads(capsys.readouterr().out)["faults"]] == [fault]
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def cut(path):
    """Keep the first 300 bytes of a file."""
    path.write_bytes(path.read_bytes()[:300])


DAMAGES = {
    "cut weights": (lambda run: cut(run / "adapter_model.safetensors"), "the file is damaged"),
    "another rank": (lambda run: change_json(run / "adapter_config.json", r=8), "size mismatch"),
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), "no tokenizer can be loaded"),
    "empty tokenizer": (lambda run: (run / "tokenizer.json").write_text("{}"), "KeyError: 'added_tokens'"),
    "IA3": (lambda run: change_json(run / "adapter_config.json", peft_type="IA3"), "of the kind IA3 is not"),
    "LoftQ": (
        lambda run: change_json(run / "adapter_config.json", init_lora_weights="loftq"),
        "`init_lora_weights: loftq` is not merged",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_or_other_adapter_is_refused_with_what_is_wrong(damage, qwen, run_merge):
    _, run = qwen
    change, words = DAMAGES[damage]
    change(run)
    code, text, _ = run_merge(run)
    assert (code, words in text) == (2, True), text


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_an_unfinished_run_is_merged_by_its_step(qwen, run_merge):
    base, run = qwen
    make_checkpoint(base, run)
    code, text, _ = run_merge(run)
    assert (code, "--at 3" in text) == (2, True)
    code, text, record = run_merge(run, "--at", "3")
    assert code == 0, text
    assert record["adapter"]["folder"].endswith("checkpoint-3")
    code, text, _ = run_merge(run, "--at", "7", output="other")
    assert (code, "Write one of 3." in text) == (2, True)


@pytest.mark.filterwarnings("ignore")
def test_lora_bias_on_a_layer_without_bias_is_refused_before_anything_is_written(tmp_path, run_merge, monkeypatch):
    base = build_base(tmp_path / "base")
    run = build_run(tmp_path / "run", base, target_modules=["q_proj"], lora_bias=True)
    monkeypatch.setattr(merge.Merger, "write", lambda *_: pytest.fail("it began to write"))
    code, text, _ = run_merge(run)
    assert code == 2
    assert "lora_bias" in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sum_of", ["nothing", "twice"])
def test_wrong_merge_is_caught_by_the_proof(sum_of, qwen, tmp_path, run_merge, monkeypatch):
    _, run = qwen
    real = merge.Merger._convert

    def spoil(self, tensors):
        wrong = {}
        for name, tensor in tensors.items():
            base = self.read_base(name).float()
            wrong[name] = base if sum_of == "nothing" else 2 * tensor - base
        return real(self, wrong)

    monkeypatch.setattr(merge.Merger, "_convert", spoil)
    code, text, _ = run_merge(run)
    assert code == 2
    assert "explains at most 0.15" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


@pytest.mark.filterwarnings("ignore")
def test_dtype_that_loses_what_was_trained_is_refused(tmp_path, run_merge):
    base = build_base(tmp_path / "base", dtype="bfloat16")
    run = build_run(tmp_path / "run", base, scale=1e-5, init_lora_weights=True, **LINEAR)
    code, text, _ = run_merge(run)
    assert (code, "loses what was trained" in text) == (2, True)
    assert run_merge(run, "--dtype", "float32")[0] == 0


@pytest.mark.filterwarnings("ignore")
def test_small_memory_limits_the_proof_to_tensors(qwen, run_merge, monkeypatch):
    monkeypatch.setattr(merge_proof, "read_available_memory", lambda: 1000)
    code, text, record = run_merge(qwen[1])
    assert (code, record["proof"]["covers"]) == (0, "tensors")
    assert "tensors only" in text


@pytest.mark.filterwarnings("ignore")
def test_small_disk_is_refused_before_writing(qwen, run_merge, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda _: usage)
    code, text, _ = run_merge(qwen[1])
    assert (code, "are free" in text) == (2, True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_leaves_nothing_and_the_same_command_works_again(number, qwen, tmp_path, run_merge, monkeypatch):
    real = merge.Merger.write

    def interrupt(self, folder):
        real(self, folder)
        os.kill(os.getpid(), number)
        return real(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(merge.Merger, "write", interrupt)
        code, text, _ = run_merge(qwen[1])
    assert (code, "nothing is left behind" in text) == (128 + number, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]
    (tmp_path / ".merged.part").mkdir()  # as a process that was killed leaves it
    (tmp_path / ".merged.part" / "model.safetensors").write_text("half")
    assert run_merge(qwen[1])[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged", "run"]


ARCHITECTURES = {"Llama": {}, "Qwen2": {}, "Gemma": {"tied": True}, "Phi": {}, "Mistral": {}}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", merge.DTYPES)
def test_merged_tensors_of_an_architecture_equal_those_of_peft(name, dtype, tmp_path, run_merge):
    base = build_base(tmp_path / "base", name, **ARCHITECTURES[name])
    run = build_run(tmp_path / "run", base, **LINEAR)
    code, text, _ = run_merge(run, "--dtype", dtype)
    assert code == 0, text
    merged, expected = load_merged(tmp_path / "merged"), merge_with_peft(run, base)
    assert all(torch.equal(tensor, expected[key].to(getattr(torch, dtype))) for key, tensor in merged.items())
