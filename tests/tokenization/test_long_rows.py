"""A row far longer than max_length is cut before it is tokenized, and has the tokens of the whole row cut later."""

import dataclasses
import functools
import json
import random
import string

import pytest
from conftest import RECIPE, jsonl
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from trl_sft.data.formats import CHAT, PAIRS, TEXT
from trl_sft.recipe.paths import EMBEDDED
from trl_sft.tokenization import encode, long_rows, regex_spans
from trl_sft.tokenization.encoder import EncodingSettings, build_encoder
from trl_sft.tokenization.render import render_rows
from trl_sft.tokenization.text_beginning import TextCutter

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RANDOM = random.Random(0)
WORDS = ["".join(RANDOM.choices(string.ascii_lowercase, k=RANDOM.randint(1, 9))) for _ in range(200)]
ENDS = [". ", "\n", "? ", "\n\n", "  ", " 123 4567 ", " it's we'll ", "你好世界。"]
CORPUS = [" ".join(RANDOM.choices(WORDS, k=20)) + RANDOM.choice(ENDS) for _ in range(200)]
LENGTH = 24_000  # characters of a text, several times what is tokenized to find a cut
TEXTS = {
    "words": " ".join(RANDOM.choices(WORDS, k=LENGTH // 6)),
    "sentences": "".join(RANDOM.choices(CORPUS, k=LENGTH // 100)),
    "one letter": "a" * LENGTH,
    "two letters": "ab" * (LENGTH // 2),
    "letters": "".join(RANDOM.choices(string.ascii_lowercase, k=LENGTH)),
    "all kinds": "".join(RANDOM.choices(string.ascii_letters + string.digits + " '.,!\n😀é你e\u0301", k=LENGTH)),
    "spaces": "x" + " " * LENGTH + "y",
    "digits": "1" * LENGTH,
    "Chinese": "".join(RANDOM.choices("你好世界的一是不了人我在有。，", k=LENGTH)),
    "emoji": "😀" * LENGTH,
    "accents": "e\u0301" * (LENGTH // 2),
    "lines": "ab\n" * (LENGTH // 3),
    "signs": "!" * LENGTH,
    "contractions": "it's we'll " * (LENGTH // 11),
}


def byte_level(pattern, normalizer=None, **options):
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def sentencepiece_bpe(normalizer, pre_tokenizer):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    return tokenizer


def unigram(split):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    if split:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    return tokenizer


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return tokenizer


PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
KINDS = {
    "GPT-2": lambda: byte_level(GPT2),
    "Llama 3": lambda: byte_level(LLAMA3, ignore_merges=True),
    "Qwen": lambda: byte_level(LLAMA3.replace("{1,3}", ""), normalizers.NFC()),
    "GPT-4o": lambda: byte_level(GPT4O),
    "Llama 2": lambda: sentencepiece_bpe(PREPEND, None),
    "Gemma": lambda: sentencepiece_bpe(
        normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")
    ),
    "T5": lambda: unigram(split=True),
    "Unigram without words": lambda: unigram(split=False),
    "BERT": word_piece,
}
# texts that have to be cut for every kind; the others have to be cut rightly or not at all
ALWAYS_CUT = ("words", "sentences")


@functools.cache
def get_tokenizer(kind):
    tokenizer = KINDS[kind]()
    options = {"special_tokens": ["<unk>", "[UNK]", "<|im_end|>"], "show_progress": False}
    if isinstance(tokenizer.model, models.Unigram):
        trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", **options)
    elif isinstance(tokenizer.model, models.WordPiece):
        trainer = trainers.WordPieceTrainer(vocab_size=400, **options)
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in str(tokenizer.pre_tokenizer) else []
        trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, max_token_length=16, **options)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_text_has_the_first_tokens_of_the_whole(kind):
    tokenizer = get_tokenizer(kind)
    cutter = TextCutter(tokenizer)
    num_tokens = 300
    for name, text in TEXTS.items():
        cut = cutter.find_cut(text, num_tokens, add_special_tokens=True)
        if cut is None:
            assert name not in ALWAYS_CUT
            continue
        beginning, whole = tokenizer.encode(text[:cut]).ids, tokenizer.encode(text).ids
        assert cut < len(text) / 2
        assert len(beginning) > num_tokens
        assert beginning[:num_tokens] == whole[:num_tokens], name


def test_a_text_is_not_cut_at_an_added_token_that_the_rest_completes():
    tokenizer = byte_level(GPT2)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens(["now and then"])
    text = "now and then " * 5000
    cut = TextCutter(tokenizer).find_cut(text, 100, add_special_tokens=True)
    assert cut is None or tokenizer.encode(text[:cut]).ids[:100] == tokenizer.encode(text).ids[:100]


@pytest.mark.parametrize(
    ("pattern", "pair", "expected"),
    [
        (GPT2, "a ", False), (GPT2, " a", True), (GPT2, "a1", False), (GPT2, "ab", True), (LLAMA3, "(a", True),
        (LLAMA3, "a(", False), (LLAMA3, "11", True), (r"\p{N}", "11", False), (GPT4O, "'s", True),
        (r"\w+ \w+", "a ", True),        (r"[^x]", "ab", False), (r"[^x]+", "a ", True),
    ],
)  # fmt: skip
def test_a_pattern_tells_which_characters_a_match_may_hold(pattern, pair, expected):
    assert regex_spans.read_pattern(pattern).may_hold(*pair) is expected


@pytest.mark.parametrize(
    "pattern", [r".+", r"a+?", r"(?<=a)b", r"(a)\1", r"(?:ab)+", r"[a-z&&[^b]]+", r"\p{L}+(?!\S)", "^a"]
)
def test_a_pattern_of_another_kind_is_not_read(pattern):
    assert regex_spans.read_pattern(pattern) is None


@functools.cache
def get_tiny():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED / "tiny")


LONG = "a long answer, " * 20_000
ROWS = {
    CHAT: ([{"role": "user", "content": "hi"}], [{"role": "assistant", "content": LONG}]),
    PAIRS: ("hi", LONG),
    "long prompt": (LONG, "yes"),
    "several answers": (
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": LONG}],
        [{"role": "assistant", "content": "no"}],
    ),
}


@pytest.mark.parametrize("overlong", ["truncate", "truncate_and_end", "drop", "error"])
@pytest.mark.parametrize("name", ROWS)
def test_a_cut_row_has_the_labels_of_the_whole_row(monkeypatch, name, overlong):
    prompt, completion = ROWS[name]
    row_type = PAIRS if isinstance(prompt, str) else CHAT
    loss_on = "completion" if row_type == PAIRS else "assistant"
    settings = EncodingSettings(row_type, loss_on, "<|im_end|>", 100, overlong=overlong)
    encoder = build_encoder(settings, get_tiny(), {})
    batch = {"prompt": [prompt], "completion": [completion]}

    def encode_row():
        rows = list(render_rows(encoder, batch, numbers=[0], check=[True]))
        (texts,) = encode.split_into_batches(encoder, rows)
        return texts[0], encode.label_rows(encoder, texts, encode.tokenize(encoder, texts))

    text, cut = encode_row()
    monkeypatch.setattr(long_rows, "LONG_TEXT", 10**9)
    whole_text, whole = encode_row()
    assert (text.is_beginning, whole_text.is_beginning) == (True, False)
    assert len(text.text) < len(whole_text.text) / 10
    kept = [name for name in cut.rows.column_names if "before_truncation" not in name and name != "is_beginning"]
    assert cut.rows.select_columns(kept)[:] == whole.rows.select_columns(kept)[:]
    assert [reject["reason"] for reject in cut.rejected] == [reject["reason"] for reject in whole.rejected]
    assert all(reject["is_beginning"] for reject in cut.rejected)


def test_a_text_that_cannot_be_cut_is_refused_above_a_limit(monkeypatch):
    monkeypatch.setattr(long_rows, "LONGEST_TEXT", 250_000)
    for max_length, keep_end, reason in ((None, False, "no row is truncated here"), (100, True, "needs all of it")):
        settings = EncodingSettings(TEXT, "all", "<|im_end|>", max_length, keep_end=keep_end)
        encoder = build_encoder(settings, get_tiny(), {})
        short, long = list(render_rows(encoder, {"text": ["a" * 249_000, LONG]}, numbers=[0, 1], check=[True] * 2))
        (rows,) = encode.split_into_batches(encoder, [short, long])
        assert rows[0].text == short.text
        assert rows[1].text == ""
        assert rows[1].bad_row.problem.startswith("the text has 300,010 characters, more than the 250,000")
        assert reason in rows[1].bad_row.problem


def test_the_screen_and_the_ledger_say_that_only_the_beginning_was_tokenized(here, go):
    jsonl(here / "rows.jsonl", [{"question": "hi", "answer": "yes"}, {"question": "hi", "answer": LONG}])
    code, out, _ = go(RECIPE, "run.allow=[truncated_answers]", command=["prepare"])
    assert code == 0
    assert "long      1 row is far longer than max_length: only the beginning was tokenized" in out
    assert " at least " in out
    code, out, _ = go(RECIPE, "data.overlong=drop", command=["prepare", "--json"])
    rows = json.loads(out)["ledger"]["train"]["rows"]
    assert rows["rejected"] == {"longer than max_length 1024": 1}
    assert rows["tokenized_in_part"] == 0


def test_a_chat_of_many_turns_is_rendered_few_times():
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"turn {n}"} for n in range(2000)]
    settings = EncodingSettings(CHAT, "assistant", "<|im_end|>", None)
    encoder = build_encoder(settings, get_tiny(), {})
    renders = []

    def render(messages, tools, add_generation_prompt):
        renders.append(len(messages))
        return original(messages, tools, add_generation_prompt)

    original = encoder.template.render
    encoder = dataclasses.replace(encoder, template=dataclasses.replace(encoder.template, render=render))
    batch = {"prompt": [turns[:1]], "completion": [turns[1:]]}
    (row,) = render_rows(encoder, batch, numbers=[0], check=[True])
    assert [row.text[start:end] for start, end in row.spans] == [f"turn {n}<|im_end|>" for n in range(1, 2000, 2)]
    assert not encoder.search_errors
    assert max(renders) > 1900, "the last answer is among those that are compared"
    assert len(renders) < 200
    unknown = dataclasses.replace(encoder, search_errors=["the search is not used"])
    (row,) = render_rows(unknown, batch, numbers=[0], check=[True])
    assert row.bad_row.code == "template.too_many_answers"
    assert row.bad_row.problem.startswith("the chat has 1,000 answers, too many to render it up to each")
