"""`init` writes a recipe that reads the file as it is: columns, encoding, separator, key of the rows."""

import json
import re
from pathlib import Path

import pytest
from conftest import jsonl

from trl_sft import cli, console, load_recipe
from trl_sft.cli.init.schedule import plan_schedule
from trl_sft.evaluation.sample_size import LEAST_ROWS

CHAT = [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "the reply"}]
ROWS = {
    "prompt_response": {"prompt": "Say a.", "response": "the reply"},
    "query_response": {"query": "Say a.", "response": "the reply"},
    "capitals": {"Question": "Say a.", "Answer": "the reply"},
    "shouting": {"QUESTION": "Say a.", "ANSWER": "the reply"},
    "spaces": {"User Message ": "Say a.", "Assistant Reply": "the reply"},
    "instruction_response": {"instruction": "Say a.", "response": "the reply"},
    "dolly": {"instruction": "Say a.", "context": "A letter.", "response": "the reply", "category": "x"},
    "squad": {"context": "A letter.", "query": "Say a.", "answer": "the reply"},
    "chinese": {"问题": "说甲。", "答案": "the reply"},
    "chinese_instruction": {"指令": "说甲。", "输入": "甲", "输出": "the reply"},
    "input_output": {"input": "Say a.", "output": "the reply"},
    "human_gpt": {"human": "Say a.", "gpt": "the reply"},
    "user_bot": {"User": "Say a.", "Bot": "the reply"},
    "german": {"Frage": "Sag a.", "Antwort": "the reply"},
    "reasoning": {"Question": "Say a.", "Complex_CoT": "Easy.", "Response": "the reply"},
    "conversation": {"conversation": CHAT, "id": 7},
    "dialogue": {"Dialogue": CHAT},
    "pairs": {"conversation": [{"human": "Say a.", "assistant": "the reply"}]},
    "content": {"content": "the reply", "url": "x"},
    "body": {"Body": "the reply"},
}


def run_preview(capsys):
    """Return what `preview recipe.yaml` prints."""
    capsys.readouterr()
    assert cli.main(["preview", "recipe.yaml"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ROWS)
def test_init_renames_columns_of_the_field_so_that_preview_trains_the_answer(here, capsys, name):
    (here / "rows.jsonl").write_text(json.dumps(ROWS[name], ensure_ascii=False) + "\n", encoding="utf-8")
    assert cli.main(["init", "trl_sft:tiny", "rows.jsonl"]) == 0, capsys.readouterr().err
    trained = run_preview(capsys).replace("⟧⟦", "")
    assert "⟦" in trained
    assert "the reply" in trained.partition("⟦")[2].partition("⟧")[0]
    assert "  # rows.jsonl has the columns" in (here / "recipe.yaml").read_text(encoding="utf-8")


FILES = {
    "gbk.csv": ("question,answer\n说出苹果的颜色。,红色\n" * 3).encode("gbk"),
    "gbk.jsonl": '{"question": "说出苹果的颜色。", "answer": "红色"}\n'.encode("gbk"),
    "utf16.csv": "question,answer\n说出苹果的颜色。,红色\n".encode("utf-16"),
    "semicolons.csv": "question;answer\nsay a;红色\n".encode(),
    "renamed_semicolons.csv": "问题;答案\n说甲;红色\n".encode("gbk"),
    "key.json": json.dumps({"v": 1, "data": [{"question": "a", "answer": "红色"}]}).encode(),
    "renamed_key.json": json.dumps({"rows": [{"Question": "a", "Answer": "红色"}]}).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_init_writes_what_the_file_needs_and_preview_shows_its_text(here, capsys, name):
    (here / name).write_bytes(FILES[name])
    assert cli.main(["init", "trl_sft:tiny", name]) == 0, capsys.readouterr().err
    assert "红色" in run_preview(capsys)


def test_init_says_what_it_set_and_why(here, capsys, matches):
    (here / "rows.csv").write_bytes("问题;答案\n说甲。;甲\n".encode("gbk"))
    assert cli.main(["init", "trl_sft:tiny", "rows.csv"]) == 0
    out = capsys.readouterr().out.replace(console.get_python_command(), "python")
    matches("init_of_a_file_that_needs_keys", out + "---\n" + (here / "recipe.yaml").read_text("utf-8"))


def test_init_sets_nothing_that_only_a_person_can_confirm(here, capsys, matches):
    (here / "rows.jsonl").write_text('{"foo": "a", "bar": "b"}\n', encoding="utf-8")
    assert cli.main(["init", "trl_sft:tiny", "rows.jsonl"]) == 2
    assert not (here / "recipe.yaml").exists()
    matches("init_of_unknown_columns", capsys.readouterr().err)


def test_init_holds_out_enough_rows_for_a_verdict_and_leaves_most_to_train():
    for rows in range(2, 3000):
        schedule = plan_schedule(rows)
        assert schedule.eval_rows == round(rows * schedule.eval_fraction) >= 1
        assert schedule.eval_rows >= LEAST_ROWS or rows < 30
        assert schedule.train_rows >= rows * 0.8 - 1


def test_init_lets_few_rows_be_seen_often_enough_for_more_than_a_handful_of_steps():
    assert {rows: plan_schedule(rows).steps for rows in (1, 2, 10, 40, 1000, 2000, 100_000)} == {
        1: 25,
        2: 25,
        10: 26,
        40: 27,
        1000: 714,
        2000: 119,
        100_000: 5938,
    }


def test_init_says_that_few_held_out_rows_show_no_improvement(here, capsys):
    (here / "ten.csv").write_text("question,answer\n" + "".join(f"{n},{n}\n" for n in range(10)), encoding="utf-8")
    assert cli.main(["init", "trl_sft:tiny", "ten.csv"]) == 0
    assert "Few rows: 2 of them are held out for evaluation. Fewer than 6 cannot show" in capsys.readouterr().out
    assert cli.main(["init", "trl_sft:tiny", "rows.jsonl", "-o", "forty.yaml"]) == 0
    assert "Few rows" not in capsys.readouterr().out


SQUAD = {
    "context": "Lima is in Peru.",
    "question": "Where is Lima?",
    "answers": {"text": ["Peru"], "answer_start": [11]},
}


def test_init_writes_the_function_that_reads_rows_like_squads(here, capsys):
    without_answer = SQUAD | {"answers": {"text": [], "answer_start": []}}
    jsonl(here / "rows.jsonl", [without_answer, SQUAD])
    assert cli.main(["init", "trl_sft:tiny", "rows.jsonl"]) == 2
    fault = capsys.readouterr().err
    assert "as SQuAD has its answers" in fault
    names = {}
    exec(re.search("`(def to_row.*?)` into", fault)[1], names)
    assert names["to_row"](SQUAD) == {"instruction": "Where is Lima?", "input": "Lima is in Peru.", "output": "Peru"}
    assert names["to_row"](without_answer) is None


def test_init_names_the_speakers_of_a_chat_in_one_text(here, capsys):
    chat = "USER: Hi\n\n\nASSISTANT: <functioncall> {} <|endoftext|>\n\n\nFUNCTION RESPONSE: 3\n\n\nASSISTANT: It is 3."
    jsonl(here / "rows.jsonl", [{"system": "SYSTEM: Be kind.", "chat": chat}])
    assert cli.main(["init", "trl_sft:tiny", "rows.jsonl"]) == 2
    assert "a whole chat as text, with the speakers USER, ASSISTANT, FUNCTION RESPONSE" in capsys.readouterr().err
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "formats-and-wordings.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\n(# chats.py\n.*?)```", page, re.DOTALL)[1], names)
    messages = names["to_messages"]({"system": "SYSTEM: Be kind.", "chat": chat})["messages"]
    assert [turn["role"] for turn in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert [messages[0]["content"], messages[-1]["content"]] == ["Be kind.", "It is 3."]


def test_init_reads_the_only_split_of_a_folder_and_says_which(here, capsys):
    (here / "rows").mkdir()
    jsonl(here / "rows" / "test-00000-of-00001.jsonl", [{"question": "a", "answer": "b"}] * 3)
    assert cli.main(["init", "trl_sft:tiny", "rows"]) == 0
    assert "set `split: test`, because rows: there is no split train; the only split is test" in capsys.readouterr().out


def test_split_of_a_single_file_is_to_be_removed(here, capsys):
    recipe = "model: {name_or_path: trl_sft:tiny}\ndata: {train: {path: rows.jsonl, split: validation}}\n"
    (here / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert cli.main(["preview", "recipe.yaml"]) == 2
    fault = capsys.readouterr().err
    assert "the only split is train, since files that name no split are the split train" in fault
    assert "Remove `split`." in fault
    assert cli.main(["fix", "recipe.yaml"]) == 0
    assert "split" not in (here / "recipe.fixed.yaml").read_text(encoding="utf-8")


def test_refusal_in_place_of_content_is_named(here, capsys):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "refusal": "I can't."}]
    jsonl(here / "rows.jsonl", [{"messages": turns}])
    assert cli.main(["init", "trl_sft:tiny", "rows.jsonl"]) == 0
    assert cli.main(["preview", "recipe.yaml"]) == 2
    assert """no content, and its text under refusal: "I can't." (turn 2)""" in capsys.readouterr().err


COMMAS = {
    "learning_rate: 2,5e-5": "Write `learning_rate: 2.5e-5`.",
    "weight_decay: 0,1": "Write `weight_decay: 0.1`.",
    "warmup_steps: 0,05": "Write `warmup_steps: 0.05`.",
    "max_steps: 1,000": "Write `max_steps: 1000`, or `max_steps: 1.000` if the comma is a decimal point.",
}


@pytest.mark.parametrize("entry", COMMAS)
def test_comma_of_a_number_inside_braces_is_named(here, capsys, entry):
    recipe = "model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl}\ntrain: {output_dir: out, %s, seed: 1}\n"
    (here / "recipe.yaml").write_text(recipe % entry, encoding="utf-8")
    assert cli.main(["check", "recipe.yaml", "--fast"]) == 2
    fault = capsys.readouterr().err
    assert f"recipe.yaml:3 train.{entry.partition(':')[0]}\n    `{entry}` is read as two entries" in fault
    assert f"-> {COMMAS[entry]}\n" in fault
    assert "1 problem to fix" in fault


def test_fix_writes_the_decimal_point(here):
    recipe = "model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl}\ntrain: {learning_rate: 2,5e-5, seed: 1}\n"
    (here / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert cli.main(["fix", "recipe.yaml"]) == 0
    assert load_recipe("recipe.fixed.yaml").train["learning_rate"] == 2.5e-5
