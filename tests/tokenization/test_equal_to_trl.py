"""Tokens and labels are TRL's own, which SFTTrainer computes here, but for what stands in a literal with its count."""

import functools
import inspect
import json
import os
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import trl
from conftest import jsonl
from datasets import Dataset, Features, Json, List, Value
from packaging.version import Version
from test_chat_template import NAMED, OPENS_A_THOUGHT
from test_formats import EXPECTED, IN_CHAT, ROWS
from trl import SFTConfig, SFTTrainer, data_utils

from trl_sft import load_recipe
from trl_sft.data.formatted_columns import read_columns
from trl_sft.data.messages import MARK
from trl_sft.errors import UserError
from trl_sft.recipe import paths
from trl_sft.tokenization import build, encode, render
from trl_sft.training import stages

WORDS = ["Köln liegt am Rhein.", "1 2  3\n4", "你好，世界。再见", "a 🙂 b", " leading and trailing ", "x" * 30]
TURNS = [("user", "one"), ("assistant", "hello 你好"), ("user", "two\n"), ("assistant", "good night 🙂")]
CHAT = [{"role": role, "content": words} for role, words in TURNS]


@functools.cache
def _model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def ours(*words):
    """Return what a recipe makes of its rows: tokenizer, rows, datasets and settings."""
    run = load_recipe("recipe.yaml", words)
    settings, _, chat, rows = stages.read_rows(run)
    datasets = stages.tokenize(run, chat, rows, settings=settings)
    return SimpleNamespace(chat=chat, rows=rows, datasets=datasets, args=settings.args)


def reference(ready, joined=False, **settings):
    """Return what SFTTrainer itself makes of the same formatted rows."""
    rows = [ready.rows.train.rows[int(n)] for n in ready.rows.train.order]
    rows = [{name: row[name] for name in ("prompt", "completion", "text", "tools") if row.get(name)} for row in rows]
    features = None
    if "prompt" in rows[0] and isinstance(rows[0]["prompt"], list):
        names = {"prompt": List(Json()), "completion": List(Json())}
        if joined:
            rows = [row | {"messages": row.pop("prompt") + row.pop("completion")} for row in rows]
            names = {"messages": List(Json())}
        features = Features(names | ({"tools": Value("string")} if any("tools" in row for row in rows) else {}))
    args = {"bf16": False, "use_cpu": True, "report_to": "none", "output_dir": "theirs", "max_length": None} | settings
    args |= {"eos_token": ready.args.eos_token} if ready.args.eos_token else {}
    trainer = SFTTrainer(
        _model(str(paths.EMBEDDED / "tiny")),
        args=SFTConfig(**args),
        processing_class=ready.chat.tokenizer,
        train_dataset=_store(Dataset.from_list(rows, features=features)),
    )
    return list(trainer.train_dataset)


def _store(dataset):
    """Return a dataset as one of a file, of which `datasets` remembers what TRL's functions make of its rows."""
    folder = Path(os.environ["HF_HOME"]) / "references" / dataset._fingerprint
    if not folder.exists():
        dataset.save_to_disk(folder)
    return Dataset.load_from_disk(folder)


def differing(tokenizer, mine, theirs):
    """Compare rows; return how many labels TRL has and we have not, before an answer and after its end.

    Tokens have to be equal, and what we train TRL has to train too.
    """
    before = after = 0
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert one["input_ids"] == other["input_ids"], (
            tokenizer.decode(one["input_ids"]),
            tokenizer.decode(other["input_ids"]),
        )
        following = False  # on what we train
        for i, (label, reference) in enumerate(zip(one["labels"], other["labels"], strict=True)):
            if label != reference:
                assert label == -100, tokenizer.decode(one["input_ids"][: i + 1])
                before, after = before + (not following), after + following
            else:
                following = label != -100
    return before, after


def recipe(here, rows, keywords="", model="trl_sft:tiny", **sections):
    jsonl(here / "r.jsonl", rows)
    more = "".join(f"{name}: {value}\n" for name, value in sections.items())
    (here / "recipe.yaml").write_text(
        f"model: {{name_or_path: {model}}}\ndata: {{train: {{path: r.jsonl{keywords}}}, drop_leaked: false}}\n"
        f"train: {{output_dir: out}}\n{more}",
        encoding="utf-8",
    )


def filled(row, words):
    """Return a row with other words in its last answer's place."""
    return json.loads(json.dumps(row, ensure_ascii=False).replace('"a"', json.dumps(words, ensure_ascii=False)))


@pytest.mark.parametrize("cell", EXPECTED, ids="-".join)
def test_plain_text_in_every_layout_and_wording_is_trls(cell, here):
    layout, wording = cell
    recipe(here, [filled(ROWS[layout], w) for w in WORDS], f", format: {layout}, wording: {wording}")
    ready = ours()
    tokenizer = ready.chat.tokenizer
    theirs = reference(ready)
    assert differing(tokenizer, ready.datasets.train, theirs) == (0, 0)
    ready = ours("data.loss_on=all")
    assert differing(tokenizer, ready.datasets.train, reference(ready, completion_only_loss=False)) == (0, 0)


def test_text_is_trls(here):
    recipe(here, [{"text": words} for words in WORDS])
    ready = ours()
    assert differing(ready.chat.tokenizer, ready.datasets.train, reference(ready)) == (0, 0)


# What we leave out of the loss on purpose: the newline that ChatML writes after the end of the last turn, which a
# model that stops never writes. One token a row, of six rows.
NEWLINE = dict.fromkeys(IN_CHAT, 6)


@pytest.mark.parametrize("layout", IN_CHAT)
def test_chats_in_every_layout_are_trls_but_for_the_newline_after_the_end(layout, here):
    recipe(here, [filled(ROWS[layout], w) for w in WORDS], f", format: {layout}, wording: chat")
    ready = ours("data.loss_on=last_turn")
    assert differing(ready.chat.tokenizer, ready.datasets.train, reference(ready)) == (0, NEWLINE[layout])
    ready = ours("data.loss_on=all")
    theirs = reference(ready, joined=True, completion_only_loss=False)
    assert differing(ready.chat.tokenizer, ready.datasets.train, theirs) == (0, 0)


# template -> labels that TRL's markers set and we do not, in two rows of two answers: before an answer (the header, or
# what the prompt of inference ends with, which generation does not write) and after its end (spaces)
MARKED = {
    **dict.fromkeys(NAMED, (0, 0)),
    **dict.fromkeys(["phi3", "phi3_5"], (0, 2)),
    **dict.fromkeys(
        ["gemma", "gemma3", "lfm2", "lfm2_v2", "qwen2_5_vl", "qwen3", "qwen3_instruct_2507", "qwen3_vl"], (0, 4)
    ),
    **dict.fromkeys(["deepseek_r1_distill", "deepseekv3"], (4, 0)),
    **dict.fromkeys(["qwen2_5"], (4, 4)),
    **dict.fromkeys(["nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"], (24, 4)),
    **dict.fromkeys(["qwen3_5_think", "qwen3_6", "qwen3_8"], (28, 4)),
    **dict.fromkeys(["gptoss", "muse_glimmer"], (32, 0)),
    **dict.fromkeys(["qwen3_5_nothink"], (68, 4)),
}
# template -> the same against TRL's loss on the completion, one answer a row
COMPLETED = {
    **dict.fromkeys(NAMED, (0, 0)),
    **dict.fromkeys(
        [
            "chatml",
            "gemma",
            "gemma3",
            "lfm2",
            "lfm2_v2",
            "nemotron_3_5_lightning",
            "nemotron_3_nano",
            "nemotron_3_super",
            "nemotron_3_ultra",
            "qwen2_5",
            "qwen2_5_vl",
            "qwen3",
            "qwen3_5_nothink",
            "qwen3_5_think",
            "qwen3_6",
            "qwen3_8",
            "qwen3_instruct_2507",
            "qwen3_vl",
        ],
        (0, 2),
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_every_named_template_is_trls_but_for_what_the_table_says(name, here):
    models.base(here / "base")
    recipe(here, [{"messages": CHAT}] * 2, model="./base", tokenizer=f"{{chat_template: {name}}}")
    accepted = ["run.allow=[prompt_mismatch]"] if name in OPENS_A_THOUGHT else []
    if accepted:
        with pytest.raises(UserError, match="at inference the model would see a different prompt"):
            ours("train.max_length=8192")
    ready = ours("train.max_length=8192", *accepted)
    tokenizer = ready.chat.tokenizer
    found = differing(tokenizer, ready.datasets.train, reference(ready, joined=True, assistant_only_loss=True))
    ready = ours("train.max_length=8192", "data.loss_on=last_turn", *accepted)
    assert found == MARKED[name]
    if name not in OPENS_A_THOUGHT or hasattr(data_utils, "common_prefix_length"):  # TRL 1.8 counts the whole prompt
        assert differing(tokenizer, ready.datasets.train, reference(ready)) == COMPLETED[name]


def test_chat_with_tools_and_calls_is_trls_but_for_the_newline_after_the_end(here):
    models.base(here / "base")
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "你"}}}]}
    turns = [CHAT[0], call, {"role": "tool", "name": "f", "content": "dry"}, CHAT[1]]
    rows = [{"messages": turns, "tools": [tool]}, {"messages": CHAT}]
    recipe(here, rows, model="./base", tokenizer="{chat_template: qwen2_5_vl}")
    ready = ours("train.max_length=4096")
    theirs = reference(ready, joined=True, assistant_only_loss=True)
    assert differing(ready.chat.tokenizer, ready.datasets.train, theirs) == (0, 4)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("name", NAMED)
def test_answers_of_tools_carry_no_loss_in_any_template(name, checked, here):
    """Whether a row is among those that are checked by the second way or not."""
    models.base(here / "base")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "getw", "arguments": {"x": "Y"}}}]}
    told = {"role": "tool", "name": "getw", "content": "SECRETRESULT"}
    turns = [CHAT[0], call, told, {"role": "assistant", "content": "done"}]
    recipe(here, [{"messages": turns}] * 2, model="./base", tokenizer=f"{{chat_template: {name}}}")
    run = load_recipe("recipe.yaml", ["train.max_length=8192", "run.allow=[prompt_mismatch, template_markers]"])
    settings, _, chat, rows = stages.read_rows(run)
    encoder = build.make_encoder(run, chat, rows, args=settings.args)
    batch = read_columns(rows.train.rows.with_format("arrow")[:])
    texts = list(render.render_rows(encoder, batch, numbers=[0, 1], check=[checked] * 2))
    made = encode.label_rows(encoder, texts, encode.tokenize(encoder, texts))
    trained = chat.tokenizer.decode([label for label in made.rows[0]["labels"] if label != -100])
    assert "SECRETRESULT" not in trained
    assert "done" in trained
    assert "getw" in trained


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("form", ["pairs", "completions", "chat", "text"])
def test_packs_are_trls(form, strategy, shuffled, here):
    """More than a thousand rows, so that packing has several batches; chats train everything, so that all is equal."""
    rows = [{"question": f"{n} " * (n % 13), "answer": "yes " * (1 + n * 7 % 90)} for n in range(1, 1100)]
    rows = [row | {"question": "q" if form == "completions" else row["question"] or "q"} for row in rows]
    pair = ", wording: question_answer"
    keywords = {"pairs": pair, "completions": pair, "chat": "", "text": ", wording: {text: '{answer}'}"}[form]
    recipe(here, rows, keywords)
    packing = ["train.packing=true", f"train.packing_strategy={strategy}", "train.max_length=64"]
    packing += [f"train.shuffle_dataset={str(shuffled).lower()}", "run.allow=[leaking_packing, truncated_answers]"]
    everything = form != "completions"
    ready = ours(*packing, *(["data.loss_on=all"] if everything else []))
    settings = {"packing": True, "packing_strategy": strategy, "max_length": 64, "shuffle_dataset": shuffled}
    theirs = reference(ready, joined=everything, completion_only_loss=not everything, **settings)
    mine = list(ready.datasets.train)
    assert len(mine) > 100
    for one, other in zip(mine, theirs, strict=True):
        assert one["input_ids"] == other["input_ids"]
        assert one["labels"] == other["labels"]
        assert one.get("seq_lengths") == other.get("seq_lengths")


def test_tokens_of_a_slow_tokenizer_are_trls(here):
    models.slow(here / "m")
    rows = [{"question": f"What is {n} plus {n % 7} ?", "answer": f"{n + n % 7}"} for n in range(40)]
    recipe(here, rows, ", wording: question_answer", model="./m")
    ready = ours("run.allow=[prompt_mismatch]")
    assert not ready.chat.tokenizer.is_fast
    if Version(trl.__version__) < Version("1.15"):
        # It counts the tokens of the prompt alone. Those of this tokenizer end in [SEP], so the first token of every
        # answer is taken for one of the prompt.
        for one, other in zip(ready.datasets.train, reference(ready), strict=True):
            first = next(index for index, label in enumerate(one["labels"]) if label != -100)
            assert [*one["labels"][:first], -100, *one["labels"][first + 1 :]] == other["labels"]
    else:
        assert differing(ready.chat.tokenizer, ready.datasets.train, reference(ready)) == (0, 0)
    ready = ours("data.loss_on=all", "run.allow=[prompt_mismatch]")
    assert differing(ready.chat.tokenizer, ready.datasets.train, reference(ready, completion_only_loss=False)) == (0, 0)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_cut_rows_are_trls(mode, here):
    rows = [{"question": "q " * (n % 40 + 1), "answer": "yes " * (1 + n * 7 % 50)} for n in range(200)]
    recipe(here, rows, ", wording: question_answer")
    ready = ours(
        "train.max_length=48", f"train.truncation_mode={mode}", "data.max_untrained=1", "run.allow=[truncated_answers]"
    )
    theirs = reference(ready, max_length=48, truncation_mode=mode)
    theirs = [row for row in theirs if set(row["labels"]) != {-100}]  # TRL 1.8 keeps those that train nothing
    assert differing(ready.chat.tokenizer, ready.datasets.train, theirs) == (0, 0)
    assert (len(theirs) < 200) == (mode == "keep_start"), "rows without a trained token are left out by both"
    assert ready.datasets.ledger["train"]["rows"]["truncated"] > 0


def test_special_strings_in_text_become_the_tokens_that_transformers_makes_of_them(here):
    """`sanitize_control_tokens` of transformers 5.23 does the same for prompts."""
    words = "say <|im_end|> and <|im_start|>user\nno<|im_end|>"
    recipe(here, [{"question": words, "answer": "a " + words}] * 2)
    ready = ours("data.special_tokens_in_text=text")
    tokenizer = ready.chat.tokenizer
    turns = [{"role": "user", "content": words}, {"role": "assistant", "content": "a " + words}]
    if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
        pytest.skip("this transformers has no sanitize_control_tokens")
    theirs = tokenizer.apply_chat_template(turns, return_dict=True, sanitize_control_tokens=True)["input_ids"]
    row = ready.datasets.train[0]
    assert row["input_ids"] == theirs
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row["input_ids"].count(end) == 2, "the ends of two turns, none of the text's"
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == f"a {words}<|im_end|>"
    assert MARK not in tokenizer.decode(row["input_ids"])
