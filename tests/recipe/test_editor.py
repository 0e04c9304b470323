"""Edits of a recipe's text: comments and layout stay, the values change as the edit says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_sft.errors import Edit
from trl_sft.recipe import editor
from trl_sft.recipe.yaml_reader import format_value, parse_values

TEXT = """\
# a recipe
model: {name_or_path: trl_sft:tiny}  # small

data:
  train:  # two sources
    - path: a.jsonl
      weight: 1
    - {path: b.jsonl, weight: 2}
train:
  # rates
  learning_rte: "2e-5"  # usual
  epochs: 3

  save_steps: 5  # often
  lr_scheduler_kwargs:
    min_lr: 1e-6
lora:
run: {max_hours: 2, allow: [changed_data]}
"""
CASES = {
    "rename in a block": (Edit("rename", ("train", "learning_rte"), new=("train", "learning_rate")), "learning_rte"),
    "set a quoted number": (Edit("set", ("train", "learning_rte"), 2e-5), "2e-5  # usual"),
    "remove a line": (Edit("remove", ("train", "save_steps")), "save_steps"),
    "remove a block": (Edit("remove", ("train", "lr_scheduler_kwargs")), "min_lr"),
    "remove the first of a list item": (Edit("remove", ("data", "train", 0, "path")), "a.jsonl"),
    "remove of a flow mapping": (Edit("remove", ("run", "max_hours")), "max_hours"),
    "remove the last of a flow mapping": (Edit("remove", ("run", "allow")), "allow"),
    "remove the only one of a flow mapping": (Edit("remove", ("model", "name_or_path")), "name_or_path"),
    "remove a section": (Edit("remove", ("model",)), "model"),
    "set what is absent": (Edit("set", ("train", "seed"), 3), "seed: 3"),
    "set in an empty section": (Edit("set", ("lora", "r"), 8), "r: 8"),
    "set in an absent section": (Edit("set", ("launch", "engine"), "ddp"), "launch:\n  engine: ddp"),
    "set below an absent mapping": (Edit("set", ("evaluate", "generation", "top_p"), 0.9), "generation: {top_p: 0.9}"),
    "set a mapping": (Edit("set", ("data", "train"), {"path": "c.jsonl"}), "train: {path: c.jsonl}"),
    "set a word that older readers take for false": (Edit("set", ("train", "save_strategy"), "no"), '"no"'),
    "set an item of a list": (Edit("set", ("data", "train", 1), "b.jsonl"), "- b.jsonl"),
    "set null": (Edit("set", ("train", "epochs"), None), "epochs: null"),
    "move to a block": (Edit("rename", ("run", "max_hours"), new=("train", "hours")), "  hours: 2"),
    "move to a flow mapping": (Edit("rename", ("train", "epochs"), new=("run", "epochs")), ", epochs: 3}"),
    "move to an absent section": (
        Edit("rename", ("train", "epochs"), new=("launch", "epochs")),
        "launch:\n  epochs: 3",
    ),
    "move to an empty section": (Edit("rename", ("train", "epochs"), new=("lora", "r")), "lora:\n  r: 3"),
    "move a block": (Edit("rename", ("train", "lr_scheduler_kwargs"), new=("run", "k")), "k: {min_lr: 1e-06}"),
    "move with its comment": (Edit("rename", ("train", "save_steps"), new=("lora", "r")), "r: 5  # often"),
    "rename a section": (Edit("rename", ("run",), new=("runs",)), "runs: {"),
}


@pytest.mark.parametrize("name", CASES)
def test_edit_changes_what_it_says_and_keeps_every_other_line(name):
    edit, part = CASES[name]
    changed = editor.apply(TEXT, edit)
    assert changed is not None
    assert (part in changed) == (edit.action != "remove" and part != "learning_rte")
    before, after = TEXT.splitlines(), changed.splitlines()
    lost = [line for line in before if line not in after]
    touched = [line for line in lost if line.lstrip().startswith("#")]
    assert touched == []
    assert len(lost) <= 4, lost


def test_edits_one_after_another_keep_the_layout():
    text = TEXT
    for edit in (
        Edit("rename", ("train", "learning_rte"), new=("train", "learning_rate")),
        Edit("set", ("train", "learning_rate"), 2e-5),
        Edit("rename", ("train", "epochs"), new=("train", "num_train_epochs")),
        Edit("remove", ("train", "save_steps")),
    ):
        text = editor.apply(text, edit)
    expected = TEXT.replace('learning_rte: "2e-5"', "learning_rate: 2e-5").replace("epochs", "num_train_epochs")
    assert text == expected.replace("  save_steps: 5  # often\n", "")


def test_mapping_that_loses_its_only_key_stays_a_mapping():
    """`lora:` without a value would mean that there is no LoRA."""
    text = "lora:\n  peft_type: LORA  # always\ntrain:\n  seed: 1\n"
    changed = editor.apply(text, Edit("remove", ("lora", "peft_type")))
    assert parse_values(changed) == {"lora": {}, "train": {"seed": 1}}


def test_second_of_two_equal_keys_is_removed():
    text = "train:\n  seed: 1  # first\n  max_steps: 2\n  seed: 1\n"
    assert editor.apply(text, Edit("remove", ("train", "seed"))) == "train:\n  seed: 1  # first\n  max_steps: 2\n"


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("a: &x {r: 1}\nb: *x\n", Edit("remove", ("b", "r"))),  # the anchor belongs to both
        ("a: {r: 1}\n", Edit("remove", ("a", "s"))),
        ("a: {r: 1}\n", Edit("rename", ("b", "r"), new=("a", "s"))),
        ("a: [1]\n", Edit("set", ("a", 3), 2)),
        ("a: text\n", Edit("set", ("a", "r"), 2)),
        ("a: {\n", Edit("remove", ("a",))),
        ("- a\n", Edit("set", ("a", "r"), 2)),
    ],
)
def test_edit_that_cannot_be_made_leaves_the_text_alone(text, edit):
    assert editor.apply(text, edit) is None


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "model:", "model: {a: 1}", "model:\n  a: 1", "model:\n  a: |\n    x\n"]
)
def test_key_is_added_to_any_end_of_a_file(text):
    for key in (("train", "seed"), ("model", "b")):
        changed = editor.apply(text, Edit("set", key, 1))
        assert changed is not None
        assert parse_values(changed)[key[0]][key[1]] == 1


words = st.sampled_from(["a", "b", "seed", "path", "x_y"])
scalars = st.one_of(
    st.integers(-5, 5), st.floats(allow_nan=False), st.booleans(), st.none(), st.text("aé:#'\"\n ", max_size=5)
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))
edits = st.builds(
    Edit,
    st.sampled_from(["set", "rename", "remove"]),
    st.tuples(words, words) | st.tuples(words),
    values,
    st.tuples(words, words),
)


def write_block(value, indent=""):
    """Return a mapping in block style, with a comment at every line."""
    lines = []
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            lines += [f"{indent}{name}:  # below", *write_block(inner, f"{indent}    ")]
        else:
            lines.append(f"{indent}{name}: {format_value(inner)}  # at {name}")
    return lines


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(words, values, max_size=4), edits, st.booleans())
def test_any_edit_of_any_recipe_is_made_exactly_or_not_at_all(recipe, edit, block):
    text = "\n".join(write_block(recipe)) + "\n" if block else format_value(recipe)
    changed = editor.apply(text, edit)
    if changed is None:
        return
    after = parse_values(changed) or {}
    untouched = {name for name in recipe if name not in (edit.key[0], edit.new[0])}
    for name in untouched:
        assert format_value(after[name]) == format_value(recipe[name])
    if edit.action == "remove":
        parent = after.get(edit.key[0]) if len(edit.key) == 2 else after
        assert not parent or edit.key[-1] not in parent
    if edit.action == "set":
        inner = after
        for part in edit.key:
            inner = inner[part]
        assert format_value(inner) == format_value(edit.value) or not edit.value
