"""The tokens of a prompt, as inference makes them, against the beginning of what is trained."""

import functools
import itertools
import random

import models as models_of_tests
import pytest
from conftest import jsonl
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.trainer import sft_trainer

from trl_sft import load_recipe
from trl_sft.data.formats import PAIRS as TEXT_PAIRS
from trl_sft.errors import TemplateError
from trl_sft.recipe import paths
from trl_sft.tokenization import cache, encode, prompt_tokens
from trl_sft.tokenization.encoder import EncodingSettings, build_encoder
from trl_sft.tokenization.render import render_rows
from trl_sft.training import stages

PIECES = (
    *("yes", "no", "A", ":", "Q", " ", "  ", "\n", "\n\n", "\t", " yes", "\nyes", "hello", "ing", "'", "'ll", "don"),
    *("123", "4567", "0", "...", "!?", "<x>", "é", "e", "\u0301", "你好", "世界", "。", "🙂", "\u00a0", "\u3000"),
    *(
        "한",
        "\u1112",
        "\u1161",
        "\u11ab",
        "ﬁ",
        "f",
        "i",
        "_",
        "-",
        "ſ",
        "ı",
        "Köln",
        "<|im_end|>",
        "<|rstrip|>",
        "<|lstrip|>",
    ),
)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def texts():
    rng = random.Random(0)
    return ["".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(3000)]


def train(tokenizer, trainer_class, **keywords):
    keywords = {
        "vocab_size": 700,
        "show_progress": False,
        "special_tokens": ["<unk>", "[UNK]", "<s>", "</s>"],
    } | keywords
    tokenizer.train_from_iterator(texts(), trainer_class(**keywords))
    return tokenizer


def byte_level(pattern=None, trim=False, **model):
    tokenizer = Tokenizer(models.BPE(**model))
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return train(tokenizer, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def sentencepiece(model, trainer, scheme, **keywords):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, **keywords)
    more = {"unk_token": "<unk>"} if trainer is trainers.UnigramTrainer else {}
    return train(tokenizer, trainer, **more)


@functools.cache
def build(name):
    if name in ("gpt2", "gpt2_trimmed"):
        backend = byte_level(trim=name != "gpt2")
    elif name == "qwen":
        backend = byte_level(QWEN)
        backend.normalizer = normalizers.NFC()
    elif name == "llama3":
        backend = byte_level(LLAMA, trim=True)
        backend.model.ignore_merges = True
    elif name == "llama3_bos":
        backend = byte_level(LLAMA, trim=True)
        template = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    elif name == "appends_eos":
        backend = byte_level()
        backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    elif name == "llama2":
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        train(backend, trainers.BpeTrainer)
    elif name == "mistral":
        backend = sentencepiece(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, "first", split=False)
    elif name == "unigram":
        backend = sentencepiece(models.Unigram(), trainers.UnigramTrainer, "always")
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    elif name == "unigram_stripped":
        backend = sentencepiece(models.Unigram(), trainers.UnigramTrainer, "always")
        backend.normalizer = normalizers.Strip()
    else:
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=name == "wordpiece_lower")
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        train(backend, trainers.WordPieceTrainer)
    added = [AddedToken("<|im_end|>", special=True, normalized=False), AddedToken("<x>", normalized=True)]
    added += [AddedToken("<|rstrip|>", rstrip=True, special=True), AddedToken("<|lstrip|>", lstrip=True, special=True)]
    backend.add_tokens(added)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZERS = (
    *("gpt2", "gpt2_trimmed", "qwen", "llama3", "llama3_bos", "appends_eos", "llama2", "mistral", "unigram"),
    *("unigram_stripped", "wordpiece", "wordpiece_lower"),
)


def compare(name, rng, number):
    """Return how many prompts differ, of all; both ways have to agree on each."""
    tokenizer = build(name)
    backend = tokenizer.backend_tokenizer
    prompts = prompt_tokens.build_prompt_tokenizer(tokenizer, backend, add_special_tokens=True)
    counts = [0, 0]
    plainly = prompt_tokens.differs_plainly
    for _ in range(number):
        prompt = "".join(rng.choices(PIECES, k=rng.randint(1, 6)))
        text = prompt + "".join(rng.choices(PIECES, k=rng.randint(1, 4)))
        encoding = backend.encode(text)
        row = prompt_tokens.TokenizedText(text, encoding, encoding.ids)
        expected = plainly(prompts, row, len(prompt))
        assert prompt_tokens.differs(prompts, row, len(prompt)) == expected, (prompt, text)
        counts[expected] += 1
    return counts[1], counts[0]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_token_at_the_end_of_a_prompt_decides_like_tokenizing_the_prompt_alone(name):
    different, alike = compare(name, random.Random(1), 4000)
    assert different > 100, "the draws have no prompt that differs"
    assert alike > 100 or name == "appends_eos"


PAIRS = [
    {"prompt": "Q: hi\nA: ", "completion": "yes"},  # at inference the last token is a space
    {"prompt": "Q: hi\nA:", "completion": " yes"},
    {"prompt": "Q: hi\nA:\n", "completion": "yes"},
    {"prompt": "Q: hi\nwh", "completion": "at"},  # one token of both
]
RECIPE = "model: {name_or_path: ./merging}\ndata: {train: {path: r.jsonl, wording: plain}}\ntrain: {output_dir: out}\n"
ACCEPT = "run.allow=[prompt_mismatch]"


@pytest.fixture(autouse=True)
def merging_model(request):
    if "here" in request.fixturenames:
        models_of_tests.merging(request.getfixturevalue("here") / "merging")


def prepare(here, rows, *overrides, text=RECIPE):
    """Return what a recipe makes before weights load."""
    jsonl(here / "r.jsonl", rows)
    (here / "recipe.yaml").write_text(text, encoding="utf-8")
    return stages.prepare(load_recipe("recipe.yaml", overrides))


def flags(inputs):
    """Return for each row whether its prompt has other tokens at inference, as the ledger counts it."""
    encoder = inputs.datasets.encoder
    encoded = cache.encode_in_memory(inputs.rows.train, encoder, title="")
    rows = dict(zip(encoded.rows["row"], encoded.rows["prompt_mismatch"], strict=True))
    assert inputs.datasets.ledger["train"]["prompt_mismatch"] == sum(rows.values())
    return [rows[number] for number in range(len(rows))]


def trl_warns(inputs, number, monkeypatch):
    """Tell whether TRL says of a row that its prompt is no beginning of prompt and completion."""
    warnings = []
    for name in ("warning", "warning_once"):  # TRL 1.8 to 1.14 warn for every row, later ones once
        monkeypatch.setattr(sft_trainer.logger, name, lambda text, *_: warnings.append(text))
    row = inputs.rows.train.rows[number]
    row = {name: row[name] for name in ("prompt", "completion")}
    SFTTrainer(
        AutoModelForCausalLM.from_pretrained(paths.EMBEDDED / "tiny"),
        args=SFTConfig(bf16=False, use_cpu=True, report_to="none", output_dir="theirs"),
        processing_class=inputs.chat.tokenizer,
        train_dataset=Dataset.from_list([row]),
    )
    wordings = (
        "not a prefix of the tokenized prompt+completion",
        "Mismatch between tokenized prompt and the start of tokenized prompt+completion",  # TRL 1.8 to 1.14
    )
    return any(wording in text for wording in wordings for text in warnings)


def test_pairs_are_flagged_where_trl_warns(here, monkeypatch):
    inputs = prepare(here, PAIRS, ACCEPT)
    found = flags(inputs)
    assert found == [trl_warns(inputs, number, monkeypatch) for number in range(len(PAIRS))]
    assert found[:3] == [True, False, False]


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_a_prompt_that_ends_in_a_space_is_refused_with_what_to_write(loss_on, here, go):
    jsonl(here / "r.jsonl", PAIRS[:2])
    code, _, err = go(RECIPE, f"data.loss_on={loss_on}", command=["prepare"])
    assert code == 2
    assert "r.jsonl row 1 (line 1): 1 of 2 rows of train have other prompt tokens at inference than in training" in err
    assert "-> Move the white space at the end of the prompt to the beginning of the completion." in err
    assert "run.allow: [prompt_mismatch]" in err
    code, out, _ = go(RECIPE, f"data.loss_on={loss_on}", ACCEPT, command=["prepare"])
    assert code == 0
    assert "prompts   1 of 2 rows of train have other prompt tokens at inference than in training" in out


def test_a_few_prompts_with_other_tokens_are_counted_and_trained(here, go):
    jsonl(here / "r.jsonl", [PAIRS[0], *[PAIRS[1] | {"prompt": f"Q: {n}\nA:"} for n in range(30)]])
    code, out, _ = go(RECIPE, command=["check"])
    assert code == 0
    assert "prompts   1 of 31 rows of train have other prompt tokens at inference" in out


def test_an_answer_that_begins_with_line_breaks_merges_with_the_header(here, go):
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\n\nHello"}]}]
    text = RECIPE.replace(", wording: plain", "")
    jsonl(here / "r.jsonl", rows)
    code, _, err = go(text, command=["check"])
    assert code == 2
    assert "the prompt ends with the tokens" in err
    assert "-> Remove the white space at the beginning of the answers." in err
    jsonl(here / "r.jsonl", [{"messages": [*rows[0]["messages"][:1], {"role": "assistant", "content": "Hello"}]}])
    code, out, _ = go(text, command=["check"])
    assert code == 0
    assert "prompts " not in out


def test_a_stream_is_refused_for_other_prompt_tokens_in_its_later_rows(here):
    good = [PAIRS[1] | {"prompt": f"Q: {n}\nA:"} for n in range(300)]
    bad = [PAIRS[0] | {"prompt": f"Q: {n}\nA: "} for n in range(2000)]
    text = RECIPE.replace("r.jsonl", "r.jsonl, streaming: true").replace("out}", "out, max_steps: 1}")
    inputs = prepare(here, good + bad, text=text)
    with pytest.raises(TemplateError) as refused:
        list(itertools.islice(inputs.datasets.train, 2300))
    assert "of the first 1,000 rows, one of them r.jsonl row" in refused.value.faults[0].problem
    assert refused.value.faults[0].code == "template.prompt_mismatch"
    inputs = prepare(here, good + bad, ACCEPT, text=text)
    list(itertools.islice(inputs.datasets.train, 2300))
    assert inputs.datasets.stream_counts["r.jsonl"]["prompt_mismatch"] == 2000


def test_spaces_at_the_beginning_of_a_completion_carry_loss_where_offsets_leave_them_out():
    tokenizer = build("gpt2_trimmed")
    settings = EncodingSettings(TEXT_PAIRS, "completion", "<|im_end|>", None)
    encoder = build_encoder(settings, tokenizer, {})
    batch = {"prompt": ["A:"], "completion": ["   yes"]}
    rows = list(render_rows(encoder, batch, numbers=[0], check=[True]))
    encoded = encode.label_rows(encoder, rows, encode.tokenize(encoder, rows))
    labels = [token for token in encoded.rows[0]["labels"] if token != encode.IGNORED]
    assert tokenizer.decode(labels) == "   yes<|im_end|>"
