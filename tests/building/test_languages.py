"""Languages of one script: answers in another language than the instruction are found, and no honest row is accused."""

import json

import pytest
from conftest import jsonl

from trl_sft import cli
from trl_sft.building.candidates import CandidateRow
from trl_sft.building.gates import language_names
from trl_sft.building.gates.language import LanguageGate

pytest.importorskip("py3langid")
QUESTION = "Explain how the bees of a garden help the flowers in the early summer."
ANSWERS = {
    "en": "They carry pollen from one flower to the next, so that seeds can grow and the plants spread.",
    "fr": "Elles transportent le pollen d'une fleur à l'autre, ce qui permet aux plantes de se reproduire.",
    "de": "Sie tragen den Pollen von einer Blüte zur nächsten, damit die Samen wachsen können.",
    "es": "Las abejas llevan el polen de una flor a otra, y así las plantas pueden formar sus semillas.",
    "it": "Le api portano il polline da un fiore all'altro, così le piante possono formare i semi.",
    "pt": "As abelhas levam o pólen de uma flor para a outra, e assim as plantas podem formar sementes.",
    "nl": "De bijen dragen het stuifmeel van de ene bloem naar de andere, zodat er zaden kunnen groeien.",
    "pl": "Pszczoły przenoszą pyłek z jednego kwiatu na drugi i dzięki temu rośliny tworzą nasiona.",
    "tr": "Arılar polenleri bir çiçekten diğerine taşır ve böylece bitkiler tohum oluşturabilir.",
    "ru": "Пчёлы переносят пыльцу с одного цветка на другой, поэтому растения образуют семена.",
    "zh": "蜜蜂把花粉从一朵花带到另一朵花，这样植物就能结出种子。",
}
HONEST = {
    "translation": ("Translate this sentence: the bees carry pollen from flower to flower.", ANSWERS["fr"]),
    "language in its own words": ("Réponds en anglais : comment les abeilles aident-elles les fleurs ?", ANSWERS["en"]),
    "a foreign text in the instruction": (f"Is the following text about animals?\n{ANSWERS['de']}", ANSWERS["en"]),
    "only a foreign text": (ANSWERS["es"] + " What is this text about, and who carries what?", ANSWERS["en"]),
    "names": (
        "Name some works of music.",
        "Beethoven - Für Elise; Debussy - Clair de lune; Vivaldi - Le quattro stagioni",
    ),
    "dishes": ("Which dishes shall I cook for the guests of this evening?", "Croissant, ratatouille, crème brûlée"),
    "code": ("Write a loop over a list, and print what is in it.", "for eintrag in liste:\n    print(eintrag, ende)"),
    "formula": ("What is the integral of x squared from zero to one?", "$\\int_0^1 x^2 dx = \\frac{1}{3}$"),
    "numbers": ("How many legs do the nine cats and two birds have?", "9*4=<<9*4=36>>36\n2*2=<<2*2=4>>4\n#### 40"),
    "short": ("Which city is the capital of the country with the tulips?", "Amsterdam, in de Randstad"),
    "relatives": (
        "Hvordan hjelper biene blomstene i hagen om sommeren?",
        "Bierne bærer pollen fra den ene blomst til den.",
    ),
}


def check(instruction, answer, set_language=""):
    turns = ({"role": "user", "content": instruction}, {"role": "assistant", "content": answer})
    return LanguageGate(set_language, language_names.identify).check(CandidateRow("1", turns))


@pytest.mark.parametrize("code", ANSWERS)
def test_answer_in_another_language_is_found_by_instruction_and_by_language_of_the_set(code):
    assert language_names.identify(ANSWERS[code]) == code
    assert check(ANSWERS[code], ANSWERS[code], code) is None
    for other in set(ANSWERS) - {code}:
        assert (check(ANSWERS[other], ANSWERS[code]) is None) == (not language_names.are_different(code, other))
    if code != "en":
        assert check(QUESTION, ANSWERS[code]).reason.startswith("the instruction is in ")
        assert check(QUESTION, ANSWERS[code], "en").reason.endswith("the row's language is en")
        assert check(QUESTION, ANSWERS["en"], code).gate == "language"


@pytest.mark.parametrize("name", HONEST)
def test_row_whose_languages_differ_rightly_or_are_unknown_passes(name):
    assert check(*HONEST[name]) is None


def test_audit_counts_languages_with_the_package_and_scripts_without(here, capsys, monkeypatch):
    rows = [{"instruction": QUESTION, "output": ANSWERS["en"]}, {"instruction": QUESTION, "output": ANSWERS["fr"]}]
    jsonl(here / "rows.jsonl", rows)
    assert cli.main(["audit", "rows.jsonl", "--language", "fr", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["statistics"]["languages_are"] == "languages"
    assert content["statistics"]["languages"]["most"] == [{"name": "en", "rows": 2}]
    (finding,) = next(gate for gate in content["gates"] if gate["gate"] == "language")["findings"]
    assert finding["reason"] == "the answer is in English, and the row's language is fr"
    monkeypatch.setattr(language_names, "PACKAGE", "a_package_that_is_not_there")
    assert cli.main(["audit", "rows.jsonl"]) == 0
    assert "script    latin 2" in capsys.readouterr().out
    assert cli.main(["audit", "rows.jsonl", "--language", "fr"]) == 2
    assert "pip install 'trl-sft[data]'" in capsys.readouterr().err
