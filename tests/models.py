"""Writes variants of the toy model into a folder: base model, tokenizer with BOS, slow tokenizer."""

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_sft.recipe import paths


def base(folder, tied=True, reserved=()):
    """Write a base model without a chat template and without ChatML tokens; return the folder.

    `tied` sets `tie_word_embeddings`. `reserved` lists names of added tokens that replace the last tokens of the
    vocabulary, as some models reserve tokens for later use.
    """
    return shutil.copytree(_build_base(tied, tuple(reserved)), folder)


@functools.cache
def _build_base(tied, reserved):
    """Write the model that `base` copies, once in a process."""
    folder = Path(tempfile.mkdtemp(dir=os.environ["HF_HOME"])) / "base"
    shutil.copytree(paths.EMBEDDED / "tiny", folder)
    (folder / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>"), encoding="utf-8")
    if reserved:
        file = folder / "tokenizer.json"
        tokenizer_json = json.loads(file.read_text(encoding="utf-8"))
        model = tokenizer_json["model"]
        last_tokens = sorted(model["vocab"], key=model["vocab"].get)[-len(reserved) :]
        names = dict(zip(last_tokens, reserved, strict=True))
        ids = {names[token]: model["vocab"][token] for token in last_tokens}
        model["vocab"] = {names.get(token, token): token_id for token, token_id in model["vocab"].items()}
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in names]
        first_added = tokenizer_json["added_tokens"][0]
        tokenizer_json["added_tokens"] += [first_added | {"id": ids[name], "content": name} for name in reserved]
        file.write_text(json.dumps(tokenizer_json), encoding="utf-8")
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tokenizer(folder):
    """Load the tokenizer of a folder."""
    return AutoTokenizer.from_pretrained(folder)


def with_bos(folder):
    """Write a base model whose tokenizer adds a BOS token to every text; return the token's id."""
    base(folder)
    bos_tokenizer = tokenizer(folder)
    bos_tokenizer.bos_token = "<s>"
    bos_token_id = bos_tokenizer.convert_tokens_to_ids("<s>")
    bos_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", bos_token_id)]
    )
    bos_tokenizer.save_pretrained(folder)
    return bos_token_id


def slow(folder):
    """Write a model with a slow tokenizer (BertJapaneseTokenizer), one of the last without a fast version."""
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


def merging(folder):
    """Write a model whose tokenizer has tokens over the border of words: space with `yes`, several line breaks."""
    shutil.copytree(paths.EMBEDDED / "tiny", folder)
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = ["Q: hi\nA: yes\n\n\n\nwhat assistant user system think\n\n"] * 300
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    fast.save_pretrained(folder)
    return folder
