"""Tokens of a chat template: those the vocabulary holds, reserved ones, else added; trained, saved, stopped on."""

import json

import models
import pytest
import torch
from conftest import jsonl
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from trl_sft import load_recipe, train, upstream_warnings
from trl_sft.model import patches
from trl_sft.tokenization import special_tokens

RESERVED = [f"<|reserved_special_token_{n}|>" for n in range(3)]
RECIPE = """\
model: {{name_or_path: ./base}}
tokenizer: {{chat_template: chatml}}
{how}data: {{train: rows.jsonl}}
train:
  output_dir: out
  max_steps: {steps}
  learning_rate: 1e-2
  per_device_train_batch_size: 8
  save_strategy: 'no'
"""
LORA = "lora: {r: 4, target_modules: all-linear}\n"
HOW = {
    "full": "",
    "lora": LORA,
    "8-bit": LORA + "quantization: {load_in_8bit: true}\n",
    "4-bit": LORA + "quantization: {load_in_4bit: true, bnb_4bit_quant_type: nf4}\n",
}
BITS = {
    "8-bit": BitsAndBytesConfig(load_in_8bit=True),
    "4-bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("how", HOW)
def test_added_tokens_are_trained_saved_and_stopped_on(how, tied, here, monkeypatch):
    """The embedding grows to exactly len(tokenizer); under LoRA only the new rows of it change."""
    models.base(here / "base", tied)
    (here / "recipe.yaml").write_text(RECIPE.format(how=HOW[how], steps=40))
    result, live, before = run_with_embeddings(monkeypatch, here)

    tokenizer = models.tokenizer(result.output_dir)
    assert len(tokenizer) == 514
    new = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert new == [512, 513]
    assert tokenizer.eos_token == "<|im_end|>"
    rows = [module.weight.detach() for module in (live.get_input_embeddings(), live.get_output_embeddings())]
    for old, now in zip(before, rows, strict=True):
        assert now.shape[0] == 514
        changed = (old != now).any(1).nonzero().flatten().tolist()
        assert set(new) <= set(changed)
        assert how == "full" or changed == new

    with upstream_warnings.quiet():
        again = reloaded(how, here, len(tokenizer))
    prompt = [{"role": "user", "content": "What is 3 plus 3?"}]
    given = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    live.eval()
    with torch.no_grad(), upstream_warnings.quiet():
        difference = (live(**given).logits - again.eval()(**given).logits).abs().max().item()
    assert difference == 0.0
    again.generation_config = GenerationConfig.from_pretrained(result.output_dir)
    assert new[1] in again.generation_config.eos_token_id
    with upstream_warnings.quiet():
        assert answer(again, given, tokenizer).endswith("<|im_end|>")


def reloaded(how, here, rows):
    """Load what was saved: all of it, or the adapter on its base loaded the same way."""
    if how == "full":
        return AutoModelForCausalLM.from_pretrained(here / "out")
    base = AutoModelForCausalLM.from_pretrained(here / "base", quantization_config=BITS.get(how))
    base.resize_token_embeddings(rows)
    again = PeftModel.from_pretrained(base, here / "out")
    patches.repair(again)
    for name, weights in again.named_parameters():
        if how in BITS and ("lora_" in name or "trainable_tokens" in name):
            weights.data = weights.data.to(torch.bfloat16)  # as TRL trained and saved them; peft loads float32
    return again


def run_with_embeddings(monkeypatch, here):
    """Run the recipe; return the result, the live model and its embeddings from before the first step."""
    from trl_sft.training import run

    seen = {}
    make = run.build_trainer

    def build_and_copy_embeddings(*arguments):
        trainer = seen["trainer"] = make(*arguments)
        ends = trainer.model.get_input_embeddings(), trainer.model.get_output_embeddings()
        seen["before"] = [module.weight.detach().clone() for module in ends]
        return trainer

    monkeypatch.setattr(run, "build_trainer", build_and_copy_embeddings)
    result = train(load_recipe("recipe.yaml"))
    return result, seen["trainer"].model, seen["before"]


def answer(model, given, tokenizer):
    made = model.generate(**given, max_new_tokens=64, do_sample=False)[0, given["input_ids"].shape[1] :]
    return tokenizer.decode(made)


def test_adapter_holds_the_new_rows_and_no_whole_embedding(here):
    from safetensors import safe_open

    models.base(here / "base", tied=False)
    (here / "recipe.yaml").write_text(RECIPE.format(how=LORA, steps=2))
    out = train(load_recipe("recipe.yaml")).output_dir
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        rest = {key: file.get_slice(key).get_shape() for key in file.keys() if "lora_" not in key}  # noqa: SIM118
    assert len(rest) == 2
    assert all(shape == [2, 64] for shape in rest.values())


def test_training_goes_on_with_an_adapter_that_brought_tokens(here, go):
    models.base(here / "base")
    code, out, _ = go(RECIPE.format(how=LORA, steps=3))
    assert code == 0
    assert "the embedding grows from 512 to 514 rows" in out
    text = "model: {name_or_path: ./out}\ndata: {train: rows.jsonl}\ntrain: {output_dir: more, max_steps: 2}\n"
    code, out, err = go(text)
    assert code == 0, err
    assert " -m trl_sft chat more\n" in out
    assert " -m trl_sft merge more -o more-merged\n" in out
    assert "AutoPeftModelForCausalLM" in (here / "more" / "README.md").read_text()
    assert len(models.tokenizer(here / "more")) == 514
    code, _, err = go(text, "tokenizer.chat_template=llama3", "train.output_dir=third")
    assert code == 2
    assert "is an adapter, which learns no further tokens" in err


def test_printed_next_command_stops_by_itself(here, go):
    """What the last screen says to type works for an adapter with tokens of its own."""
    import subprocess
    import sys

    models.base(here / "base", tied=False)
    code, out, _ = go(RECIPE.format(how=LORA, steps=40))
    assert code == 0
    (words,) = [line.partition(" -m ")[2] for line in out.splitlines() if " -m trl_sft chat " in line]
    command = f"{sys.executable} -m {words} --prompt 'What is 2 plus 2?'"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) < 12


def test_reserved_tokens_are_taken_before_any_is_added(here, monkeypatch):
    models.base(here / "base", reserved=RESERVED)
    (here / "recipe.yaml").write_text(RECIPE.format(how=LORA, steps=2))
    result, live, before = run_with_embeddings(monkeypatch, here)
    tokenizer = models.tokenizer(result.output_dir)
    assert len(tokenizer) == 512
    assert tokenizer.convert_ids_to_tokens([509, 510, 511]) == ["<|im_start|>", "<|im_end|>", RESERVED[2]]
    assert tokenizer("<|im_start|>hi<|im_end|>")["input_ids"][::3] == [509]
    now = live.get_input_embeddings().weight
    assert (before[0] != now).any(1).nonzero().flatten().tolist() == [509, 510]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordlevel"])
def test_reserved_token_keeps_its_id_under_the_new_name(kind, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = ["<unk>", "a", "b", "<unused0>", "<unused1>"]
    numbered = {word: number for number, word in enumerate(words)}
    model = {
        "bpe": lambda: kinds.BPE(numbered, [], unk_token="<unk>"),
        "unigram": lambda: kinds.Unigram([(word, -1.0) for word in words], 0, byte_fallback=False),
        "wordlevel": lambda: kinds.WordLevel(numbered, unk_token="<unk>"),
    }[kind]()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>")
    installed = special_tokens.install(tokenizer, ["<|im_end|>"])
    assert installed.reserved == {"<|im_end|>": "<unused0>"}
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert one.convert_tokens_to_ids("<|im_end|>") == 3
        assert one("a<|im_end|>b")["input_ids"][1:2] == [3]
        assert len(one) == 5


def test_token_of_the_vocabulary_is_used_as_it_is(here, go):
    """trl_sft:tiny holds ChatML's tokens: nothing is added, nothing grows."""
    code, out, _ = go(RECIPE.format(how="", steps=1).replace("./base", "trl_sft:tiny"))
    assert code == 0
    assert "<|im_start|>, <|im_end|> as the vocabulary has it" in out
    assert "not learned" not in out


def test_special_string_that_is_only_in_the_vocabulary_gets_its_own_id(here):
    """As <s> would be cut into <, s, > by a tokenizer that lists it but was never told that it is special."""
    tokenizer = models.tokenizer(models.base(here / "base"))
    word = "<|thing|>"
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    last = max(form["model"]["vocab"], key=form["model"]["vocab"].get)
    form["model"]["vocab"] = {word if t == last else t: n for t, n in form["model"]["vocab"].items()}
    form["model"]["merges"] = [pair for pair in form["model"]["merges"] if "".join(pair) != last]
    from tokenizers import Tokenizer

    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(form))
    assert special_tokens.find_split_strings(tokenizer, [word])
    installed = special_tokens.install(tokenizer, [word])
    assert installed.existing == [word]
    assert tokenizer(word)["input_ids"] == [511]


def test_user_named_extra_tokens_are_added_and_trained_too(here, go):
    text = RECIPE.format(how=LORA, steps=1).replace("./base", "trl_sft:tiny")
    code, out, _ = go(text, "tokenizer={extra_special_tokens: [<|note|>]}")
    assert code == 0
    assert "1 tokens that the model has not learned (<|note|>): the embedding grows from 512 to 513 rows" in out


def test_whole_embedding_in_the_recipe_is_left_to_peft(here, go):
    models.base(here / "base", tied=False)
    how = (
        "lora: {r: 4, target_modules: all-linear, exclude_modules: lm_head, modules_to_save: [embed_tokens, lm_head]}\n"
    )
    code, _, err = go(RECIPE.format(how=how, steps=1))
    assert code == 0, err
    saved = json.loads((here / "out" / "adapter_config.json").read_text())
    assert saved["trainable_token_indices"] is None


def test_row_indices_of_the_recipe_beside_new_tokens_are_refused(here, go):
    models.base(here / "base")
    code, _, err = go(RECIPE.format(how="lora: {r: 4, trainable_token_indices: [3]}\n", steps=1))
    assert code == 2
    assert "the new tokens [512, 513] are then trained automatically" in err


def test_end_token_follows_the_template_and_is_said(here, go):
    """A tokenizer with a template whose end token is another, as base models of Qwen have it."""
    import shutil

    from trl_sft.recipe import paths

    shutil.copytree(paths.EMBEDDED / "tiny", here / "m")
    config = here / "m" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "<|endoftext|>"}))
    text = "model: {name_or_path: ./m}\ndata: {train: rows.jsonl}\ntrain: {output_dir: out, max_steps: 1}\n"
    assert go(text)[0] == 0
    assert GenerationConfig.from_pretrained(here / "out").eos_token_id in (2, [2])
    assert models.tokenizer(here / "out").eos_token == "<|im_end|>"
    assert "eos_token" in (here / "out" / "resolved.yaml").read_text()
    code, _, err = go(text, "train.eos_token=<|endoftext|>", "train.output_dir=b")
    assert code == 2
    assert "ends the assistant's turns with <|im_end|>" in err


def test_tokens_of_the_recipe_are_learned_also_where_the_embedding_has_rows_to_spare(here, monkeypatch):
    """As Qwen's has: 151,936 rows for 151,665 tokens. No row is added, and the new tokens' are trained."""
    from transformers import AutoConfig, LlamaForCausalLM

    models.base(here / "base")
    config = AutoConfig.from_pretrained(here / "base")
    config.vocab_size = 600
    LlamaForCausalLM(config).save_pretrained(here / "base")
    text = RECIPE.format(how=LORA, steps=2).replace("chatml}", "chatml, extra_special_tokens: [<|note|>]}")
    (here / "recipe.yaml").write_text(text)
    jsonl(here / "rows.jsonl", [{"question": f"{n} <|note|>", "answer": "b"} for n in range(16)])
    _, live, before = run_with_embeddings(monkeypatch, here)
    now = live.get_input_embeddings().weight
    assert now.shape[0] == 600
    assert (before[0] != now).any(1).nonzero().flatten().tolist() == [512, 513, 514]


def test_reserved_tokens_that_the_configuration_lists_do_not_come_back(here):
    tokenizer = models.tokenizer(models.base(here / "base", reserved=RESERVED))
    tokenizer.extra_special_tokens = RESERVED
    tokenizer.save_pretrained(here / "base")
    tokenizer = models.tokenizer(here / "base")
    special_tokens.install(tokenizer, ["<|im_end|>"])
    tokenizer.save_pretrained(here / "again")
    again = models.tokenizer(here / "again")
    assert len(again) == 512
    assert again.convert_tokens_to_ids("<|im_end|>") == 509


@pytest.mark.parametrize("saved", ["[embed_tokens]", "[lm_head]", "[model.embed_tokens]"])
def test_one_end_of_the_embedding_in_the_recipe_leaves_the_other_untrained_and_is_refused(saved, here, go):
    models.base(here / "base", tied=False)
    how = f"lora: {{r: 4, target_modules: [q_proj], modules_to_save: {saved}}}\n"
    code, _, err = go(RECIPE.format(how=how, steps=1))
    assert code == 2
    assert "lora.modules_to_save" in err
    assert "modules_to_save: [embed_tokens, lm_head]" in err
