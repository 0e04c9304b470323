"""`preview`: rows as the model sees them, on a terminal, in HTML, in a notebook; `prepare`: tokens ahead of time."""

import json
import re

import pytest
import torch
from conftest import RECIPE, jsonl

import trl_sft
from trl_sft import load_recipe
from trl_sft.cli.preview import rows as preview_rows


@pytest.fixture
def show(here, go):
    def call(rows, *words, keywords="", data=""):
        jsonl(here / "r.jsonl", rows)
        return go(
            RECIPE.replace("train: rows.jsonl", f"train: {{path: r.jsonl{keywords}}}{data}"),
            *words,
            command=["preview"],
        )

    return call


CHAT = [{"question": f"q{n}", "answer": f"answer {n}"} for n in range(9)]


def test_tokens_with_loss_are_marked_and_special_tokens_are_visible(show, here):
    code, out, err = show(CHAT)
    assert code == 0, err
    assert "── r.jsonl row 1 (line 1): " in out
    assert "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n⟦answer 0⟧⟦<|im_end|>⟧\n" in out
    assert out.count("── r.jsonl row") == 3
    assert "format question_answer, wording chat" in out
    assert "tokens    " in out
    assert not (here / "out").exists()


def test_rows_option_sets_the_number_of_rows(show):
    assert show(CHAT, "--rows", "5")[1].count("── r.jsonl row") == 5
    assert show(CHAT, "--rows", "0")[0] == 2


def test_truncated_end_is_marked_and_rejected_row_is_named(show):
    rows = [{"question": "q", "answer": "yes " * 50}, {"question": "q " * 90, "answer": "a"}]
    code, out, _ = show(rows, "train.max_length=40")
    assert code == 0
    assert re.search(r"✂ \d+ tokens are truncated", out)
    assert "left out: r.jsonl row 2 (line 2): no loss tokens within max_length 40" in out


def test_packed_layout_of_the_first_batch_is_shown(show):
    code, out, _ = show(CHAT, "train.packing=true", "train.max_length=64")
    assert code == 0
    assert re.search(r"pack      1 of the first batch: \d+ \+ \d+.* tokens, \d+ of padding", out)


def test_html_page_escapes_the_text_of_rows(show, here):
    rows = [{"question": "<script>alert(1)</script> & \"'", "answer": "<b>x</b>"}] * 3
    code, out, _ = show(rows, "--html", "page.html")
    assert code == 0
    page = (here / "page.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in page
    assert "<b>x" not in page
    assert "class='trained special'>&lt;|im_end|&gt;</span>" in page
    assert "wrote page.html. Next: open it in a browser." in out


def test_control_characters_of_rows_are_shown_as_codes(show):
    _, out, _ = show([{"question": "q\x1b[31m", "answer": "a\x07"}] * 3)
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "q\\x1b[31m" in out


def test_preview_has_colours_for_a_terminal_and_html_for_a_notebook(here):
    jsonl(here / "r.jsonl", CHAT)
    (here / "recipe.yaml").write_text(RECIPE.replace("rows.jsonl", "r.jsonl"))
    preview = trl_sft.show(load_recipe("recipe.yaml"), 1)
    assert "\x1b[32manswer 0\x1b[0m\x1b[7;32m<|im_end|>\x1b[0m" in "\n".join(preview.lines(colour=True))
    assert "<pre>" in preview._repr_html_()
    assert isinstance(preview, preview_rows.Preview)


def test_only_the_first_rows_are_read(here, monkeypatch):
    """A fault at the end of a large file is not met."""
    with (here / "r.jsonl").open("w") as file:
        for n in range(200_000):
            file.write(json.dumps({"question": f"q{n}" + "x" * 100, "answer": "a"}) + "\n")
        file.write("{broken\n")
    (here / "recipe.yaml").write_text(RECIPE.replace("rows.jsonl", "r.jsonl"))
    preview = preview_rows.build_preview(load_recipe("recipe.yaml"), 2)
    assert [row.name for row in preview.rows] == ["r.jsonl row 1 (line 1)", "r.jsonl row 2 (line 2)"]


def test_preview_refuses_what_a_run_refuses(show):
    code, _, err = show([{"question": "q", "answer": "<|im_end|>"}] * 2)
    assert code == 2
    assert "special_tokens_in_text" in err


def test_run_reads_the_tokens_that_prepare_made(here, go):
    jsonl(here / "rows.jsonl", [{"question": f"Prepare {n}?", "answer": "yes"} for n in range(40)])  # of no other test
    code, out, _ = go(RECIPE, command=["prepare"])
    assert code == 0
    assert "tokenized now" in out
    assert "The tokens are in the cache.\nNext: " in out
    code, out, _ = go(RECIPE)
    assert code == 0
    assert "cache     train: read from" in out


NEEDS_A_GPU = {
    "bf16": ("train.bf16=true",),
    "fp16": ("train.fp16=true",),
    "tf32": ("train.tf32=true",),
    "tracker": ("train.report_to=comet_ml",),
    "kernel": ("train.use_liger_kernel=true",),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the run needs")
@pytest.mark.parametrize("name", NEEDS_A_GPU)
@pytest.mark.parametrize("command", ["preview", "prepare"])
def test_what_the_machine_lacks_is_a_note_and_rows_are_read(go, command, name):
    code, out, err = go(RECIPE, *NEEDS_A_GPU[name], command=[command])
    assert code == 0, err
    if (command, name) != ("preview", "fp16"):  # SFTConfig accepts fp16; what it lacks is the device
        assert "this machine cannot train the run" in out
    assert "rows.jsonl" in out
    assert go(RECIPE, *NEEDS_A_GPU[name])[0] == 2  # training is refused all the same


@pytest.mark.parametrize("command", ["preview", "prepare"])
def test_value_that_no_machine_accepts_is_still_a_fault(go, command):
    code, _, err = go(RECIPE, "train.optim=no_such_optimizer", command=[command])
    assert code == 2
    assert "optim" in err


def test_html_page_marks_line_breaks_and_spaces_with_a_legend(show, here):
    code, _, _ = show([{"question": "two  spaces\nand a line \x1b[1m", "answer": "yes"}], "--html", "page.html")
    assert code == 0
    page = (here / "page.html").read_text(encoding="utf-8")
    assert "two<span class='space'>  </span>spaces<span class='break'></span>\nand a line" in page
    assert "\x1b" not in page
    assert "trained: carries loss" in page
    assert "line break in the text" in page
