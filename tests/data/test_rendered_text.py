"""Texts that a template rendered: where the answer begins, and the function that splits them there."""

import re

import pytest
from conftest import RECIPE, jsonl

from trl_sft.data import rendered_text

TEXTS = {
    "alpaca": ("### Instruction:\nhi {n}\n\n### Response:\n", "yes {n}"),
    "chatml": ("<|im_start|>user\nhi {n}<|im_end|>\n<|im_start|>assistant\n", "yes {n}<|im_end|>"),
    "llama-2": ("<s>[INST] hi {n} [/INST] ", "yes {n} </s>"),
    "llama-3": (
        "<|start_header_id|>user<|end_header_id|>\n\nhi {n}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "yes {n}",
    ),
    "gemma": ("<start_of_turn>user\nhi {n}<end_of_turn>\n<start_of_turn>model\n", "yes {n}<end_of_turn>\n"),
    "zephyr": ("<|user|>\nhi {n}</s>\n<|assistant|>\n", "yes {n}</s>"),
    "vicuna": ("A chat. USER: hi {n} ASSISTANT: ", "yes {n}"),
    "own heading": ("### Source:\nhi {n}\n### Translation:\n", "yes {n}"),
    "question and answer": ("Question: hi {n}\nAnswer: ", "yes {n}"),
    "chinese": ("问题：你好{n}\n回答：", "好{n}"),
}


@pytest.mark.parametrize("template", TEXTS)
def test_offered_function_splits_texts_before_the_answer(template):
    prompt, answer = TEXTS[template]
    texts = [(prompt + answer).format(n=n) for n in range(5)]
    namespace = {}
    exec(rendered_text.write_split(rendered_text.find_answer_mark(texts)), namespace)
    for n, text in enumerate(texts):
        assert namespace["split"]({"text": text}) == {
            "prompt": prompt.format(n=n),
            "completion": answer.format(n=n),
        }


@pytest.mark.parametrize("text", ["The sky is blue.", "### Response:\n", ""])
def test_text_without_an_answer_has_no_mark(text):
    assert rendered_text.find_answer_mark([text] * 3) == ""


def test_mark_that_few_texts_have_is_not_offered():
    assert rendered_text.find_answer_mark(["Answer: a", "b", "c", "d"]) == ""


def test_advice_for_rendered_texts_trains_the_answer_when_it_is_followed(go, here, matches):
    jsonl(here / "rows.jsonl", [{"text": "### Instruction:\nhi\n\n### Response:\nyes"}] * 3)
    code, _, err = go(RECIPE, "data.loss_on=completion", command=["preview"])
    assert code == 2
    matches("rendered_text_advice", err)
    (here / "split.py").write_text(re.search(r"`(def split.*?)`", err)[1] + "\n", encoding="utf-8")
    source = re.search(r"Set the source to `(\{.*?\})`", err)[1]
    code, out, err = go(RECIPE, f"data.train={source}", "data.loss_on=completion", command=["preview"])
    assert code == 0, err
    assert "### Response:\n⟦yes⟧" in out


def test_advice_for_texts_without_a_mark_names_a_function(go, here, matches):
    jsonl(here / "rows.jsonl", [{"text": "The sky is blue."}] * 3)
    code, _, err = go(RECIPE, "data.loss_on=assistant", command=["preview"])
    assert code == 2
    matches("text_without_a_mark_advice", err)
