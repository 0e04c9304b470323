"""The proof of an export: right exports pass, and each planted fault is named with its step.

The base model has large weights, so that each of them matters; answers are short, and prompts few.
"""

import dataclasses
import json
import shutil

import gguf
import numpy as np
import pytest
from conftest import QUESTIONS, jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sft import cli, errors
from trl_sft.recipe import paths
from trl_sft.serving import base_tensors, merge_proof, model_folder, model_loading, proof
from trl_sft.serving.export import gguf_file, gguf_vocabulary
from trl_sft.serving.prompts import build_renderer
from trl_sft.serving.proof import gguf_tokens, llama_reader, run_prompts, tolerances, trained_reference
from trl_sft.serving.proof.answer_comparison import AnswerComparison, AnswerSummary

RECIPE = """\
model: {{name_or_path: {folder}/base}}
data: {{train: {{path: {folder}/rows.jsonl}}, eval_fraction: 0.2}}
lora: {{r: 4, target_modules: all-linear}}
evaluate: {{generation: {{max_new_tokens: 8}}}}
train:
  output_dir: {folder}/run
  max_steps: 4
  per_device_train_batch_size: 4
  learning_rate: 0.02
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train an adapter on a base of its own, and export it; return the folder with `base`, `run` and `export`."""
    folder = tmp_path_factory.mktemp("proof")
    shutil.copytree(paths.EMBEDDED / "tiny", folder / "base")
    weights = folder / "base" / "model.safetensors"
    tensors = {name: tensor * (4 if tensor.dim() > 1 else 1) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    jsonl(folder / "rows.jsonl", QUESTIONS)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    assert cli.main([str(folder / "recipe.yaml")]) == 0
    options = ["--to", "merged,gguf", "--gguf-type", "f32", "--dtype", "float32", "-o", str(folder / "export")]
    assert cli.main(["export", str(folder / "run"), *options]) == 0
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    """Return the trained model's answers, and how far its base is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_reference, "MOST_ANSWER_TOKENS", 8)
        patch.setattr(run_prompts, "MOST_TRAINING", 4)
        return proof.measure(model_folder.find_model(folder / "run"))


@pytest.fixture
def copy(folder, tmp_path):
    """Return a copy of the merged folder, to plant a fault in."""
    shutil.copytree(folder / "export" / "merged", tmp_path / "copy")
    return tmp_path / "copy"


def prove(path, reference, number_type="float32"):
    """Return the result of the proof of one folder, and its description after a round trip through JSON."""
    result = proof.prove([proof.ExportedModel(proof.MERGED, path, number_type)], reference)
    return result, json.loads(json.dumps(result.describe(), allow_nan=False))


def test_merged_folder_is_proved_on_held_out_prompts_and_training_rows(folder, reference):
    result, content = prove(folder / "export" / "merged", reference)
    assert result.passed, result.faults
    assert (content["prompts"], content["reference"]) == ({"held_out": 8, "training": 4, "own": 0}, "adapter")
    reader = content["exports"][0]["readers"][0]
    assert reader["equal_answers"] == reader["answers"] == reader["prompts"]["equal"] == 12
    assert content["base"]["mean_kl"] > 100 * reader["mean_kl"]
    assert "answers equal 12/12" in str(result.list_lines())


def change_text(path, old, new):
    """Replace a text in a file, where it stands."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def change_json(path, **values):
    """Set values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")


def put_base_weights(copy, folder):
    shutil.copy(folder / "base" / "model.safetensors", copy)


def shift_base_weights(copy, folder):
    tensors = {name: tensor.roll(1, 0) for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})


def lose_stop_token(copy, folder):
    change_json(copy / "generation_config.json", eos_token_id=3)
    change_json(copy / "config.json", eos_token_id=3)
    change_json(copy / "tokenizer_config.json", eos_token="<|endoftext|>")


def double_bos(copy, folder):
    change_text(copy / "chat_template.jinja", "{%- for message", "{{- '<|im_start|>' }}{%- for message")


def set_default_system_prompt(copy, folder):
    change_text(
        copy / "chat_template.jinja",
        "{%- for message",
        "{{- '<|im_start|>system\nBe brief.<|im_end|>\n' }}{%- for message",
    )


FAULTS = {
    "wrong template": (
        "template",
        "prompts are rendered otherwise than in training: prompt 0 differs at token 0",
        lambda copy, _: change_text(copy / "chat_template.jinja", "<|im_start|>", "### "),
    ),
    "another system prompt": ("template", "differs at token 1", set_default_system_prompt),
    "BOS doubled": ("template", "the BOS token is doubled: 12 of 12 prompts", double_bos),
    "stop token lost": ("template", "does not end an answer", lose_stop_token),
    "tied head lost": (
        "merge",
        "lm_head.weight",
        lambda copy, _: change_json(copy / "config.json", tie_word_embeddings=False),
    ),
    "adapter not merged": ("merge", "those of the base model", put_base_weights),
    "another base": ("merge", "are not the trained ones", shift_base_weights),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_of_a_folder_is_named_with_its_step(fault, folder, copy, reference):
    step, words, plant = FAULTS[fault]
    plant(copy, folder)
    result, content = prove(copy, reference)
    assert not result.passed
    assert content["exports"][0]["step_at_fault"] == step
    assert words in result.faults[0].problem


def test_folder_of_a_model_without_a_run_is_proved_on_fixed_prompts(folder):
    alone = proof.measure(model_folder.find_model(folder / "export" / "merged"))
    result, content = prove(folder / "export" / "merged", alone)
    assert (result.passed, content["prompts"]) == (True, {"held_out": 0, "training": 0, "own": 4})
    assert content["base"] is None
    assert any("fixed" in note for note in content["notes"])


ALPACA = """\
model: {{name_or_path: {folder}/base}}
data: {{train: {{path: {folder}/rows.jsonl, wording: alpaca}}, eval_fraction: 0.2}}
evaluate: false
train: {{output_dir: {folder}/alpaca, max_steps: 2, per_device_train_batch_size: 4}}
"""


def test_wording_is_proved_in_chats_too_and_held_out_rows_are_those_of_the_recipe(folder, tmp_path):
    (folder / "alpaca.yaml").write_text(ALPACA.format(folder=folder), encoding="utf-8")
    assert cli.main([str(folder / "alpaca.yaml")]) == 0
    source = model_folder.find_model(folder / "alpaca")
    tokenizer = model_loading.load_tokenizer(source, trusts_code=False)
    prompts = run_prompts.collect(source, build_renderer(source, tokenizer))
    assert [prompts.count(kind) for kind in ("held_out", "training", "own")] == [8, 20, 4]
    assert cli.main(["export", str(folder / "alpaca"), "--to", "merged", "-o", str(tmp_path / "export")]) == 0
    copied = tmp_path / "export" / "merged"
    shutil.copy(folder / "base" / "chat_template.jinja", copied)  # ChatML around a model that learnt Alpaca's wording
    _, content = prove(copied, proof.measure(source))
    assert content["exports"][0]["step_at_fault"] == "template"
    assert content["exports"][0]["readers"][0]["prompts"]["equal"] == 28


def test_data_that_changed_since_the_training_is_replaced_by_recorded_rows(folder, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    change_json(run / "run.json", data=dict.fromkeys(record["data"], "0"))
    source = model_folder.find_model(run)
    tokenizer = model_loading.load_tokenizer(source, trusts_code=False)
    prompts = run_prompts.collect(source, build_renderer(source, tokenizer))
    assert (prompts.count("held_out"), prompts.count("training")) == (8, 3)
    assert any("has changed since the training" in note for note in prompts.notes)
    recorded = next(prompt for prompt in prompts.prompts if prompt.is_rendered)
    assert recorded.content.endswith("<|im_start|>assistant\n")
    assert recorded.ids[-1] == tokenizer(recorded.content, add_special_tokens=False)["input_ids"][-1]


@pytest.fixture(scope="module")
def merged(folder):
    return proof.ExportedModel(proof.MERGED, folder / "export" / "merged", "float32")


@pytest.fixture(scope="module")
def original(folder):
    return next((folder / "export" / "gguf").glob("*.gguf"))


def rewrite(source, target, *, values=None, change=None):
    """Write a GGUF file with other values of its header, or other tensors; return its path.

    Args:
        source: The file.
        target: The new file.
        values: Key -> value in place of that of the file; None = the key is left out.
        change: Returns the new values of a tensor, by its name and values; None = all stay.

    """
    reader, values = gguf.GGUFReader(source), values or {}
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = values.get(name, field.contents())
        if value is not None:
            kind = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, value, field.types[0], kind)
    for name in values.keys() - reader.fields.keys():
        writer.add_uint32(name, values[name])
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        data = change(tensor.name, data) if change else data
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def write_gguf(model, path, number_type):
    """Write the GGUF file of a folder."""
    planned = gguf_file.plan(model, base_tensors.load_on_meta(model), number_type, where="the model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    vocabulary = gguf_vocabulary.build(tokenizer, planned.config.vocab_size, [2], adds_bos=False, where="the model")
    metadata = {"tokenizer.chat_template": CHATML}
    gguf_file.write(planned, dataclasses.replace(vocabulary, pre="llama-bpe"), path, metadata=metadata)


def read_tensors(path):
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def prove_gguf(path, reference, merged):
    return proof.prove([proof.ExportedModel(proof.GGUF, path, "f32")], reference, merged=merged)


def test_gguf_file_is_proved_by_two_readers(original, reference, merged):
    result = prove_gguf(original, reference, merged)
    assert result.passed, result.faults
    transformers_reader, llama = result.describe()["exports"][0]["readers"]
    assert (transformers_reader["reader"], llama["reader"]) == ("transformers", "llama.cpp")
    assert llama["prompts"]["equal"] == llama["answers"] == llama["equal_answers"]
    assert llama["uncompared_probability"] == 0
    assert 0 < llama["worst_kl"] < llama["tolerance"]["worst_kl"]
    assert llama["mean_kl"] < result.reference.base.mean_kl / 1000


def undo_order(name, data):
    """Return Q and K with the order of rows that transformers has, in place of llama.cpp's."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return data
    heads = 4
    return data.reshape(heads, data.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(data.shape)


def swap_layers(name, data, tensors):
    return tensors[name.replace("blk.0", "blk.1")] if "blk.0.ffn" in name else data


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATE, ADD_BOS, BOS = "tokenizer.chat_template", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id"
# fault -> (step, words of the message, header, tensors); the function of the tensors gets those of the whole file too
GGUF_FAULTS = {
    "wrong template": ("template", "rendered otherwise", {TEMPLATE: "{{ messages[0]['content'] }}"}, None),
    "template with an error": (
        "template",
        "chat template parsing error",
        {TEMPLATE: "{{ raise_exception('no') }}"},
        None,
    ),
    "BOS added": ("template", "and the export '<|endoftext|>", {ADD_BOS: True, BOS: 0}, None),
    "stop token lost": ("template", "stop token '<|im_end|>'", {"tokenizer.ggml.eos_token_id": 0}, None),
    "rope theta": ("conversion", "rope_theta is 500000", {"llama.rope.freq_base": 500000.0}, None),
    "norm epsilon": (
        "conversion",
        "rms_norm_eps is 0.1 in the file",
        {"llama.attention.layer_norm_rms_epsilon": 0.1},
        None,
    ),
    "Q and K in another order": (
        "conversion",
        "q_proj.weight differs",
        {},
        lambda name, data, _: undo_order(name, data),
    ),
    "layers swapped": ("conversion", "layers.0.mlp", {}, swap_layers),
    "vocabulary shifted": (
        "conversion",
        "embed_tokens.weight differs",
        {},
        lambda name, data, _: np.roll(data, 1, 0) if name == "token_embd.weight" else data,
    ),
}


QUICK_FAULTS = ("wrong template", "Q and K in another order")  # the others run in `make prove`


@pytest.mark.parametrize(
    "fault", [name if name in QUICK_FAULTS else pytest.param(name, marks=pytest.mark.long) for name in GGUF_FAULTS]
)
def test_planted_fault_of_a_gguf_file_is_named_with_its_step(fault, original, reference, merged, tmp_path):
    step, words, values, change = GGUF_FAULTS[fault]
    tensors = read_tensors(original)
    spoilt = rewrite(
        original,
        tmp_path / "spoilt.gguf",
        values=values,
        change=change and (lambda name, data: change(name, data, tensors)),
    )
    result = prove_gguf(spoilt, reference, merged)
    assert [(verdict.step, words in verdict.fault.problem) for verdict in result.verdicts] == [(step, True)], [
        fault.problem for fault in result.faults
    ]


def test_bos_that_template_and_runtime_both_write_is_a_fault_of_the_template(original, reference, merged, tmp_path):
    path = rewrite(original, tmp_path / "bos.gguf", values={ADD_BOS: True, BOS: 1})
    by_llama = proof.ExportedModel(proof.GGUF, path, "f32")  # llama.cpp leaves out the template's BOS
    by_ollama = dataclasses.replace(by_llama, format=proof.OLLAMA, render=render_as_training)
    result = proof.prove([by_llama, by_ollama], reference, merged=merged)
    assert [verdict.step for verdict in result.verdicts] == ["", "template"]
    assert "the BOS token is doubled: 12 of 12 prompts" in result.faults[0].problem


def render_as_training(messages):
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def test_base_exported_in_place_of_the_tuned_model_is_a_fault_of_the_merge(
    folder, original, reference, merged, tmp_path
):
    write_gguf(folder / "base", tmp_path / "x.gguf", "f32")
    base = read_tensors(tmp_path / "x.gguf")
    spoilt = rewrite(original, tmp_path / "base.gguf", change=lambda name, _: base[name])
    verdict = prove_gguf(spoilt, reference, merged).verdicts[0]
    assert (verdict.step, verdict.fault.code) == ("merge", "proof.wrong_merge")
    assert "those of the base model" in verdict.fault.problem


def test_rounding_beyond_the_tolerance_is_a_fault_of_the_quantization(folder, reference, merged, tmp_path, monkeypatch):
    write_gguf(folder / "export" / "merged", tmp_path / "q8_0.gguf", "q8_0")
    exported = proof.ExportedModel(proof.GGUF, tmp_path / "q8_0.gguf", "q8_0")
    strict = tolerances.Tolerance(1e-9, 1e-9, 0.0)
    monkeypatch.setitem(tolerances._TOLERANCES, "q8_0", strict)
    result = proof.prove([exported], reference, merged=merged)
    assert [(verdict.step, verdict.fault.code) for verdict in result.verdicts] == [
        ("quantization", "proof.lost_in_quantization")
    ]
    assert "--gguf-type f16" in result.faults[0].fix


def test_rounding_that_takes_what_was_trained_is_a_fault_of_the_quantization(folder, reference, tmp_path):
    rounded = AutoModelForCausalLM.from_pretrained(folder / "export" / "merged", dtype="bfloat16")
    shutil.copytree(folder / "export" / "merged", tmp_path / "rounded")
    rounded.save_pretrained(tmp_path / "rounded")
    assert prove(tmp_path / "rounded", reference, "bfloat16")[0].passed
    small = AnswerSummary([AnswerComparison([1e-6]) for _ in reference.answers])
    result, content = prove(tmp_path / "rounded", dataclasses.replace(reference, base=small), "bfloat16")
    assert content["exports"][0]["step_at_fault"] == "quantization"
    assert "has lost what was trained" in result.faults[0].problem


def test_model_that_training_did_not_change_is_not_proved(folder, reference):
    unchanged = AnswerSummary([AnswerComparison([0.0]) for _ in reference.answers])
    result, content = prove(folder / "export" / "merged", dataclasses.replace(reference, base=unchanged))
    assert (content["passed"], result.faults[0].code) == (False, "proof.no_change")


def test_file_that_llama_cpp_cannot_load_is_a_fault_and_not_the_end_of_the_process(original, reference, tmp_path):
    broken = rewrite(original, tmp_path / "broken.gguf", values={"llama.block_count": 3})
    with pytest.raises(errors.RecipeError) as raised:
        llama_reader.read(proof.ExportedModel(proof.GGUF, broken, "f32"), reference)
    assert "llama.cpp cannot use the export" in raised.value.faults[0].problem


def test_tokens_that_end_inside_a_character_are_those_that_llama_cpp_does_not_list(original):
    tokens = gguf_tokens.GgufTokens([b"\xe4", b"\xb8\xad", b"a", b""], {3})
    assert tokens.find_listed([0, 1, 2, 2, 0, 3]) == [False, True, True, True, False, False]
    tokenizer = AutoTokenizer.from_pretrained(paths.EMBEDDED / "tiny")
    text = "Naïve 中文 🙂 = 1\n"
    pieces = gguf_tokens.read(original).pieces
    assert b"".join(pieces[token] for token in tokenizer(text)["input_ids"]) == text.encode()
    listed = llama_reader._align([{"id": 5, "top_logprobs": [{"id": 5, "logprob": -0.5}]}], [4, 5], [False, True])
    assert listed == [None, {5: -0.5}]


def test_small_memory_is_refused_before_a_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(merge_proof, "read_available_memory", lambda: 1000)
    monkeypatch.setattr(model_loading, "load_model", lambda *_, **__: pytest.fail("it loaded the weights"))
    with pytest.raises(errors.RecipeError) as raised:
        proof.measure(model_folder.find_model(folder / "run"))
    assert raised.value.faults[0].code == "proof.memory_too_small"


def test_missing_package_is_named_with_the_line_for_pip(monkeypatch):
    monkeypatch.setattr(proof, "is_installed", lambda name: name != "xllamacpp")
    with pytest.raises(errors.MissingPackage) as raised:
        proof.check_installed()
    assert "pip install 'trl-sft[gguf]'" in raised.value.faults[0].fix
