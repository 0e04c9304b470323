"""Old names are read under their current names or refused: renamed_keys.yaml, on the tested and the floor set."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trl_sft import load_recipe
from trl_sft.errors import RecipeError
from trl_sft.recipe import renamed_keys, sections
from trl_sft.recipe.upstream import keys, types
from trl_sft.recipe.yaml_reader import format_value

LIST = yaml.safe_load((Path(__file__).parent / "renamed_keys.yaml").read_text(encoding="utf-8"))
BASE = {"model": {"name_or_path": "trl_sft:tiny"}, "data": {"train": {"path": "rows.jsonl"}, "eval": "rows.jsonl"}}


def with_old(entry):
    """Return a recipe with an old name."""
    recipe = copy.deepcopy(BASE)
    where = {"data.*": ("data", "train"), keys.GENERATION: ("evaluate", "generation")}
    target = recipe
    for part in where.get(entry["section"], (entry["section"],)):
        target = target.setdefault(part, {})
    target |= {entry["old"]: entry["value"]} | entry.get("beside", {})
    if entry["section"] == "data.*":
        recipe["data"]["train"] = {"path": "rows.txt", **target} if entry["old"] == "errors" else {**target}
    return format_value(recipe)


def read(run, name):
    """Return the value of `section.key` in a run."""
    section, key = name.rsplit(".", 1)
    return run.sources["train"][0].load_kwargs[key] if section == "data.*" else run.section(section)[key]


def label(entry):
    return f"{entry['section']}.{entry['old']}={entry['value']}"


@pytest.mark.parametrize("entry", LIST, ids=label)
def test_old_name_is_read_under_its_current_name_or_refused_with_a_fix(entry, here):
    (here / "rows.txt").write_text("one\ntwo\n")
    (here / "r.yaml").write_text(with_old(entry))
    if "refused" in entry:
        with pytest.raises(RecipeError) as caught:
            load_recipe("r.yaml")
        assert len(caught.value.faults) == 1
        fault = caught.value.faults[0]
        assert entry["old"] in fault.where
        assert entry["refused"] in fault.fix
        return
    run = load_recipe("r.yaml")
    assert {name: read(run, name) for name in entry["becomes"]} == entry["becomes"]
    assert len(run.notes) == 1
    assert entry["old"] in run.notes[0]
    assert "hf_x" not in run.notes[0]


def test_list_is_long_and_the_table_holds_no_name_beside_it():
    assert len({(entry["section"], entry["old"]) for entry in LIST}) >= 60
    listed = {(entry["section"], entry["old"]) for entry in LIST}
    both_ways = {
        ("train", name) for name in renamed_keys.RENAMED_KEYS["train"] if "checkpointing" in name and "use_" not in name
    }
    in_tables = {(section, name) for section, names in renamed_keys.RENAMED_KEYS.items() for name in names} - both_ways
    assert in_tables == listed - set(renamed_keys.RENAMED_VALUES)
    for (section, name), olds in renamed_keys.RENAMED_VALUES.items():
        assert set(olds) == {e["value"] for e in LIST if (e["section"], e["old"]) == (section, name)}


def test_old_names_lead_to_names_that_exist():
    for section in renamed_keys.RENAMED_KEYS:
        fields = keys.get_fields(section) if section != keys.SOURCE else keys.get_source_fields("text")
        for name, old in renamed_keys.renamed_in(section).items():
            head, _, inner = old.new.partition(".")
            assert not head or head in fields, name
            for value in () if inner else old.values.values():
                assert types.accepts(fields[head], value), name
            assert old.new or old.fix or old.no_op, name


def test_old_names_are_not_own_keys():
    for section, names in renamed_keys.RENAMED_KEYS.items():
        assert not set(names) & set(sections.OWN_KEYS.get(section, ()))


def test_old_name_beside_its_current_name_is_refused(here):
    (here / "r.yaml").write_text(
        format_value(BASE | {"train": {"group_by_length": True, "train_sampling_strategy": "random"}})
    )
    with pytest.raises(RecipeError, match="is the old name of `train_sampling_strategy`, which the recipe sets too"):
        load_recipe("r.yaml")
    config = {"accelerator_config": {"split_batches": True}, "split_batches": True}
    (here / "r.yaml").write_text(format_value(BASE | {"train": config}))
    with pytest.raises(RecipeError, match=r"is the old name of `accelerator_config\.split_batches`"):
        load_recipe("r.yaml")


def test_old_name_joins_the_mapping_that_it_moved_into(here):
    config = {"accelerator_config": {"even_batches": False}, "split_batches": True, "dispatch_batches": None}
    (here / "r.yaml").write_text(format_value(BASE | {"train": config}))
    run = load_recipe("r.yaml")
    assert run.train["accelerator_config"] == {"even_batches": False, "split_batches": True}


def test_old_value_out_of_range_is_refused(here):
    for value in (3, -0.1, "much", True):
        (here / "r.yaml").write_text(format_value(BASE | {"train": {"warmup_ratio": value}}))
        with pytest.raises(RecipeError):
            load_recipe("r.yaml")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_old_names_hold_on_the_floor_set_of_owners(tmp_path):
    """Without torch: the sources are read, not imported. `test_floor` runs the same tests with all of it."""
    root = Path(__file__).parents[2]
    pins = [line for line in (root / "tests" / "floor.txt").read_text().splitlines() if "==" in line]
    owners = [line for line in pins if line.split("==")[0] in ("trl", "transformers", "datasets", "peft", "accelerate")]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "floor", *owners]
    subprocess.run(install, check=True)
    code = (
        "import sys, pytest; sys.path.insert(0, sys.argv[1]);"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', 'not floor', sys.argv[2]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "floor", Path(__file__)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
