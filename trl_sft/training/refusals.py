"""Turns an exception that upstream raises before step 1 into a fault at the key that the message is about.

In: the run and the exception. Out: a `UserError`, or the exception itself where a line of this package raised it:
then it is a fault of ours, and keeps its traceback.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from trl import SFTConfig

from trl_sft.errors import Fault, MissingPackage, RecipeError
from trl_sft.recipe.checked import Run
from trl_sft.recipe.yaml_reader import Key

_PACKAGE = Path(__file__).parents[1]


def as_fault(run: Run, error: Exception) -> Exception:
    """Return upstream's refusal as a fault at its key; an error in this package is returned unchanged."""
    text = " ".join(str(error).split()) or type(error).__name__
    key = _key_of_message(run, text)
    where = run.recipe.where(key or ("train",))
    if "install" in text and not isinstance(error, ValueError | OSError):
        return MissingPackage(
            Fault(where, text, "Install what the message asks for, in this Python environment.", code="package.missing")
        )
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        fix = "Use a model whose weights are complete."
        if "safetensors" in text:
            fix += " To read pickled weights, set model.use_safetensors: false."
        place = run.recipe.where(("model", "name_or_path"))
        return RecipeError(Fault(place, f"{run.model_location.name}: {text}", fix, code="model.incomplete_weights"))
    if _raised_by_this_package(error):
        return error
    return RecipeError(
        Fault(
            where,
            text,
            "This message comes from an installed library. Set another value for the key.",
            code="recipe.refused_by_library",
        )
    )


def _key_of_message(run: Run, text: str) -> Key | None:
    """Return the key of the recipe that a message of upstream's speaks of; None where it speaks of none.

    The surest sign comes first: the key's name, then its value, then a key of SFTConfig that the recipe leaves out,
    then words and numbers that a key shares with the message.
    """
    sections = {"train": run.train, "lora": run.lora or {}, "model": run.model}
    values: dict[Key, object] = {}
    for section, keys in sections.items():
        values |= {(section, name): value for name, value in keys.items()}
    by_name = [key for key in values if _names_key(text, str(key[1]))]
    if by_name:
        return max(by_name, key=lambda key: len(str(key[1])))
    by_value = _keys_by_value(values, text)
    if by_value:
        return max(by_value, key=lambda key: len(str(key[1])))
    fields = [field.name for field in dataclasses.fields(SFTConfig) if re.search(rf"\b{field.name}\b", text)]
    absent = [name for name in fields if "_" in name]  # a word without an underscore may be plain English
    if absent:
        return "train", max(absent, key=len)
    return _key_by_shared_words(values, text)


def _names_key(text: str, name: str) -> bool:
    spaced = name.replace("_", " ")
    return bool(re.search(rf"\b({name}|{spaced})\b", text, re.IGNORECASE))


def _keys_by_value(values: dict[Key, object], text: str) -> list[Key]:
    """Return the keys whose value a message holds: a missing package is named by it, `report_to: comet_ml`."""
    letters = re.sub(r"[^a-z0-9]", "", text.lower())
    keys = []
    for key, value in values.items():
        word = re.sub(r"[^a-z0-9]", "", str(value).lower())
        if len(word) > 4 and word in letters:
            keys.append(key)
    return keys


def _key_by_shared_words(values: dict[Key, object], text: str) -> Key | None:
    """Return the key that shares a word and another word or its number with a message.

    torch has names of its own: "Invalid beta parameter at index 0: 2.0", "num_workers option should be non-negative".
    """
    words = set(re.findall(r"[a-z]{3,}", text.lower()))
    numbers = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", text)}
    shared = {}
    for key, value in values.items():
        has_number = type(value) in (int, float) and value in numbers
        shared[key] = len(words & set(re.findall(r"[a-z]{3,}", str(key[1])))) + has_number
    best = max(shared, key=lambda key: shared[key], default=None)
    return best if best and shared[best] > 1 else None


def _raised_by_this_package(error: BaseException) -> bool:
    """Tell whether the line that raised is ours."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and _PACKAGE in Path(frame.tb_frame.f_code.co_filename).parents
