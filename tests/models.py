"""Toy models for the tests, made on the spot from what the package embeds."""

import json
import shutil

import torch
from tokenizers import processors
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from trl_sft.recipe import paths


def base(folder, tied=True, reserved=()):
    """Write a base model without chat template, whose vocabulary knows no ChatML; return the folder.

    `reserved` are names for the vocabulary's last tokens, kept free as some models keep theirs.
    """
    shutil.copytree(paths.EMBEDDED / "tiny", folder)
    (folder / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>"), encoding="utf-8")
    if reserved:
        file = folder / "tokenizer.json"
        form = json.loads(file.read_text(encoding="utf-8"))
        last = sorted(form["model"]["vocab"], key=form["model"]["vocab"].get)[-len(reserved) :]
        names = dict(zip(last, reserved, strict=True))
        ids = {names[token]: form["model"]["vocab"][token] for token in last}
        form["model"]["vocab"] = {names.get(token, token): number for token, number in form["model"]["vocab"].items()}
        form["model"]["merges"] = [pair for pair in form["model"]["merges"] if "".join(pair) not in names]
        like = form["added_tokens"][0]
        form["added_tokens"] += [like | {"id": ids[name], "content": name} for name in reserved]
        file.write_text(json.dumps(form), encoding="utf-8")
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tokenizer(folder):
    """Return the tokenizer of a folder."""
    return AutoTokenizer.from_pretrained(folder)


def with_bos(folder):
    """Write a base model whose tokenizer begins every text with a token; return the token's id."""
    base(folder)
    made = tokenizer(folder)
    made.bos_token = "<s>"
    begin = made.convert_tokens_to_ids("<s>")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", begin)])
    made.save_pretrained(folder)
    return begin


def slow(folder):
    """Write a model with a slow tokenizer; BERT's old one stands for those that are left."""
    words = ["[PAD]", "[UNK]", "</s>", "What", "is", "plus", "?", "#", ":", "Question", "Answer", *map(str, range(90))]
    shutil.copytree(paths.EMBEDDED / "tiny", folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    settings = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic", "do_lower_case": False}
    settings |= {"subword_tokenizer_type": "wordpiece", "eos_token": "</s>", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert json.loads((folder / "config.json").read_text())["vocab_size"] >= len(words)
    return folder
