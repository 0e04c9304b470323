"""`audit`: planted faults are counted by their gates, a cleaned set is written, and every kind of source is read."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import jsonl

from trl_sft import cli
from trl_sft.building.audit.set_statistics import compute_effective_number
from trl_sft.building.gates import language_names

WORDS = "amber basin cedar delta ember fjord grove haven inlet jetty knoll lagoon marsh notch opal quay".split()


def make_row(number):
    """Return one of 200 rows without a fault, none like another."""
    parts = [WORDS[(number * step + step) % 16] + str(number * step % 97) for step in range(1, 30)]
    return {
        "instruction": f"Describe the walk from {parts[0]} to {parts[1]} by way of {parts[2]} {parts[3]} {parts[4]}.",
        "output": f"The path number {number} passes " + " ".join(parts[5:]) + ", and then it ends at the water.",
    }


PLANTED = {
    "empty": ("Describe the long walk to the north pier.", ""),
    "complete": ("Write a program for the tide tables.", "```python\nprint('tide')\n"),
    "artefact": ("Which pier is nicest?", "As an AI language model, I have not seen a pier."),
    "language": ("Describe the colours of the old lighthouse.", "灯塔是红色和白色的，傍晚的时候很漂亮。"),
    "personal": ("Who keeps the lighthouse?", "Write to carla.mendes@gmail.com, who keeps it."),
    "leakage": ("How many boats, nets and oars does the harbour master of Ostend count each winter?", "Forty."),
    "form": ("Name the caf\ufffd at the pier.", "It is the caf\ufffd Marina."),
}
PLANTED = {gate: {"instruction": row[0], "output": row[1]} for gate, row in PLANTED.items()}
PROMPT = "How many boats, nets and oars does the harbour master of Ostend count each winter?"


@pytest.fixture
def audit(here, capsys):
    """Return a function that audits: exit code, output, errors."""

    def call(*words):
        capsys.readouterr()
        code = cli.main(["audit", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def planted(here):
    """Write 60 clean rows with one planted fault of each gate; return the rows."""
    rows = [make_row(number) for number in range(60)]
    for place, row in enumerate(PLANTED.values()):
        rows.insert(5 * place + 3, row)
    rows.append(make_row(7))
    near = make_row(9)
    rows.append(near | {"output": near["output"].replace("passes", "crosses").replace("ends", "stops")})
    rows.append(make_row(11) | {"output": "Nobody walks there in the winter, for the ice is thin."})
    jsonl(here / "rows.jsonl", rows)
    jsonl(here / "test.jsonl", [{"question": PROMPT, "answer": "40"}])
    return rows


def test_each_planted_fault_is_counted_by_its_gate_and_no_clean_row_is_lost(planted, audit, here):
    code, out, err = audit("rows.jsonl", "--against", "test.jsonl", "--fix", "clean.jsonl", "-o", "page.html", "--json")
    assert code == 0, err
    content = json.loads(out)
    counts = {gate["gate"]: gate["rows"] for gate in content["gates"]}
    assert counts == dict.fromkeys(PLANTED, 1) | {"length": 0, "duplicate": 2, "novelty": 1, "conflict": 1}
    assert (content["rows"], content["clean"], content["removed"]) == (70, 61, 9)
    kept = [json.loads(line) for line in (here / "clean.jsonl").read_text(encoding="utf-8").splitlines()]
    removed = [json.loads(line) for line in (here / "clean.rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kept == [row for row in planted[:-3] if row not in PLANTED.values()] + [planted[-1]]
    assert [entry["record"] for entry in removed] == [*PLANTED.values(), *planted[-3:-1]]
    assert [entry["gate"] for entry in removed] == [*PLANTED, "duplicate", "duplicate"]
    assert removed[0]["line"] == 4
    assert removed[-2]["reason"] == "exact: the same as rows.jsonl row 10 (line 10)"
    code, out, _ = audit("clean.jsonl", "--against", "test.jsonl")
    assert code == 0
    assert "61 of 61 rows have no fault (100.0%); 0 have one" in out
    assert out.endswith("Next: train on these rows.\n")


def test_gate_that_is_kept_only_notes_its_rows(planted, audit):
    code, out, _ = audit("rows.jsonl", "--keep", "personal", "--keep", "duplicate")
    assert code == 0
    assert "personal (note)   1" in out
    assert "duplicate (note)  2" in out
    assert "65 of 70 rows have no fault" in out  # nothing looks for leakage without an evaluation set


def test_every_kind_of_source_is_read_as_a_recipe_reads_it(here, audit):
    rows = [make_row(number) for number in range(12)]
    (here / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    with (here / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), here / "rows.parquet")
    chats = [
        {"messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]}
        for row in rows
    ]
    (here / "folder").mkdir()
    jsonl(here / "folder" / "train.jsonl", [*chats, chats[3]])
    jsonl(here / "texts.jsonl", [{"text": row["output"]} for row in rows] + [{"text": "The pier. " * 30}])
    (here / "recipe.yaml").write_text(
        "model: {name_or_path: trl_sft:tiny}\ndata:\n  train: [folder, {path: rows.csv}]\ntrain: {max_length: 60}\n"
    )
    expected = {"rows.json": (12, 12), "rows.csv": (12, 12), "rows.parquet": (12, 12), "folder": (13, 12)}
    expected |= {"texts.jsonl": (13, 12), "recipe.yaml": (25, 0)}
    for name, (total, clean) in expected.items():
        code, out, err = audit(name, "--fix", "clean.jsonl", "--json")
        assert code == 0, (name, err)
        content = json.loads(out)
        assert (content["rows"], content["clean"]) == (total, clean), name
        assert len((here / "clean.jsonl").read_text(encoding="utf-8").splitlines()) == clean
    assert content["statistics"]["unit"] == "tokens"
    assert content["gates"][2]["findings"][0]["reason"].endswith("tokens, and 60 are the most")


def test_cleaned_set_of_several_sources_is_read_by_a_recipe(here, audit):
    jsonl(here / "a.jsonl", [make_row(number) for number in range(5)])
    jsonl(here / "b.jsonl", [{"question": f"What is {n} and {WORDS[n]}?", "answer": f"It is {n}."} for n in range(5)])
    (here / "recipe.yaml").write_text("model: {name_or_path: trl_sft:tiny}\ndata: {train: [a.jsonl, b.jsonl]}\n")
    code, _, err = audit("recipe.yaml", "--fix", "clean.jsonl")
    assert code == 0, err
    code, out, err = audit("clean.jsonl")
    assert code == 0, err
    assert "10 of 10 rows have no fault" in out


def test_faults_of_the_arguments_are_named(here, audit):
    jsonl(here / "rows.jsonl", [make_row(1)])
    for words, expected in {
        ("rows.jsonl", "--fix", "rows.jsonl"): "rows.jsonl holds the rows that are read",
        ("rows.jsonl", "--max-tokens", "0"): "Write a number from 1.",
        ("gone.jsonl",): "gone.jsonl",
        ("rows.jsonl", "--against", "gone.jsonl"): "gone.jsonl",
    }.items():
        code, _, err = audit(*words)
        assert code == 2, words
        assert expected in err


def test_no_output_replaces_what_is_read_or_another_output(here, audit):
    (here / "folder").mkdir()
    for name in ("rows.jsonl", "test.jsonl", "clean.rejected.jsonl", "folder/train.jsonl"):
        jsonl(here / name, [make_row(1)])
    (here / "recipe.yaml").write_text(
        "model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl, eval: test.jsonl}\n"
    )
    for words, expected in {
        ("rows.jsonl", "--against", "test.jsonl", "--fix", "test.jsonl"): "test.jsonl holds the rows that are read",
        ("clean.rejected.jsonl", "--fix", "clean.jsonl"): "clean.rejected.jsonl holds the rows that are read",
        ("recipe.yaml", "--fix", "rows.jsonl"): "rows.jsonl holds the rows that are read",
        ("recipe.yaml", "-o", "test.jsonl"): "test.jsonl holds the rows that are read",
        ("folder", "--fix", "folder/clean.jsonl"): "would stand in folder, whose rows are read",
        ("rows.jsonl", "--fix", "x.jsonl", "-o", "x.jsonl"): "x.jsonl is written by two options",
    }.items():
        code, _, err = audit(*words)
        assert (code, expected in err) == (2, True), (words, err)
    assert json.loads((here / "test.jsonl").read_text()) == make_row(1)


def test_set_without_a_clean_row_is_no_set_to_train(here, audit):
    jsonl(here / "rows.jsonl", [{"instruction": "Name a colour.", "output": ""}])
    code, out, _ = audit("rows.jsonl", "--fix", "clean.jsonl")
    assert code == 0
    assert "0 of 1 row has no fault (0.0%); 1 has one" in out
    assert out.endswith("Next: read the reasons; no row is left to train.\n")


def test_wording_that_many_rows_share_with_an_evaluation_prompt_is_no_leak(here, audit):
    wording = (
        "Classify the sentiment of the following review as positive or negative. Write one word and no more. Review: "
    )
    reviews = [f"the {one} was {two} for all of us" for one in WORDS for two in ("cold", "warm")]
    rows = [{"instruction": wording + review, "output": "positive"} for review in reviews]
    jsonl(
        here / "rows.jsonl",
        [*rows, {"instruction": wording + "We waited an hour, and the soup was salty.", "output": "no"}],
    )
    jsonl(
        here / "test.jsonl", [{"question": wording + "We waited an hour and the soup was salty.", "answer": "negative"}]
    )
    code, out, _ = audit("rows.jsonl", "--against", "test.jsonl", "--json")
    assert code == 0
    assert {gate["gate"]: gate["rows"] for gate in json.loads(out)["gates"] if gate["rows"] and gate["removes"]} == {
        "leakage": 1
    }


def test_uneven_sets_are_named_with_what_to_do(here, audit, monkeypatch):
    rows = [make_row(number) | {"task": "walk" if number < 90 else "talk"} for number in range(100)]
    chinese = "请描述从{}号码头到灯塔的路线，并写出沿途的景色。"
    rows += [{"instruction": chinese.format(n), "output": f"路线{n}：{WORDS[n]}", "task": "walk"} for n in range(4)]
    jsonl(here / "rows.jsonl", rows)
    pytest.importorskip(language_names.PACKAGE)
    code, out, _ = audit("rows.jsonl")
    assert code == 0
    assert "90% of the rows are of the task walk; 2 tasks are as even as 1.4 equal ones. Give the other" in out
    assert "96% of the instructions begin with 'describe the'. Vary the wording of the instructions." in out
    assert "4 instructions are in Chinese and 100 in English" in out
    monkeypatch.setattr(language_names, "PACKAGE", "a_package_that_is_not_there")
    assert "4 instructions are in han script and 100 in latin script" in audit("rows.jsonl")[1]


def test_effective_number_of_even_kinds_is_their_number():
    assert compute_effective_number({"a": 5, "b": 5, "c": 5}) == pytest.approx(3)
    assert compute_effective_number({"a": 5}) == pytest.approx(1)
    assert compute_effective_number({}) == 0
