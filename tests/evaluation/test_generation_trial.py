"""Generation settings that transformers refuses are refused before a finished run is touched."""

import pytest
from conftest import RECIPE

EVAL = RECIPE.replace("{train: rows.jsonl}", "{train: rows.jsonl, eval_fraction: 0.1}") + "evaluate: {max_rows: 2}\n"
REFUSED = {
    "repetition_penalty": "-1",
    "penalty_alpha": "0.6, top_k: 4",
    "prompt_lookup_num_tokens": "3",
    "temperature": "-1.0, do_sample: true",
    "num_return_sequences": "3",
    "num_beams": "-2",
    "cache_implementation": "zz",
}
ACCEPTED = ["{temperature: 0.7, do_sample: true}", "{max_new_tokens: 5}", "{num_beams: 2}", "{repetition_penalty: 1.2}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Train one run; return its folder."""
    from trl_sft import cli

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rows = "".join(f'{{"question": "What is {n}?", "answer": "{n}"}}\n' for n in range(40))
        (folder / "rows.jsonl").write_text(rows)
        (folder / "recipe.yaml").write_text(EVAL)
        assert cli.main(["recipe.yaml"]) == 0
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.is_file()}


@pytest.mark.parametrize("name", REFUSED)
def test_setting_that_cannot_generate_is_refused_and_the_finished_run_stays(finished, monkeypatch, capsys, name):
    from trl_sft import cli

    monkeypatch.chdir(finished)
    before = contents(finished)
    generation = f"evaluate.generation={{{name}: {REFUSED[name]}}}"
    for command in ([], ["check"]):
        assert cli.main([*command, "recipe.yaml", "run.overwrite=true", generation]) == 2
        error = capsys.readouterr().err
        assert "evaluate.generation" in error
        assert "Traceback" not in error
    assert contents(finished) == before


@pytest.mark.parametrize("generation", ACCEPTED)
def test_setting_that_can_generate_is_accepted(finished, monkeypatch, generation):
    from trl_sft import cli

    monkeypatch.chdir(finished)
    assert cli.main(["check", "recipe.yaml", "run.overwrite=true", f"evaluate.generation={generation}"]) == 0
