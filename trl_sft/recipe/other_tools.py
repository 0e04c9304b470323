"""Recognises a file of another trainer that is given as a recipe.

Inputs: the values at the top of the file. Outputs: the name under which `import` reads that tool. Not here: what its
settings mean (`importers`).
"""

from __future__ import annotations

from collections.abc import Collection

# tool -> (a setting that its files always have, settings of which they have one). The first tool that fits counts.
_SIGNS = {
    "axolotl": (
        "base_model",
        {"datasets", "micro_batch_size", "sequence_len", "adapter", "pretraining_dataset", "val_set_size", "rl"},
    ),
    "llamafactory": (
        "model_name_or_path",
        {"stage", "finetuning_type", "template", "cutoff_len", "dataset_dir", "do_train", "dataset", "lora_target"},
    ),
    "alignment-handbook": ("model_name_or_path", {"dataset_mixer", "dataset_mixture", "dataset_splits"}),
    "trl": ("model_name_or_path", {"dataset_name", "use_peft", "lora_r", "dataset_train_split", "load_in_4bit"}),
}
_OWN = {"model", "data", "train"}  # sections of a recipe: a file that has one is a recipe with wrong keys


def recognise(names: Collection[str]) -> str:
    """Return the tool whose settings have these names; "" if they may be a recipe."""
    if _OWN & set(names):
        return ""
    for tool, (always, others) in _SIGNS.items():
        if always in names and others & set(names):
            return tool
    return ""
