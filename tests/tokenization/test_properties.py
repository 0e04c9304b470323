"""What holds for every row: masks never cover the user's text, ends are trained, nothing is lost unseen.

Rows, templates and settings are drawn by hypothesis; `make prove` draws a hundred times as many.
"""

import functools

import models
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_sft.data.formats import CHAT
from trl_sft.recipe import paths
from trl_sft.tokenization import chat_template, encode, render, special_tokens
from trl_sft.tokenization.encoder import EncodingSettings, build_encoder

# what users say and what is answered share no letter, and neither has one of what templates write around them
USER, ANSWER = "qzjQZJ你好 \n\t\x00é!?", "xkvXKV再见 \n😀👩‍👩‍👧.,"
NAMES = ["chatml", "vicuna", "llama3", "qwen2_5", "gemma", "phi3", "qwen3"]


@functools.cache
def tokenizer(name):
    made = models.tokenizer(paths.EMBEDDED / "tiny")
    made.bos_token = "<|endoftext|>"
    made.chat_template = paths.list_templates()[name].read_text()
    special_tokens.install(made, special_tokens.find_special_strings(chat_template.render_trials(made, {})))
    return made


def said(letters):
    return st.text(letters, min_size=1, max_size=40).filter(lambda text: text.strip())


@st.composite
def chats(draw):
    turns = [{"role": "system", "content": draw(said(USER))}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        turns += [{"role": "user", "content": draw(said(USER))}, {"role": "assistant", "content": draw(said(ANSWER))}]
    return turns


def run(name, rows, loss_on="assistant", **how):
    """Return what the pass makes of chats, every row checked by the second way too."""
    made = tokenizer(name)
    encoding_settings = EncodingSettings(CHAT, loss_on, made.eos_token, **{"max_length": None} | how)
    encoder = build_encoder(encoding_settings, made, {})
    batch = {"prompt": [row[:-1] for row in rows], "completion": [row[-1:] for row in rows]}
    numbers = list(range(len(rows)))
    texts = list(render.render_rows(encoder, batch, numbers=numbers, check=[True] * len(rows)))
    return made, encoder, encode.label_rows(encoder, texts, encode.tokenize(encoder, texts))


def few(count):
    relaxed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=relaxed)


def check_masks(name, rows, loss_on):
    """Every run of trained tokens is one answer with its end, and nothing of the user's."""
    rows = [row for row in rows if name not in ("gemma",) or row[0]["role"] != "system"]  # it renders none
    if not rows:
        return
    made, encoder, out = run(name, rows, loss_on)
    for row in out.rows:
        answers = [turn["content"] for turn in rows[row["row"]] if turn["role"] == "assistant"]
        answers = answers[-1:] if loss_on == "last_turn" else answers
        runs, last = [], None
        for i, label in enumerate(row["labels"]):
            if label != -100:
                assert label == row["input_ids"][i]
                runs = [*runs, [label]] if last != i - 1 else [*runs[:-1], [*runs[-1], label]]
                last = i
        texts = [made.decode(part, clean_up_tokenization_spaces=False) for part in runs]
        assert len(texts) == len(answers)
        for text, answer in zip(texts, answers, strict=True):
            assert answer.strip() in text
            assert not set(text.replace("<think>", "").replace("</think>", "")) & set("qzjQZJ你好\t\x00é!?"), text
            assert text.endswith((encoder.template.turn_end, encoder.template.last_turn_end)), "the end is trained"
            assert encoder.template.last_turn_end


def check_nothing_lost(rows, max_length, overlong, keep_end):
    _, _, out = run("chatml", rows, max_length=max_length, overlong=overlong, keep_end=keep_end)
    assert sorted([*out.rows["row"], *(reject["row"] for reject in out.rejected)]) == list(range(len(rows)))
    for row in out.rows:
        assert len(row["input_ids"]) == len(row["labels"]) == min(row["tokens_before_truncation"], max_length)
        assert 0 < row["loss_tokens"] == sum(label != -100 for label in row["labels"])
        if row["tokens_before_truncation"] <= max_length:
            assert row["loss_tokens"] == row["loss_tokens_before_truncation"]
            assert row["has_end_token"]
        if overlong == "truncate_and_end":  # but for rows that are truncated in what a user says
            assert row["has_end_token"] or row["labels"][-1] == -100
    if overlong == "drop":
        assert max(out.rows["tokens_before_truncation"], default=0) <= max_length


drawn_lengths = st.integers(8, 120)
policies = st.sampled_from(["truncate", "truncate_and_end", "drop"])


@few(40)
@given(st.sampled_from(NAMES), st.lists(chats(), min_size=1, max_size=3), st.sampled_from(["assistant", "last_turn"]))
def test_masks_cover_answers_with_their_end_and_nothing_of_the_users(name, rows, loss_on):
    check_masks(name, rows, loss_on)


@few(40)
@given(st.lists(chats(), min_size=1, max_size=4), drawn_lengths, policies, st.booleans())
def test_no_row_is_lost_unseen_however_it_is_cut(rows, max_length, overlong, keep_end):
    check_nothing_lost(rows, max_length, overlong, keep_end and overlong != "truncate_and_end")


@pytest.mark.long
@few(4000)
@given(st.sampled_from(NAMES), st.lists(chats(), min_size=1, max_size=3), st.sampled_from(["assistant", "last_turn"]))
def test_masks_cover_answers_and_nothing_else_in_thousands_of_draws(name, rows, loss_on):
    check_masks(name, rows, loss_on)


@pytest.mark.long
@few(4000)
@given(st.lists(chats(), min_size=1, max_size=4), drawn_lengths, policies, st.booleans())
def test_no_row_is_lost_in_thousands_of_draws(rows, max_length, overlong, keep_end):
    check_nothing_lost(rows, max_length, overlong, keep_end and overlong != "truncate_and_end")


HARD = {
    "nul": ("a\x00b", "c\x00d"),
    "a_megabyte": ("q", "yes no " * 150_000),
    "a_word_of_a_million_letters": ("q", "x" * 1_000_000),
    "a_million_spaces": ("q", "a" + " " * 1_000_000 + "b"),
    "half_a_pair_of_surrogates_as_text": ("q", "a \\ud800 b"),
    "marks_that_combine": ("q", "e" + "\u0301" * 500),
    "other_directions": ("q", "\u202eabc\u202c אבג"),
}


@pytest.mark.long
def test_row_of_ten_megabytes_is_trained_whole():
    HARD["ten_megabytes"] = ("q", "yes no " * 1_500_000)
    test_hard_text_is_trained_whole("ten_megabytes")


@pytest.mark.parametrize("name", HARD)
def test_hard_text_is_trained_whole(name):
    user, answer = HARD[name]
    rows = [[{"role": "user", "content": user}, {"role": "assistant", "content": answer}]]
    made, _, out = run("chatml", rows)
    labels = [label for label in out.rows[0]["labels"] if label != -100]
    assert made.decode(labels, clean_up_tokenization_spaces=False) == answer + "<|im_end|>"
