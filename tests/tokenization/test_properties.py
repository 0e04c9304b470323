"""What holds for every row: masks never cover the user's text, ends are trained, nothing is lost unseen.

Rows, templates and settings are drawn by hypothesis; `make prove` draws a hundred times as many.
"""

import functools

import models
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_sft.recipe import paths
from trl_sft.tokenization import chat_template, encode, render, special_tokens

# what users say and what is answered share no letter, and neither has one of what templates write around them
USER, ANSWER = "qzjQZJ你好 \n\t\x00é!?", "xkvXKV再见 \n😀👩‍👩‍👧.,"
NAMES = ["chatml", "vicuna", "llama3", "qwen2_5", "gemma", "phi3", "qwen3"]


@functools.cache
def tokenizer(name):
    made = models.tokenizer(paths.EMBEDDED / "tiny")
    made.bos_token = "<|endoftext|>"
    made.chat_template = paths.list_templates()[name].read_text()
    special_tokens.install(made, special_tokens.written(chat_template.everything(made, {})))
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
    plan = encode.Plan(encode.CHAT, loss_on, made.eos_token, **{"max_length": None} | how)
    encoder = encode.encoder(plan, made, {})
    batch = {"prompt": [row[:-1] for row in rows], "completion": [row[-1:] for row in rows]}
    numbers = list(range(len(rows)))
    texts = list(render.rendered(encoder, batch, numbers, [True] * len(rows), str))
    return made, encoder, encode.labelled(encoder, texts, encode.encoded(encoder, texts), str)


def few(count):
    relaxed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=relaxed)


def check_masks(name, rows, loss_on):
    """Every run of trained tokens is one answer with its end, and nothing of the user's."""
    rows = [row for row in rows if name not in ("gemma",) or row[0]["role"] != "system"]  # it renders none
    if not rows:
        return
    made, encoder, out = run(name, rows, loss_on)
    for number, ids, labels in zip(out.number, out.input_ids, out.labels, strict=True):
        answers = [turn["content"] for turn in rows[number] if turn["role"] == "assistant"]
        answers = answers[-1:] if loss_on == "last_turn" else answers
        runs, last = [], None
        for i, label in enumerate(labels.tolist()):
            if label != -100:
                assert label == ids[i]
                runs = [*runs, [label]] if last != i - 1 else [*runs[:-1], [*runs[-1], label]]
                last = i
        texts = [made.decode(part, clean_up_tokenization_spaces=False) for part in runs]
        assert len(texts) == len(answers)
        for text, answer in zip(texts, answers, strict=True):
            assert answer.strip() in text
            assert not set(text.replace("<think>", "").replace("</think>", "")) & set("qzjQZJ你好\t\x00é!?"), text
            assert text.endswith((encoder.shape.closing, encoder.shape.final)), "the end is trained"
            assert encoder.shape.final


def check_nothing_lost(rows, max_length, overlong, keep_end):
    _, _, out = run("chatml", rows, max_length=max_length, overlong=overlong, keep_end=keep_end)
    assert sorted([*out.number, *(row["number"] for row in out.rejected)]) == list(range(len(rows)))
    for ids, labels, total, target, trained, ended in zip(*out[:2], *out[3:7], strict=True):
        assert len(ids) == len(labels) == min(total, max_length)
        assert 0 < trained == sum(label != -100 for label in labels.tolist())
        if total <= max_length:
            assert (trained, ended) == (target, True)
        if overlong == "truncate_and_end":  # but for rows that are cut in what a user says
            assert ended or labels[-1] == -100
    if overlong == "drop":
        assert max(out.total, default=0) <= max_length


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
    labels = [label for label in out.labels[0].tolist() if label != -100]
    assert made.decode(labels, clean_up_tokenization_spaces=False) == answer + "<|im_end|>"
