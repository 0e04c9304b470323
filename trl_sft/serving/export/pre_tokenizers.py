"""Finds the rules of llama.cpp that split a text into the same tokens as the tokenizer does.

Inputs: a vocabulary, the tokenizer, texts of the run. Outputs: the vocabulary with the rules, and how it was compared;
or a refusal with the first difference. llama.cpp has its rules in its code, each under a name, so the choice is made by
comparing tokens: of prompts of the run, of texts in many scripts, of random pieces of the vocabulary.
Deliberately not here: the tokens themselves (`gguf_vocabulary`).
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from trl_sft.errors import Fault, TemplateError
from trl_sft.serving.export.gguf_vocabulary import BYTE_LEVEL, Vocabulary
from trl_sft.serving.export.llama_tokenizer import LlamaTokenizer

# Names of llama.cpp's rules, one for each set of rules; those that models of today have come first.
BYTE_LEVEL_RULES = (
    *("llama-bpe", "qwen2", "gpt-2", "gpt-4o", "tekken", "smollm", "deepseek-llm", "deepseek-coder", "deepseek-v3"),
    *("qwen35", "starcoder", "refact", "command-r", "falcon", "dbrx", "smaug-bpe", "chatglm-bpe", "glm4", "olmo"),
    *("stablelm2", "kimi-k2", "seed-coder", "hunyuan", "hunyuan-dense", "superbpe", "trillion", "bailingmoe"),
    *("exaone", "exaone4", "minerva-7b", "chameleon", "viking", "poro-chat", "bloom", "gpt3-finnish", "codeshell"),
    *("jais", "jais-2", "mpt", "youtu", "grok-2", "afmoe", "minimax-m2", "tiny_aya", "a.x-4.0", "mellum2", "default"),
)
PHI_NAME = "phi-3"  # llama.cpp removes white space after the special tokens of a model with this in its name

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure you'd say it's what we've DON'T I'LL they'RE, 'tis o'clock rock'n'roll.",
    "Numbers: 1 12 123 1234 12345 123456789, 3.14159, 1,000,000, 0x1F, 2024-05-17, ½ ² ௧௨௩ ٣٤٥.",
    "tabs\tand  two   three    four     spaces\nnew line\n\ntwo\n\n\nthree\r\nwindows\r\n\r\n \n end  \t ",
    "   leading and trailing   ",
    "def f(x_1, *args):\n    return {'a': x_1[0] ** 2, \"b\": not args}  # ok?",
    "\tif a != b && c || d: pass;//\n/* x/y */",
    "camelCase HTTPServer iPhone McDonald ABCdef aBC XMLHttpRequest2 e.g. U.S.A. !!! ??? ... --- === <<< >>> /// \\\\",
    "Straße naïve café résumé Ångström İstanbul Ελληνικά кириллица Привет, мир! Ёлка",
    "你好，世界。今天天气怎么样？「引号」、《书》——破折号……１２３ＡＢＣ 中英mixed文本123混合",
    "こんにちは世界。カタカナとひらがな、漢字。ー々〜 한국어 문장입니다. 안녕하세요?",
    "مرحبا بالعالم שלום עולם हिन्दी में लिखा สวัสดีชาวโลก ไทย தமிழ் বাংলা ქართული հայերեն",
    "e\u0301 cafe\u0301 n\u0303 o\u0308 a\u0308\u0301 क्षि \u200b zero\u200dwidth \u00a0nbsp \u3000wide \ufeff mark",
    "😀 👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ ✓ → ∑ ∞ € £ ¥ © ® ™ ° § ¶ † ‡ • “quotes” ‘single’ —–… ¿qué? ¡sí!",
    "https://example.com/a/b?c=1&d=e%20f#g user@example.org C:\\dir\\file.txt #tag @name $100 50% a_b-c",
    "<html><b>bold</b></html> [INST] hi [/INST] {{ x }} {% y %} <|x|> <0x0A> ▁ Ġ",
    "a\nb \nc\n d\n  e\t\n\tf \n\n g 1\n2 3\n\n4 .\n, ;\n:",
    "_ __ _a a_ 'a' \"b\" (c) [d] {e} <f> a.b a,b a;b a:b a-b a+b a=b a/b a\\b a|b a~b a`b a^b a&b",
)
_RANDOM_TEXTS, _PIECES = 200, 6


@dataclass(frozen=True)
class TokenComparison:
    """How tokens of llama.cpp were compared with those of the tokenizer.

    Attributes:
        rules: the name of llama.cpp's rules; "" = SentencePiece's.
        prompts: rows of the run and texts in many scripts, rendered as the run renders them; all are equal.
        plain_texts: texts without a template: contents of turns, texts in many scripts.
        plain_differences: those of them that differ: 0, except where a tokenizer of the kind of SentencePiece puts a
            space before a text by a rule that llama.cpp does not have.
        random_texts: random pieces of the vocabulary that were compared.
        random_differences: those of them that differ.
        is_normalized: whether only texts in Unicode's form NFC were compared, to which the tokenizer brings all.

    """

    rules: str
    prompts: int
    plain_texts: int
    plain_differences: int
    random_texts: int
    random_differences: int
    is_normalized: bool

    def describe(self) -> dict[str, Any]:
        """Return the comparison for export.json."""
        return {
            "pre_tokenizer": self.rules or None,
            "equal_prompts": self.prompts,
            "plain_texts": self.plain_texts,
            "plain_texts_that_differ": self.plain_differences,
            "random_texts": self.random_texts,
            "random_texts_that_differ": self.random_differences,
            "only_nfc": self.is_normalized,
        }


@dataclass(frozen=True)
class ComparedTexts:
    """Texts whose tokens are compared.

    Attributes:
        prompts: as the run renders them; their tokens have to be equal.
        plain: without a template.

    """

    prompts: Sequence[str]
    plain: Sequence[str]


class _Candidate(NamedTuple):
    """A vocabulary that gives the tokens of all prompts."""

    vocabulary: Vocabulary
    name: str
    plain_differences: int
    random_differences: int


def choose(
    vocabulary: Vocabulary, tokenizer: Any, texts: ComparedTexts, *, name: str, where: str
) -> tuple[Vocabulary, str, TokenComparison]:
    """Return a vocabulary with rules that give the tokenizer's tokens.

    Args:
        vocabulary: Without rules.
        tokenizer: Of transformers.
        texts: Of the run; the texts in many scripts are added to the plain ones.
        name: `general.name` of the model.
        where: The place that a refusal names.

    Returns:
        The vocabulary, the name that the model needs, and how it was compared.

    Raises:
        TemplateError: No rules of llama.cpp give the same tokens.

    """
    random_texts = _make_random_texts(tokenizer, len(vocabulary.tokens))
    parts = [list(texts.prompts), [*texts.plain, *PROBES], random_texts]
    if vocabulary.normalizes:  # texts in the form NFC are the same in both
        parts = [[unicodedata.normalize("NFC", text) for text in part] for part in parts]
    prompts, plain, randoms = ({text: _encode(tokenizer, text) for text in part} for part in parts)
    best: _Candidate | None = None
    first_difference, furthest = "", -1
    for rules, model_name in _list_candidates(vocabulary, tokenizer, name):
        try:
            llama = LlamaTokenizer(rules, model_name)
        except ValueError:  # this llama.cpp does not have the rules
            continue
        with llama:
            strict = prompts | plain if vocabulary.kind == BYTE_LEVEL else prompts
            equal, difference = _compare(llama, strict, tokenizer)
            if difference:
                if equal > furthest:
                    furthest, first_difference = equal, f"{rules.pre}: {difference}"
                continue
            differences = [sum(llama.encode(text) != ids for text, ids in part.items()) for part in (plain, randoms)]
        candidate = _Candidate(rules, model_name, *differences)
        if best is None or candidate[2:] < best[2:]:
            best = candidate
        if candidate[2:] == (0, 0):
            break
    if best is None:
        problem = "no rules of llama.cpp split a text into the same tokens as the tokenizer does"
        problem += f" (nearest: {first_difference})" if first_difference else ""
        fix = "Export with `--to merged` or `--to vllm`."
        raise TemplateError(Fault(where, problem, fix, code="export.unsupported_tokenizer"))
    comparison = TokenComparison(
        rules=best.vocabulary.pre if vocabulary.kind == BYTE_LEVEL else "",
        prompts=len(prompts),
        plain_texts=len(plain),
        plain_differences=best.plain_differences,
        random_texts=len(randoms),
        random_differences=best.random_differences,
        is_normalized=vocabulary.normalizes,
    )
    return best.vocabulary, best.name, comparison


def _list_candidates(vocabulary: Vocabulary, tokenizer: Any, name: str) -> Iterator[tuple[Vocabulary, str]]:
    """Yield what llama.cpp may be told of a vocabulary, with the name of the model."""
    strips = any(token.special and token.rstrip for token in tokenizer.added_tokens_decoder.values())
    names = [name, f"{name} {PHI_NAME}"] if strips and PHI_NAME not in name.lower() else [name]
    for candidate_name in names:
        if vocabulary.kind == BYTE_LEVEL:
            for rules in BYTE_LEVEL_RULES:
                yield replace(vocabulary, pre=rules), candidate_name
        else:
            for adds_space in (False, True):
                yield replace(vocabulary, adds_space=adds_space), candidate_name


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokenizer's tokens of a text, without those that it adds."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _compare(llama: LlamaTokenizer, expected: dict[str, list[int]], tokenizer: Any) -> tuple[int, str]:
    """Return how many texts are equal before the first that differs, and that difference; "" = none differs."""
    for number, (text, ids) in enumerate(expected.items()):
        tokens = llama.encode(text)
        if tokens != ids:
            pairs = enumerate(zip(tokens, ids, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(ids)))
            rows = (row[max(place - 2, 0) : place + 3] for row in (ids, tokens))
            ours, theirs = ("|".join(map(tokenizer.decode, row)) for row in rows)
            return number, f"token {place + 1} of {text[:40]!r}: {ours!r} there, {theirs!r} in llama.cpp"
    return len(expected), ""


def _make_random_texts(tokenizer: Any, rows: int) -> list[str]:
    """Return texts of random tokens, so that pieces of the vocabulary meet which no text of ours has."""
    generator = random.Random(0)
    special = set(tokenizer.all_special_ids)
    texts = []
    for _ in range(_RANDOM_TEXTS):
        ids = [generator.randrange(min(rows, len(tokenizer))) for _ in range(_PIECES)]
        texts.append(tokenizer.decode([number for number in ids if number not in special]).replace("\ufffd", ""))
    return [text for text in dict.fromkeys(texts) if text]
