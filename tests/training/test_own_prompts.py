"""`evaluate.prompts`: read strictly, worded as the rows are, answered by step with and without an evaluation set."""

import json
from pathlib import Path

import pytest
from conftest import RECIPE, jsonl

LINES = RECIPE.replace("  save_strategy: 'no'\n", "  save_steps: 2\n")
SHORT = "evaluate.generation={max_new_tokens: 4, do_sample: true}"


def read_own(folder="out"):
    samples = [json.loads(line) for line in Path(folder, "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return [sample for sample in samples if sample.get("number") is not None], samples


def read_losses(folder):
    entries = map(json.loads, Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_prompts_of_a_file_are_answered_at_each_evaluation_and_change_nothing_in_training(go, here):
    text = LINES.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}")
    rows = [{"prompt": "What is <b>1</b>?"}, {"messages": [{"role": "user", "content": "Who?\x1b[31m"}]}]
    jsonl(here / "prompts.jsonl", rows)
    words = ("train.max_steps=4", "train.eval_strategy=steps", "train.eval_steps=2", SHORT)
    code, out, err = go(text + "evaluate: {prompts: prompts.jsonl}\n", *words)
    assert code == 0, err
    own, samples = read_own()
    assert [sample["number"] for sample in own] == [0, 1]
    assert all(sample["row"] is None and sample["reference"] is None for sample in own)
    assert own[0]["prompt"] == [{"role": "user", "content": "What is <b>1</b>?"}]
    assert all(isinstance(sample[side], str) for sample in own for side in ("before", "after"))
    assert [list(sample["steps"]) for sample in own] == [["2"]] * 2
    assert len(samples) == 2 + 8  # held-out rows keep their comparison, without answers by step
    assert not any("steps" in sample for sample in samples[:8])
    assert json.loads(Path("out/eval.json").read_text())["prompts"] == 8
    for line in ("answers before training", "answers at step 2", "answers after training"):
        assert f"{line} to evaluate.prompts (" in out
    assert "\x1b[31m" not in out
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "What is &lt;b&gt;1&lt;/b&gt;?" in page
    assert str(here / "prompts.jsonl") in Path("out/resolved.yaml").read_text()
    assert go(text, *words, "train.output_dir=alone")[0] == 0
    assert read_losses("out") == read_losses("alone")


def test_without_an_evaluation_set_prompts_are_answered_at_checkpoints_also_after_a_resume(go, here, stop_after):
    text = LINES + 'evaluate: {prompts: ["One?", {prompt: "Two?"}]}\n'
    words = ("train.max_steps=6", SHORT)
    assert go(text, *words, "train.output_dir=whole")[0] == 0
    stop_after(3)
    code, out, _ = go(text, *words)
    assert code == 143
    assert "answers at step 3" not in out  # a run that stops does not wait for answers
    stop_after(None)
    code, out, err = go(text, *words)
    assert code == 0, err
    own, samples = read_own()
    assert samples == own
    assert [list(sample["steps"]) for sample in own] == [["2", "3", "4"]] * 2
    whole, _ = read_own("whole")
    assert [list(sample["steps"]) for sample in whole] == [["2", "4"]] * 2
    for sample, other in zip(own, whole, strict=True):
        sample["steps"].pop("3")
        assert sample == other
    assert not Path("out/eval.json").exists()


@pytest.mark.parametrize(
    ("source", "prompt", "expected"),
    [
        ("wording: alpaca", "Add 1.", "### Instruction:\nAdd 1.\n\n### Response:"),
        ("wording: {prompt: 'Q: {question} A:', completion: ' {answer}'}", "Add 1.", "Q: Add 1. A:"),
        ("rename: {question: text}, format: text", "Add", "Add"),
        ("wording: chat", "Add 1.", [{"role": "user", "content": "Add 1."}]),
    ],
)
def test_prompt_is_worded_as_the_rows_are(source, prompt, expected, here):
    from trl_sft.recipe import build
    from trl_sft.training import stages

    (here / "recipe.yaml").write_text(
        "model: {name_or_path: trl_sft:tiny}\n"
        f"data: {{train: {{path: rows.jsonl, {source}}}}}\nevaluate: {{prompts: [{prompt}]}}\n"
        "run: {allow: [unused_columns]}\n"  # format text leaves the answers out
    )
    (formatted,) = stages.prepare(build.load_run("recipe.yaml")).prompts
    assert formatted.content[-len(expected) :] == expected
    assert formatted.ids


def test_prompts_that_cannot_be_used_are_refused_with_their_lines(go, here, matches):
    lines = [
        *('{"prompt": "  "}', "not json", '["What?"]', '{"prompt": "a", "completion": "b"}', '{"prompt": 3}'),
        *(
            '{"messages": []}',
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        ),
        *('{"messages": [{"role": "system", "content": "a"}]}', '{"prompt": "a", "messages": []}', '{"tools": []}'),
        *('{"prompt": "half \\ud83d"}', '{"prompt": "a <|im_end|> b"}'),
        '{"messages": [{"role": "narrator", "content": "a"}]}',
    ]
    (here / "prompts.jsonl").write_text("\n".join(["", *lines, '{"prompt": "good"}']) + "\n")
    code, _, err = go(LINES + "evaluate: {prompts: prompts.jsonl}\n", command=["check"])
    assert code == 2
    matches("prompts_of_a_file", err)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompts_of_a_list", "[3, '', [a], true]"),
        ("prompts_empty_list", "[]"),
        ("prompts_one_text", "'What is 1 plus 1?'"),
        ("prompts_misspelt_file", "prompt.txt"),
        ("prompts_other_file", "rows.csv"),
        ("prompts_folder", "folder.txt"),
    ],
)
def test_value_that_names_no_prompts_is_refused(name, value, go, here, matches):
    (here / "prompts.txt").write_text("One?\n")
    (here / "rows.csv").write_text("a,b\n")
    (here / "folder.txt").mkdir()
    code, _, err = go(LINES + f"evaluate: {{prompts: {value}}}\n", command=["check", "--fast"])
    assert code == 2
    matches(name, err.replace(str(here), "HERE"))


def test_file_without_a_prompt_or_of_another_encoding_is_refused(go, here):
    for content, text in (
        (b"\n \n", "the file has no prompts"),
        ("Größe?\n".encode("latin-1"), "is not UTF-8"),
        (b"Short?\n" + b"long " * 5000, "prompts.txt:2\n    the prompt has "),
        (b"What?\n" * 1001, "prompts.txt:1001\n    there are more than 1,000 prompts"),
    ):
        (here / "prompts.txt").write_bytes(content)
        code, _, err = go(LINES + "evaluate: {prompts: prompts.txt}\n", command=["check"])
        assert code == 2
        assert text in err
