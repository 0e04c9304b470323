"""The gate `names`: names of people by presidio; here a pipeline of rules stands for a model of spaCy."""

import json

import pytest
from conftest import jsonl

from trl_sft import cli
from trl_sft.building.candidates import CandidateRow
from trl_sft.building.gates import names

ROWS = [
    {"instruction": "Who keeps the lighthouse of the old harbour?", "output": "It is kept by Paula Lindqvist."},
    {"instruction": "Who counts the boats in the winter?", "output": "Paula counts them, and writes them down."},
    {"instruction": "Who paints the piers each year?", "output": "Two painters: Ola Berg and Ida Holm do it."},
]


def test_names_of_two_words_are_noted_by_their_number_and_never_repeated():
    gate = names.NamesGate(lambda text: [name for name in ("Paula  Lindqvist", "Ola Berg", "Ida") if name in text])
    for text, expected in {
        "Ola Berg met Paula  Lindqvist.": "the row holds 2 names of people",
        "Ola Berg and Ida": "the row holds the name of a person",
        "Ida sings.": None,
    }.items():
        found = gate.check(CandidateRow("1", ({"role": "assistant", "content": text},)))
        assert (found and found.reason) == expected


def test_audit_without_presidio_says_what_to_install(here, capsys, monkeypatch):
    jsonl(here / "rows.jsonl", ROWS)
    monkeypatch.setattr(names, "PACKAGES", ("a_package_that_is_not_there",))
    assert cli.main(["audit", "rows.jsonl", "--names", "en_core_web_sm"]) == 2
    assert "pip install 'trl-sft[pii]'" in capsys.readouterr().err


def test_audit_notes_rows_by_presidio_and_removes_none(here, capsys):
    pytest.importorskip("presidio_analyzer")
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    rules = pipeline.add_pipe("entity_ruler")
    rules.add_patterns([{"label": "PERSON", "pattern": name} for name in ("Paula Lindqvist", "Ola Berg", "Ida Holm")])
    pipeline.to_disk(here / "model")
    jsonl(here / "rows.jsonl", ROWS)
    assert cli.main(["audit", "rows.jsonl", "--names", "model", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    gate = next(gate for gate in content["gates"] if gate["gate"] == "names")
    assert (gate["rows"], gate["removes"], content["removed"]) == (2, False, 0)
    assert [finding["reason"] for finding in gate["findings"]] == [
        "the row holds the name of a person",
        "the row holds 2 names of people",
    ]
    assert "Lindqvist" not in json.dumps(content)
    assert cli.main(["audit", "rows.jsonl", "--names", "en_core_web_none"]) == 2
    assert "Run `python -m spacy download en_core_web_none`" in capsys.readouterr().err
