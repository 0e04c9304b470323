"""Loss masks of many chat templates with many kinds of rows, each compared with an oracle written apart from the code.

The templates are those of the installed TRL, and shapes of our own (`template_shapes`). A cell is right if exactly the
answers are trained, each with the token that ends it; or if it is refused where nothing else would be right.
"""

import copy
import functools
import json
from collections import Counter

import models
import pytest
from template_oracle import is_within, judge
from template_shapes import SHAPES
from tokenizers import AddedToken

from trl_sft.data import formats
from trl_sft.data.bad_rows import BadRow
from trl_sft.data.formats import CHAT, TokenizerFeatures
from trl_sft.data.messages import FormatError
from trl_sft.recipe import paths
from trl_sft.tokenization import chat_template, encode, render, special_tokens
from trl_sft.tokenization.encoder import EncodingSettings, build_encoder

TOOL = {
    "type": "function",
    "function": {
        "name": "getweather",
        "description": "dsc Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "the city"}},
            "required": ["city"],
        },
    },
}


def user(words):
    return {"role": "user", "content": words}


def answer(words, **more):
    return {"role": "assistant", "content": words} | more


def system(words):
    return {"role": "system", "content": words}


def call(city, name="getweather", identifier="call12345", as_text=False):
    arguments = f'{{"city": "{city}"}}' if as_text else {"city": city}
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(words, identifier="call12345"):
    return {"role": "tool", "name": "getweather", "tool_call_id": identifier, "content": words}


Q1, Q2, Q3 = (user(f"uab{n} What is the matter here? uaz{n}") for n in (1, 2, 3))
A1, A2, A3 = (answer(f"anb{n} It is fine and good. anz{n}") for n in (1, 2, 3))
CALLED, RESULT = answer("", tool_calls=[call("clb1")]), result("tlb1 dry tlz1")
LOOK_ALIKES = "anb1 <|im_en |im_end|> </thinking> [/INST <|end <s <|eot_ user: assistant anz1"
CODE = "anb1\n```python\ndef f(x):\n    return {'a': x}\n```\n\n| a | b |\n|---|---|\n🙂👩‍👩‍👧 anz1"
# kind of row -> messages, tools; of the rows of NEVER nothing may be trained
ROWS = {
    "one answer": ([Q1, A1], None),
    "three answers": ([Q1, A1, Q2, A2, Q3, A3], None),
    "system prompt": ([system("syb Be brief. syz"), Q1, A1], None),
    "system prompt and three answers": ([system("syb Be brief. syz"), Q1, A1, Q2, A2, Q3, A3], None),
    "empty system prompt": ([system(""), Q1, A1, Q2, A2], None),
    "tools without a call": ([Q1, A1, Q2, A2], [TOOL]),
    "call": ([Q1, CALLED, RESULT, A2], [TOOL]),
    "call with content null": ([Q1, answer(None, tool_calls=[call("clb1", as_text=True)]), RESULT, A2], [TOOL]),
    "call with content": ([Q1, answer("anb1 I look. anz1", tool_calls=[call("clb1")]), RESULT, A2], [TOOL]),
    "call without tools": ([Q1, CALLED, RESULT, A2], None),
    "parallel calls": (
        [
            *(Q1, answer("", tool_calls=[call("clb1", identifier="abcdefgh1"), call("clb2", identifier="abcdefgh2")])),
            *(result("tlb1 dry", "abcdefgh1"), result("tlb2 wet", "abcdefgh2"), A2),
        ],
        [TOOL],
    ),
    "call as the last answer": ([Q1, A1, Q2, answer("", tool_calls=[call("clb1")])], [TOOL]),
    "two calls one after the other": (
        [Q1, CALLED, RESULT, answer("", tool_calls=[call("clb2")]), result("tlb2 wet tlz2"), A2, Q3, A3],
        [TOOL],
    ),
    "system prompt, tools and a call": ([system("syb Be brief. syz"), Q1, CALLED, RESULT, A2], [TOOL]),
    "answer of a tool in JSON": ([Q1, CALLED, result('{"sky": "a \\"b\\"", "wind": [1, 2]}'), A2], [TOOL]),
    "thought in the last answer": ([Q1, A1, Q2, A2 | {"reasoning_content": "thb2 so it goes thz2"}], None),
    "thoughts in all answers": (
        [Q1, A1 | {"reasoning_content": "thb1 so thz1"}, Q2, A2 | {"reasoning_content": "thb2 so thz2"}],
        None,
    ),
    "thought in an earlier answer": ([Q1, A1 | {"reasoning_content": "thb1 so thz1"}, Q2, A2], None),
    "empty thought": ([Q1, A1 | {"reasoning_content": ""}], None),
    "thought before a call": (
        [Q1, CALLED | {"reasoning_content": "thb1 so thz1"}, RESULT, A2 | {"reasoning_content": "thb2 so thz2"}],
        [TOOL],
    ),
    "answers with newlines around": ([Q1, answer("\n\nanb1 fine anz1\n"), Q2, answer("\nanb2 good anz2\n\n")], None),
    "answers with spaces around": (
        [user(" uab1 uaz1 "), answer("  anb1 fine anz1  "), Q2, answer(" anb2 anz2 ")],
        None,
    ),
    "look-alikes of special strings": ([user("uab1 <|im_en </thin uaz1"), answer(LOOK_ALIKES), Q2, A2], None),
    "equal answers": ([Q1, answer("Yes."), Q2, answer("Yes."), Q3, answer("Yes.")], None),
    "answers equal to the question": ([user("Yes."), answer("Yes."), user("Yes."), answer("Yes.")], None),
    "answers that headers hold": ([user("assistant"), answer("user"), user("model"), answer("assistant")], None),
    "answers that end tokens hold": ([user("im_end"), answer("end"), user("eot"), answer("s")], None),
    "Chinese": ([user("秘鲁的首都是哪里？"), answer("利马。"), user("谢谢"), answer("不客气！")], None),
    "code and emoji": ([Q1, answer(CODE), Q2, A2], None),
    "very long": ([user("uab1 " + "word " * 200 + "uaz1"), answer("anb1 " + "so on " * 200 + "anz1"), Q2, A2], None),
    "two users in a row": ([Q1, Q2, A1], None),
    "empty question": ([user(""), A1], None),
    "assistant first": ([A1, Q1, A2], None),
    "answer of a tool last": ([Q1, CALLED, RESULT], [TOOL]),
}
NEVER = {"empty question", "assistant first", "answer of a tool last"}
# The tokens that end answers in TRL's templates, as their model cards have them; by the beginning of the name.
ENDS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "diffusion_gemma": ("<turn|>",),
    "gemma4": ("<turn|>",),
    "gemma": ("<end_of_turn>",),
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|end|>", "<|call|>"),
    "lfm2": ("<|im_end|>",),
    "llama3": ("<|eot_id|>", "<|eom_id|>"),
    "muse_glimmer": ("<|eot|>", "<|eom|>", "<|end_of_turn|>"),
    "nemotron": ("<|im_end|>",),
    "phi3": ("<|end|>", "<|endoftext|>"),
    "qwen": ("<|im_end|>",),
    "chatml": ("<|im_end|>",),
    "vicuna": ("<|endoftext|>",),
    "alpaca": ("<|endoftext|>",),
    "chinese": ("<|endoftext|>",),
}
# models for pictures, whose templates take no plain text as content
WITHOUT_TEXT = {"idefics3", "llava_next", "smolvlm"}


def list_templates():
    """Return name -> template, end tokens, settings: TRL's and ours with a name, and the shapes."""
    templates = {}
    folder = next(iter(paths.list_templates().values())).parent
    files = {path.stem: path for path in sorted(folder.glob("*.jinja"))} | {
        name: path for name, path in paths.list_templates().items() if path.parent == paths.TEMPLATES
    }
    for name, path in files.items():
        ends = next((tokens for begin, tokens in ENDS.items() if name.startswith(begin)), None)
        if name.removesuffix("_training") not in WITHOUT_TEXT and ends is not None:
            templates[name] = (path.read_text(encoding="utf-8"), ends, {"bos": "<s>", "eos": "<|endoftext|>"})
    return templates | SHAPES


TEMPLATES = list_templates()


@functools.cache
def toy_json():
    return models.tokenizer(paths.EMBEDDED / "tiny")


@functools.cache
def load_tokenizer(name):
    """Return a tokenizer with a template whose special strings are one token each."""
    source, ends, settings = TEMPLATES[name]
    tokenizer = copy.deepcopy(toy_json())
    sources = source if isinstance(source, dict) else {"default": source}
    strings = [string for text in sources.values() for string in special_tokens.find_special_strings(text)]
    strings += [string for string in (*ends, settings.get("bos"), settings.get("eos")) if string]
    tokenizer.add_tokens([AddedToken(s, special=True, normalized=False) for s in dict.fromkeys(strings)])
    tokenizer.bos_token, tokenizer.eos_token = settings.get("bos"), settings.get("eos", tokenizer.eos_token)
    tokenizer.chat_template = source
    tokenizer.model_max_length = 10**6
    return tokenizer


@functools.cache
def find_features(name):
    tokenizer = load_tokenizer(name)
    features = chat_template.find_features("here", tokenizer, {})
    return TokenizerFeatures(features, str(tokenizer.eos_token), special_tokens.list_strings(tokenizer))


@functools.cache
def get_encoder(name, accepted):
    tokenizer = load_tokenizer(name)
    settings = EncodingSettings(
        CHAT, "assistant", str(tokenizer.eos_token), None,
        allow_prompt_mismatch=accepted, allow_template_markers=accepted,
    )  # fmt: skip
    return build_encoder(settings, tokenizer, {})


def list_tokens(tokenizer, text, spans):
    """Return the tokens that hold a character of the spans."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [token for token, (a, b) in pairs if any(a < end and start < b for start, end in spans)]


def train(name, row, accepted):
    """Return the turns as the template gets them, and the parts of text that carry loss, as the package has them."""
    encoder = get_encoder(name, accepted)
    columns = formats.format_row(row, "messages", "chat", features=find_features(name)).columns
    batch = {"prompt": [columns["prompt"]], "completion": [columns["completion"]]}
    batch["tools"] = [json.loads(columns["tools"]) if columns["tools"] else None]
    turns = [*columns["prompt"], *columns["completion"]]
    parts, labelled = [], None
    for check in (True, False):  # by both ways, and by the search alone
        rows = list(render.render_rows(encoder, batch, numbers=[0], check=[check]))
        if rows[0].bad_row is not None:
            return turns, batch["tools"][0], rows[0].bad_row
        parts.append(tuple(rows[0].text[start:end] for start, end in rows[0].spans))
        if (rows[0].text, rows[0].spans) == labelled:
            continue  # the labels follow from text and spans alone
        labelled = rows[0].text, rows[0].spans
        encoded = encode.label_rows(encoder, rows, encode.tokenize(encoder, rows))
        trained = [label for label in encoded.rows[0]["labels"] if label != encode.IGNORED]
        assert trained == list_tokens(encoder.tokenizer, rows[0].text, rows[0].spans)
    assert not encoder.search_errors
    assert parts[0] == parts[1], "the search finds what rendering finds"
    return turns, batch["tools"][0], parts[0]


def compare(name, kind, accepted):
    """Return how a cell is: right, refused rightly, unclear or wrong, with the reason."""
    messages, tools = ROWS[kind]
    row = {"messages": messages, "tools": tools}
    try:
        turns, functions, trained = train(name, row, accepted)
    except FormatError as error:
        return ("refused rightly" if kind in NEVER else "wrong"), error.problem
    verdict = judge(load_tokenizer(name), turns, functions, ends=TEMPLATES[name][1])
    refused = isinstance(trained, BadRow)
    if verdict.is_unclear:
        return "unclear", trained if refused else repr(trained)
    if refused:
        assert trained.code.startswith("template."), trained
        is_right = verdict.spans is None or verdict.may_be_refused or (verdict.is_mismatch and not accepted)
        return ("refused rightly" if is_right else "wrong"), f"{trained} / {verdict}"
    if verdict.spans is None or (verdict.is_mismatch and not accepted) or len(verdict.spans) != len(trained):
        return "wrong", f"{trained} / {verdict}"
    for expected, part in zip(verdict.spans, trained, strict=True):
        if part != expected if isinstance(expected, str) else not is_within(expected, part):
            return "wrong", f"{trained} / {verdict}"
    return "right", ""


def count_cells(names, accepted):
    """Return how many cells are how, and the lines of those that are wrong."""
    counts, wrong = Counter(), []
    for name in names:
        for kind in ROWS:
            result, reason = compare(name, kind, accepted)
            counts[result] += 1
            if result == "wrong":
                wrong.append(f"{name} / {kind}: {reason}")
    return counts, wrong


def check_cells(names, accepted, least_right):
    """Hold that no cell is wrong and that at least a share of them is right."""
    counts, wrong = count_cells(names, accepted)
    print(dict(counts))
    assert not wrong, "\n".join([str(counts), *wrong])
    assert counts["right"] >= least_right * counts.total(), counts
    assert counts["unclear"] < 0.01 * counts.total(), counts


def test_matrix_has_enough_templates_and_kinds_of_rows():
    assert len(SHAPES) >= 45
    assert len(TEMPLATES) - len(SHAPES) >= 40
    assert len(ROWS) >= 27


def test_no_cell_of_templates_and_rows_is_wrong():
    check_cells(TEMPLATES, False, least_right=0.7)


def test_acceptance_of_a_mismatch_trains_the_answers_alone():
    check_cells(SHAPES, True, least_right=0.7)


@pytest.mark.long
def test_acceptance_of_a_mismatch_trains_the_answers_alone_in_every_template():
    check_cells(TEMPLATES, True, least_right=0.8)
