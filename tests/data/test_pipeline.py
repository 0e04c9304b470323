"""A source of rows on its way: columns renamed, format and wording chosen, rows cached, nulls of Arrow removed."""

import json
import os
import subprocess
import sys

import models
import pytest
from conftest import jsonl
from datasets import Dataset, Features, Json, List, Value

from trl_sft import load_recipe
from trl_sft.data import pipeline, user_function
from trl_sft.data.formats import TokenizerFeatures
from trl_sft.data.source_format import SourceFormat
from trl_sft.recipe import paths
from trl_sft.training import stages

FEATURES = TokenizerFeatures(("messages", "system"), "</s>")
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
QUESTIONS = [{"frage": f"Was ist {n} plus {n}?", "antwort": str(n + n)} for n in range(8)]


def check(here, go, keywords):
    """Return what `check` prints of a source with German column names."""
    jsonl(here / "g.jsonl", QUESTIONS)
    source = f"{{path: g.jsonl, rename: {{frage: question, antwort: answer}}{keywords}}}"
    code, out, err = go(f"model: {{name_or_path: trl_sft:tiny}}\ndata: {{train: {source}}}\n", command=["check"])
    assert code == 0, err
    return out


def test_columns_of_other_names_are_renamed(here, go):
    assert "format question_answer, wording chat" in check(here, go, "")


def test_task_label_of_a_source_is_shown(here, go):
    assert "; task math (a label: neither this format nor this wording uses it)" in check(here, go, ", task: math")


def test_base_model_takes_the_formats_own_wording_and_vicuna_when_asked(here, go):
    models.base(here / "base")
    jsonl(here / "m.jsonl", [{"messages": MESSAGES}] * 4)
    text = "model: {name_or_path: ./base}\ndata: {train: m.jsonl}\ntrain: {output_dir: out, max_steps: 1}\n"
    code, _, err = go(text)
    assert code == 2
    assert "Set `tokenizer.chat_template: chatml`, set `wording` to vicuna or conversation" in err
    assert go(text, "data.train={path: m.jsonl, wording: vicuna}")[0] == 0


def test_formatting_is_cached_across_processes_and_not_when_an_imported_file_changes(here):
    """The fingerprint of the formatted rows is the same in every process, whatever the hash seed of Python."""
    (here / "rows.py").write_text("import words\ndef text(row):\n    return words.W + row['question']\n")
    (here / "words.py").write_text("W = 'a'\n")
    (here / "recipe.yaml").write_text(
        "model: {name_or_path: trl_sft:tiny}\ndata: {train: {path: rows.jsonl, format: 'rows.py:text'}}\n"
    )
    code = (
        "import sys\nfrom trl_sft import load_recipe\nfrom trl_sft.recipe import paths\n"
        "from trl_sft.training import stages\npaths.EMBEDDED = paths.Path(sys.argv[1])\n"
        "for words in ([], ['data.train=rows.jsonl']):\n"
        "    print(stages.prepare(load_recipe('recipe.yaml', words)).rows.train.rows._fingerprint)\n"
    )

    def fingerprints():
        user_function.import_function.cache_clear()
        sys.modules.pop("words", None)
        runs = [load_recipe("recipe.yaml", words) for words in ([], ["data.train=rows.jsonl"])]
        return [stages.prepare(run).rows.train.rows._fingerprint for run in runs]

    first = fingerprints()
    assert len(first) == 2
    env = os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    command = [sys.executable, "-c", code, str(paths.EMBEDDED)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.split("\n") if line and " " not in line] == first
    (here / "words.py").write_text("W = 'b'\n")
    changed = fingerprints()
    assert changed[0] != first[0]
    assert changed[1] == first[1]


def test_keys_of_turns_that_nothing_reads_are_named_wherever_they_stand(here, go):
    marked = [MESSAGES[0] | {"mood": "x"}, MESSAGES[1]]
    jsonl(here / "m.jsonl", [{"messages": MESSAGES}, {"messages": MESSAGES}, {"messages": marked}])
    code, out, _ = go("model: {name_or_path: trl_sft:tiny}\ndata: {train: m.jsonl}\n", command=["check"])
    assert code == 0
    assert "not used: messages.mood" in out


def format_messages(messages, column_types):
    """Return the content of the last message, formatted from a column `messages`."""
    source_format = SourceFormat("r", "messages", "chat", FEATURES)
    batch = {"messages": [messages]}
    formatted = pipeline.format_batch(batch, source_format=source_format, column_types=column_types)
    return formatted["completion"][0][0]["content"]


def test_null_of_json_is_trained_and_null_that_arrow_adds_to_a_struct_is_not():
    call = {"function": {"name": "f", "arguments": {"x": None, "y": 1}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = Features({"messages": Value("string")})
    assert '"x": null' in format_messages(json.dumps(messages), text)
    turn = {"role": Value("string"), "content": Value("string"), "tool_calls": Json()}
    assert '"x": null' in format_messages(messages, Features({"messages": List(turn)}))
    rows = Dataset.from_list([{"messages": messages}])
    assert '"x"' not in format_messages(rows[0]["messages"], rows.features)


@pytest.mark.parametrize(
    ("one", "evaluation", "problem"),
    [
        ("Is it one?", "eval_fraction: 0.9", "eval_fraction 0.9 holds out all of them"),
        ("What is 1?", "eval: rows.jsonl, drop_leaked: true", "all are also in the evaluation set"),
    ],
)
def test_source_without_a_row_left_to_train_says_where_its_rows_went(go, here, one, evaluation, problem):
    jsonl(here / "rows.jsonl", [{"question": f"What is {n}?", "answer": str(n)} for n in range(30)])
    jsonl(here / "one.jsonl", [{"question": one, "answer": "1"}])
    more = jsonl(here / "more.jsonl", [{"question": f"Is it {n}?", "answer": "yes"} for n in range(9)]).name
    recipe = f"model: {{name_or_path: trl_sft:tiny}}\ndata: {{train: [one.jsonl, {more}], {evaluation}}}\n"
    code, _, err = go(recipe, command=["check"])
    assert code == 2
    assert "one.jsonl has no row left to train: " + problem in err
