"""Every setting is a line of the recipe or a comment; the recipe is checked; nothing is overwritten."""

import pytest
from importer_outcomes import find_place, outcomes_of

from trl_sft import cli, load_recipe
from trl_sft.errors import RecipeError
from trl_sft.importers import writer
from trl_sft.importers.settings import Settings
from trl_sft.training import stages

pytest_plugins = ["importer_fixtures"]


def test_unknown_setting_is_a_comment_and_a_warning(import_settings):
    flags = "--pretrain m --dataset X --output_key a --max_samplez 3 --brand_new a b"
    code, out, err = import_settings("openrlhf", flags)
    assert code == 5
    assert '# - unknown: max_samplez: "3" (trl_sft does not know this setting. Did you mean `max_samples`?)' in out
    assert '  unknown    max_samplez: "3"\n             -> trl_sft does not know this setting.' in err
    assert '  unknown    brand_new: "a b"' in err


def test_recipe_is_written_to_a_new_file_and_overwrites_none(import_settings, here):
    flags = "--pretrain trl_sft:tiny --dataset rows.jsonl --input_key question --output_key answer --train_batch_size 8"
    code, out, err = import_settings("openrlhf", flags, "-o", "sub.yaml")
    assert (code, "Next:" in out) == (0, True)
    assert load_recipe("sub.yaml").sources["train"][0].location.files == ((here / "rows.jsonl").resolve(),)
    code, _, err = import_settings("openrlhf", flags, "-o", "sub.yaml")
    assert code == 2
    assert "the file exists and is not overwritten" in err
    (here / "deep").mkdir()
    assert import_settings("openrlhf", flags, "-o", "deep/r.yaml")[0] == 0
    assert load_recipe("deep/r.yaml").sources["train"][0].location.files == ((here / "rows.jsonl").resolve(),)


def test_import_without_a_file_or_of_an_unknown_tool_is_refused(capsys):
    assert cli.main(["import", "trlx", "a.yaml"]) == 2
    assert "one of openrlhf, trl" in capsys.readouterr().err
    assert cli.main(["import", "trl"]) == 2
    assert "import trl FILE" in capsys.readouterr().err
    assert cli.main(["import", "trl", "gone.yaml"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_dataset_info_of_another_tool_is_refused(import_settings, here):
    code, _, err = import_settings("trl", {"model_name_or_path": "m", "dataset_name": "X"}, "--dataset-info", "x.json")
    assert code == 2
    assert "--dataset-info\n    trl has no such file, only LLaMA-Factory has" in err


REQUIRED = {
    "trl": {"model_name_or_path": "m", "dataset_name": "X"},
    "axolotl": {"base_model": "m", "datasets": [{"path": "a.jsonl", "type": "completion", "field": "answer"}]},
    "llamafactory": {
        **{"model_name_or_path": "m", "dataset": "a", "dataset_info": {"a": {"file_name": "a.json"}}},
    },
}


@pytest.mark.parametrize("tool", REQUIRED)
def test_every_known_setting_has_an_outcome_for_values_of_every_type(tool):
    for name in writer.TOOLS[tool].list_names():
        for value in (True, 1, 0.5, "x", ["x"], {"x": "y"}, [{"path": 1, "type": ["a"]}]):
            try:
                outcomes = outcomes_of(name, tool, Settings(REQUIRED[tool] | {name: value}, find_place))
            except RecipeError as error:
                assert all(fault.where.startswith(name) for fault in error.faults), (name, value)  # noqa: PT017 (it may also be carried over)
                continue
            assert outcomes, (name, value)
            unknown = [item for item in outcomes if "does not know" in getattr(item, "reason", "") and not item.path]
            assert not unknown, name


def test_imported_recipes_bring_rows_to_tokens(import_recipe, dataset_info, here):
    short_run = {"max_steps": 2, "output_dir": "out", "bf16": False}
    settings = {
        "trl": {"model_name_or_path": "trl_sft:tiny", "dataset_name": "rows.jsonl", "max_length": 64},
        "axolotl": {
            **{"base_model": "trl_sft:tiny", "datasets": [{"path": "data/identity.json", "type": "alpaca"}]},
            **{"sample_packing": True, "adapter": "lora", "lora_r": 4, "lora_target_linear": True},
        },
        "llamafactory": {"model_name_or_path": "trl_sft:tiny", "dataset": "identity", "neat_packing": True},
    }
    for tool, values in settings.items():
        ready = stages.prepare(import_recipe(tool, values | short_run)[0])
        labels = {label for row in ready.datasets.train for label in row["labels"]} - {-100}
        assert labels, tool
        assert ("seq_lengths" in ready.datasets.train.column_names) is (tool != "trl"), tool
