"""`init` writes a recipe that reads the file as it is: columns, encoding, separator, key of the rows."""

import json

import pytest

from trl_sft import cli, console

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
