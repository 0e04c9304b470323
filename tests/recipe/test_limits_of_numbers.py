"""Numbers, keys and values that no run can use are refused with their key, and calculate nothing."""

import pytest

from trl_sft import load_recipe
from trl_sft.errors import RecipeError
from trl_sft.recipe import yaml_scalars

RECIPE = """\
model: {name_or_path: "trl_sft:tiny"}
data: {train: {path: rows.jsonl, format: question_answer}}
train: {output_dir: out}
"""


def refuse(here, *overrides):
    """Return the only fault of the recipe with overrides."""
    (here / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml", overrides)
    assert len(caught.value.faults) == 1, str(caught.value)
    return caught.value.faults[0]


@pytest.mark.parametrize(
    "number",
    ["9" * 20, "9" * 350, "-" + "9" * 5000, "0x" + "f" * 17, "0o" + "7" * 4000, "1e400", "1e-400", "9" * 400 + ".5"],
)
def test_number_that_64_bits_cannot_hold_is_refused(number, here):
    fault = refuse(here, f"train.max_steps={number}")
    assert fault.code == "recipe.number_out_of_range"
    assert len(str(fault)) < 500 + len(number)
    assert yaml_scalars.read(number) == number  # nothing calculates with it


@pytest.mark.parametrize(
    ("text", "value"),
    [("9223372036854775807", 2**63 - 1), ("-0", 0), ("0e999", 0.0), ("1e308", 1e308), ("5e-324", 5e-324), ("007", 7)],
)
def test_number_that_64_bits_hold_is_read(text, value):
    assert yaml_scalars.read(text) == value


@pytest.mark.parametrize(
    ("key", "number", "maximum"),
    [
        ("per_device_train_batch_size", 2**63 - 1, "1,048,576"),
        ("max_steps", 2**63 - 1, "2,147,483,647"),
        ("num_train_epochs", "1e300", "2,147,483,647"),
        ("max_length", 2**31, "16,777,216, or null to truncate no row"),
        ("dataloader_num_workers", 2**20, "1,024"),
        ("seed", 2**32, "4,294,967,295"),
    ],
)
def test_count_beyond_what_upstream_can_count_is_refused(key, number, maximum, here):
    fault = refuse(here, f"train.{key}={number}")
    assert (fault.code, fault.fix) == ("recipe.out_of_range", f"Write at most {maximum}.")


@pytest.mark.parametrize(
    "override",
    [
        f"data.train.{'1' * 5000}.path=x",
        "a." * 20_000 + "b=1",
        f"train.{'x' * 100_000}=1",
        "train.lr_scheduler_kwargs={'",
    ],
)
def test_key_of_an_override_has_a_limit(override, here):
    assert len(str(refuse(here, override))) < 15_000


def test_deep_values_and_aliases_of_aliases_are_refused_at_once(here):
    assert refuse(here, f"train.run_name={'[' * 101}{']' * 101}").code == "recipe.too_deep"
    bomb = (
        "{a0: &a0 [1, 1], " + ", ".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)) + "}"
    )
    fault = refuse(here, f"train.lr_scheduler_kwargs={bomb}")
    assert (fault.code, fault.where.endswith("train.lr_scheduler_kwargs")) == ("recipe.too_deep", True)


def test_nul_in_a_text_is_refused_whatever_its_key(here):
    for key in ("train.run_name", "data.train.encoding", "model.revision", "train.output_dir"):
        fault = refuse(here, f'{key}="a\\0b"')
        assert (fault.code, fault.where.endswith(key)) == ("recipe.invalid_yaml", True)


def test_letter_of_another_script_is_named(here):
    assert "U+0455 (cyrillic small letter dze)" in refuse(here, "train.\u0455eed=1").problem
    assert "U+0430 (cyrillic small letter a)" in refuse(here, "train.packing=f\u0430lse").problem
    assert "U+00A0 (no-break space)" in refuse(here, "train.seed=7\u00a0x").problem


def test_root_of_the_file_system_is_no_source_and_an_empty_path_no_folder(here):
    assert refuse(here, "data.train.path=/").code == "path.root_folder"
    assert refuse(here, "train.output_dir=' '").code == "path.empty"
    assert refuse(here, 'train.output_dir="out\\u200b"').code == "path.invalid_character"
    (here / "link.jsonl").symlink_to("nothing.jsonl")
    assert refuse(here, "data.train.path=link.jsonl").code == "path.broken_link"
    assert refuse(here, "data.train.path=/proc/self/mem").code == "path.special_file"
