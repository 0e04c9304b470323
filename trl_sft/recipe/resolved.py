"""The resolved recipe as data: every value with who set it, its fingerprint, its files' hashes.

Inputs: a checked `Run`, and the settings that the machine or the model demands.
Outputs: values, the text of `resolved.yaml`, and hashes.
Not here: what only a live trainer knows (`training.manifest` writes it to `run.json`). Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import __version__
from trl_sft.file_digests import hash_file
from trl_sft.recipe import no_effect
from trl_sft.recipe.checked import Run, Setting, Source
from trl_sft.recipe.yaml_reader import Key, format_value

SECRET_KEYS = ("token", "hub_token")
# Words of `run.allow` that say how a run resumes. The others change how rows become tokens.
_RESUME_WORDS = ("changed_recipe", "changed_data")
# Keys of `run:` that change which weights a run trains or saves.
_SHAPING_KEYS = ("global_batch_size", "early_stopping")
_TOKENIZER_FILES = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
_SOURCE_KEYS = ("format", "wording", "rename", "task", "weight", "max_rows")


class ResolvedValue(NamedTuple):
    """One value of a resolved recipe."""

    key: Key
    value: Any
    set_by: str  # the place in the recipe, the override, or `trl_sft: REASON`


def format_recipe(run: Run, settings: Mapping[Key, Setting]) -> str:
    """Return the text of `resolved.yaml`: a recipe that repeats the run, with a comment on who set each value.

    Args:
        run: The checked recipe.
        settings: Values that this package set, with the reason of each.

    Returns:
        YAML. `set_by` shows an override as typed; secrets are left out where the text is written.

    """
    lines = [f"# The recipe as it ran, with who set each value. trl_sft {__version__}, from {run.recipe.path.name}."]
    lines += ["# Used as a recipe, it writes a run folder of its own beside this one."]
    section = ""
    has_evaluation_set = bool(run.sources.get("eval")) or run.data.get("eval_fraction") is not None
    values = {"train": run.train, "quantization": run.quantization or {}, "evaluate": run.evaluate or {}}
    useless = {entry.key: entry.problem for entry in no_effect.find(values, has_evaluation_set=has_evaluation_set)}
    for key, value, set_by in iterate_values(run, settings):
        if key[0] != section:
            section = str(key[0])
            lines += ["", f"{section}:"] if key[1:] else ["", f"{section}: {format_value(value)}  # {set_by}"]
        if key in useless:  # an override made it so: the recipe with both would be refused
            lines.append(f"  # {key[1]}: {format_value(value)}: {useless[key]}  # {set_by}")
        elif key[1:] and key[1] in SECRET_KEYS and isinstance(value, str):
            lines.append(f"  # {key[1]}: a secret, left out  # {set_by}")
        elif key[1:]:
            is_nested = isinstance(value, dict)
            kept = {name: value[name] for name in value if (*key, name) not in useless} if is_nested else value
            lines.append(f"  {key[1]}: {format_value(kept)}  # {set_by}")
    return "\n".join(lines) + "\n"


def iterate_values(run: Run, settings: Mapping[Key, Setting]) -> Iterator[ResolvedValue]:
    """Yield every value of a run, section by section.

    Left out are `train.output_dir` and most of `run:`, which do not change what is trained.

    Args:
        run: The checked recipe.
        settings: Values that this package set, with the reason of each; empty = only those of the recipe.

    Yields:
        Values in the order of `resolved.yaml`.

    """
    places = run.recipe.places
    yield ResolvedValue(("model", "name_or_path"), run.model_location.name, places[("model", "name_or_path")])
    tokenizer = dict(run.tokenizer)
    if run.chat_template:
        tokenizer["chat_template"] = run.chat_template.name
    if run.chat_template_kwargs:
        tokenizer["chat_template_kwargs"] = run.chat_template_kwargs
    sections = {"model": run.model, "tokenizer": tokenizer, "quantization": run.quantization, "lora": run.lora}
    for section, values in sections.items():
        if section == "lora" and values == {} and not any(key[0] == "lora" for key in settings):
            yield ResolvedValue(("lora",), {}, places[("lora",)])
        yield from _written_values(run, section, values or {})
        yield from _package_settings(section, settings)
    for part, sources in run.sources.items():
        if sources:
            yield ResolvedValue(("data", part), [_source_values(source) for source in sources], places[("data", part)])
    for name, value in run.data.items():  # `loss_on` may come from a key of `train:`
        yield ResolvedValue(("data", name), value, places.get(("data", name), "train: in the recipe"))
    yield from _package_settings("data", settings)
    yield from _written_values(run, "train", run.train)
    yield from _package_settings("train", settings)
    yield from _written_values(run, "launch", run.launch)
    shaping = {name: run.options[name] for name in _SHAPING_KEYS if run.options.get(name) not in (None, False)}
    yield from _written_values(run, "run", shaping)
    if allowed := [word for word in run.options.get("allow", []) if word not in _RESUME_WORDS]:
        yield from _written_values(run, "run", {"allow": allowed})
    if run.evaluate is None:
        yield ResolvedValue(("evaluate",), False, places[("evaluate",)])
    yield from _written_values(run, "evaluate", run.evaluate or {})


def _written_values(run: Run, section: str, values: Mapping[str, Any]) -> Iterator[ResolvedValue]:
    """Yield values that the recipe or an override sets."""
    for name, value in values.items():
        yield ResolvedValue((section, name), value, run.recipe.places[(section, name)])


def _package_settings(section: str, settings: Mapping[Key, Setting]) -> Iterator[ResolvedValue]:
    """Yield the values of a section that this package set, each with the reason."""
    for key, setting in settings.items():
        if key[0] == section:
            yield ResolvedValue(key, setting.value, f"trl_sft: {setting.reason}")


def _source_values(source: Source) -> dict[str, Any]:
    """Return a source as a recipe writes it, with absolute paths and without secrets."""
    files = [str(file) for file in source.location.files]
    values: dict[str, Any] = {"path": files[0] if len(files) == 1 else source.location.name}
    values |= {name: getattr(source, name) for name in _SOURCE_KEYS if getattr(source, name)}
    if source.function and not source.function.as_module:
        values["format"] = f"{source.function.file}:{source.function.name}"
    return values | {name: value for name, value in source.load_kwargs.items() if name not in SECRET_KEYS}


def compute_fingerprint(run: Run) -> str:
    """Return a hash of everything that changes the trained weights: model, rows and settings, but no secrets.

    Two runs with equal fingerprints train the same. `evaluate:` and `launch:` are not part of it.
    """
    values = list_fingerprint_values(run)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def list_fingerprint_values(run: Run) -> list[tuple[Key, Any]]:
    """Return the keys that change the trained weights, each with its value."""
    values = [(line.key, line.value) for line in iterate_values(run, {}) if line.key[-1] not in SECRET_KEYS]
    return [(key, value) for key, value in values if key[0] not in ("evaluate", "launch")]


def hash_files(run: Run) -> dict[str, str]:
    """Return the SHA-256 of every local file that the rows depend on: absolute path -> hexadecimal digest."""
    return {str(path): hash_file(path) for path in list_files(run)}


def list_files(run: Run) -> list[Path]:
    """Return the local files that the rows depend on: data, format functions, chat template; of a folder its files.

    A file that cannot be read is left out.
    """
    sources = [source for part in run.sources.values() for source in part]
    paths = [file for source in sources for file in source.location.files]
    paths += [source.function.file for source in sources if source.function]
    if run.chat_template and run.chat_template.files:
        template = run.chat_template.files[0]
        if template.is_dir():  # a tokenizer's folder: only these files define template and tokens
            paths += [template / name for name in _TOKENIZER_FILES if (template / name).is_file()]
        else:
            paths.append(template)
    return [file for path in paths for file in _files_under(path) if os.access(file, os.R_OK)]


def _files_under(path: Path) -> list[Path]:
    """Return the files of a folder at any depth, sorted; of a file, the file."""
    if not path.is_dir():
        return [path]
    files = [Path(parent, name) for parent, _, names in os.walk(path) for name in names]
    return sorted(file for file in files if file.is_file())
