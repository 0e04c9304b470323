"""The user's own formatting function: called for every row, cached by its code, refused with its row."""

import pytest
from conftest import jsonl

from trl_sft.data import user_function

FUNCTIONS = """
def chat(row):
    return {"messages": [{"role": "user", "content": row["frage"]}, {"role": "assistant", "content": row["antwort"]}]}

def text(row):
    return row["frage"] + " " + row["antwort"]

def broken(row):
    return {"prompt": row["frage"], "completion": row["answer"]}

def number(row):
    return 7

nothing = 3
"""
GERMAN = [{"frage": f"Was ist {n} plus {n}?", "antwort": str(n + n)} for n in range(8)]


@pytest.fixture
def german(here, go):
    jsonl(here / "g.jsonl", GERMAN)
    (here / "rows.py").write_text(FUNCTIONS)
    (here / "pack").mkdir()
    (here / "pack" / "__init__.py").write_text("")
    (here / "pack" / "rows.py").write_text("from .more import chat\n")
    (here / "pack" / "more.py").write_text(FUNCTIONS)

    def call(keywords, *words):
        source = f"{{path: g.jsonl{keywords}}}"
        text = f"model: {{name_or_path: trl_sft:tiny}}\ndata: {{train: {source}}}\n"
        return go(text + "train: {output_dir: out, max_steps: 1}\n", *words)

    return call


@pytest.mark.parametrize("name", ["rows.py:chat", "./rows.py:chat", "pack.rows:chat", "rows:chat"])
def test_own_function_is_called_for_every_row(name, german, here):
    code, out, err = german(f", format: '{name}'")
    assert code == 0, err
    assert f"{name} -> format messages, wording chat" in out


def test_own_function_runs_again_from_the_resolved_recipe(german, here, monkeypatch):
    from trl_sft import cli

    assert german(", format: 'rows.py:chat'")[0] == 0
    (here / "else").mkdir()
    monkeypatch.chdir(here / "else")
    assert cli.main([str(here / "out" / "resolved.yaml"), "train.output_dir=again"]) == 0
    first, second = ((p / "model.safetensors").read_bytes() for p in (here / "out", here / "else" / "again"))
    assert first == second


def test_own_function_may_return_a_text(german):
    code, out, _ = german(", format: 'rows.py:text'")
    assert code == 0
    assert "format text, wording as it is" in out


def test_own_function_that_changed_does_not_read_the_cache_of_the_old_one(german, here):
    def tokens(*words):
        code, out, err = german(", format: 'rows.py:text'", "run.overwrite=true", *words)
        assert code == 0, err
        return next(line for line in out.splitlines() if line.strip().startswith("tokens"))

    before = tokens()
    (here / "rows.py").write_text(FUNCTIONS.replace('" " + row', '" and so on and on " + row'))
    user_function.import_function.cache_clear()  # a new process would have none
    assert tokens() != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows.py:broken", "g.jsonl row 1 (line 1)\n    broken raised KeyError: 'answer'"),
        ("rows.py:number", "number returned int"),
        ("rows.py:nothing", "nothing is int, not a function"),
        ("rows.py:gone", "cannot be imported: AttributeError"),
    ],
)
def test_own_function_that_fails_is_refused_with_its_row(name, message, german):
    code, _, err = german(f", format: '{name}'")
    assert code == 2
    assert message in err


def test_changed_function_is_not_resumed_silently(german, here):
    assert german(", format: 'rows.py:chat'", "train.max_steps=4", "train.save_steps=2", "run.max_hours=1e-9")[0] == 75
    (here / "rows.py").write_text(FUNCTIONS.replace("'frage'", "'antwort'").replace('"frage"', '"antwort"'))
    user_function.import_function.cache_clear()  # a new process would have none
    code, _, err = german(", format: 'rows.py:chat'", "train.max_steps=4", "train.save_steps=2", "run.max_hours=1e-9")
    assert code == 2
    assert "run.allow: [changed_data]" in err


@pytest.mark.parametrize("body", ["raise SystemExit(0)", "import nosuchmodule", "1 / 0"])
def test_own_file_that_exits_or_fails_on_import_is_refused(body, german, here):
    (here / "ends.py").write_text(f"{body}\ndef f(row): return 'a'\n")
    code, _, err = german(", format: 'ends.py:f'")
    assert code == 2
    assert "cannot be imported" in err


def test_own_file_may_use_dataclasses_and_lie_under_a_dotted_name(german, here):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Row:\n    words: str\ndef f(row): return Row(row['frage']).words\n"
    )
    (here / "my.rows.py").write_text(text)
    assert german(", format: 'my.rows.py:f'")[0] == 0
