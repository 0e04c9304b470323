"""What a run leaves in writing: resolved.yaml and run.json.

In: the run, what the machine made us set, live arguments. Out: texts and mappings for `rundir`.
Secrets (tokens of the hub) stand in neither.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import __version__, run_folder
from trl_sft.errors import LEFT_OUT, PASSWORD, Fault, RecipeError
from trl_sft.recipe.checked import Run, Setting, Source
from trl_sft.recipe.upstream import fields
from trl_sft.recipe.yaml_reader import Key, flow

_PACKAGES = ("trl", "transformers", "datasets", "peft", "accelerate", "torch", "tokenizers")
_HELD_OUT = ("eval_loss", "eval_mean_token_accuracy", "eval_entropy")
# keys of SFTConfig that the run sets from other sections of the recipe
_OURS = ("output_dir", "model_init_kwargs", "completion_only_loss", "assistant_only_loss")
_SECRETS = ("token", "hub_token")
_IN_ENVIRONMENT = re.compile(r"(TOKEN|API_KEY|SECRET|PASSWORD)$")
_SECRET_LETTERS = 8  # a shorter value is a word that may stand anywhere
# what `run.allow` accepts of going on; the rest says how rows become tokens
_OF_RESUMING = ("changed_recipe", "changed_data")
_TOKENIZER = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")


class ResolvedValue(NamedTuple):
    """One value of a resolved recipe."""

    key: Key
    value: Any
    who: str


def resolved(run: Run, settings: dict[Key, Setting]) -> str:
    """Return the recipe as it ran, each value with who set it; run as a recipe it does the same again."""
    out = [f"# As it ran, with who set each value. trl_sft {__version__}, from {run.recipe.path.name}."]
    out += ["# Run as a recipe it writes a folder of its own, beside this one."]
    section = ""
    for key, value, who in lines(run, settings):
        if key[0] != section:
            section = str(key[0])
            out += ["", f"{section}:"] if key[1:] else ["", f"{section}: {flow(value)}  # {who}"]
        if key[1:] and key[1] in _SECRETS and isinstance(value, str):
            out.append(f"  # {key[1]}: a secret, left out  # {who}")
        elif key[1:]:
            out.append(f"  {key[1]}: {flow(value)}  # {who}")
    return without_secrets(run, "\n".join(out) + "\n")  # an override's place shows it too


def lines(run: Run, settings: dict[Key, Setting]) -> Iterator[ResolvedValue]:
    """Yield every value that was set, by section; not output_dir and most of `run:`, which say how it is run."""
    where = run.recipe.places
    yield ResolvedValue(("model", "name_or_path"), run.base.name, where[("model", "name_or_path")])
    tokenizer = run.tokenizer | ({"chat_template": run.template.name} if run.template else {})
    tokenizer |= {"chat_template_kwargs": run.template_kwargs} if run.template_kwargs else {}
    sections = {"model": run.model, "tokenizer": tokenizer, "quantization": run.quantization, "lora": run.lora}
    for section, values in sections.items():
        if section == "lora" and values == {} and not settings:
            yield ResolvedValue(("lora",), {}, where[("lora",)])
        for name, value in (values or {}).items():
            yield ResolvedValue((section, name), value, where[(section, name)])
        yield from (
            ResolvedValue(key, s.value, f"trl_sft: {s.reason}") for key, s in settings.items() if key[0] == section
        )
    for part, sources in run.sources.items():
        if sources:
            yield ResolvedValue(("data", part), [_source(source) for source in sources], where[("data", part)])
    for name, value in run.data.items():
        yield ResolvedValue(("data", name), value, where.get(("data", name), "train: in the recipe"))
    yield from _ours("data", settings)
    for name, value in run.train.items():
        yield ResolvedValue(("train", name), value, where[("train", name)])
    yield from _ours("train", settings)
    for name, value in run.launch.items():
        yield ResolvedValue(("launch", name), value, where[("launch", name)])
    if "global_batch_size" in run.run:
        yield ResolvedValue(
            ("run", "global_batch_size"), run.run["global_batch_size"], where[("run", "global_batch_size")]
        )
    if allowed := [name for name in run.run.get("allow", []) if name not in _OF_RESUMING]:
        yield ResolvedValue(("run", "allow"), allowed, where[("run", "allow")])
    if run.evaluate is None:
        yield ResolvedValue(("evaluate",), False, where[("evaluate",)])
    for name, value in (run.evaluate or {}).items():
        yield ResolvedValue(("evaluate", name), value, where[("evaluate", name)])


def _ours(section: str, settings: dict[Key, Setting]) -> Iterator[ResolvedValue]:
    """Yield the values of a section that this package set, each with the reason."""
    for key, setting in settings.items():
        if key[0] == section:
            yield ResolvedValue(key, setting.value, f"trl_sft: {setting.reason}")


def claimed(run: Run) -> run_folder.Claim:
    """Decide whether the run begins, goes on or is refused, by what its folder holds. Raises RecipeError."""
    claim = run_folder.claim(run.output_dir, fingerprint(run), lambda: digests(run), run.run)
    if claim.refused:
        raise RecipeError(Fault(run.recipe.where(claim.key), claim.refused, claim.fix))
    return claim


def fingerprint(run: Run) -> str:
    """Return what two runs share that train the same: model, rows, settings; not where they write, what they ask."""
    values = [(line.key, line.value) for line in lines(run, {}) if line.key[-1] not in _SECRETS]
    values = [value for value in values if value[0][0] not in ("evaluate", "launch")]  # they change no weight
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def beginning(run: Run, settings: dict[Key, Setting], args: Any) -> dict[str, Any]:
    """Return run.json as it stands when training starts; `args` are the live SFTConfig."""
    from trl_sft.model import device

    ours = {*run.train, *(key[-1] for key in settings), *_OURS}
    rest = [field.name for field in dataclasses.fields(args) if field.name not in ours]
    return {
        "trl_sft": __version__,
        "versions": {package: fields.version(package) for package in _packages(run)},
        "fingerprint": fingerprint(run),
        "git_commit": _commit(run.recipe.path.parent),
        "data": digests(run),
        "hardware": device.hardware(),
        "seed": args.seed,
        "defaults": {name: _plain(getattr(args, name)) for name in rest if not name.endswith("token")},
        "outcome": run_folder.RUNNING,
    }


def _packages(run: Run) -> tuple[str, ...]:
    return _PACKAGES if run.quantization is None else (*_PACKAGES, "bitsandbytes")


def digests(run: Run) -> dict[str, str]:
    """Return the sha256 of every local file of rows; a folder's files each."""
    files = [f for sources in run.sources.values() for source in sources for f in source.place.files]
    code = [s.code.file for sources in run.sources.values() for s in sources if s.code]
    template = [run.template.files[0]] if run.template and run.template.files else []
    if template and template[0].is_dir():  # another tokenizer's: what its template and tokens are read from
        template = [file for name in _TOKENIZER if (file := template[0] / name).is_file()]
    files += [*code, *template]
    each = [p for f in files for p in (sorted(q for q in f.rglob("*") if q.is_file()) if f.is_dir() else [f])]
    return {str(path): _digest(path) for path in each}


def usage(folder: str, apart: bool) -> list[str]:
    """Return the lines of Python that make `ask` from a folder of a finished run.

    `apart`: an adapter whose tokens or end token differ from its base's. transformers loads an adapter with
    the base's, so peft has to grow the embedding, and generation has to be told where to stop.
    """
    if not apart:
        return ["from transformers import pipeline", f'ask = pipeline("text-generation", {flow(folder)})']
    return [
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer, GenerationConfig, pipeline",
        f"folder = {flow(folder)}",
        "model = AutoPeftModelForCausalLM.from_pretrained(folder)",
        "model.generation_config = GenerationConfig.from_pretrained(folder)",
        'ask = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained(folder))',
    ]


def card(run: Run, base: str, adapter: bool, metrics: dict[str, float], apart: bool) -> str:
    """Return the model card; `base` is the model's folder or hub id. TRL's names neither a local base nor results.

    `apart` as in `usage`.
    """
    header = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if not Path(base).is_absolute():
        header["base_model"] = base
    held = [f"| {name.removeprefix('eval_')} | {value:.4g} |" for name, value in metrics.items() if name in _HELD_OUT]
    results = ["| on held-out rows | value |", "|---|---|", *held] if held else ["No rows were held out."]
    versions = ", ".join(f"{package} {fields.version(package)}" for package in _PACKAGES)
    name = Path(base).name if Path(base).is_absolute() else base
    return "\n".join(
        [
            *("---", *(f"{name}: {flow(value)}" for name, value in header.items()), "tags: [trl, sft, trl_sft]", "---"),
            *("", f"# {run.output_dir.name}", ""),
            f"`{name}`, {'with LoRA' if adapter else 'all weights'} fine-tuned by trl_sft {__version__}.",
            *("", "## Results", "", *results),
            *("", "## Use", "", "```python", *usage(run.output_dir.name, apart), "```", ""),
            *(
                "`" + run.output_dir.name + "` is this folder.",
                "",
                "## Recipe",
                "",
                "```yaml",
                without_secrets(run, run.recipe.text).rstrip(),
                "```",
            ),
            *(["", f"Overrides: `{without_secrets(run, ' '.join(given))}`"] if (given := run.recipe.words[1:]) else []),
            *("", f"Versions: {versions}.", ""),
        ]
    )


def without_secrets(run: Run, text: str) -> str:
    """Return a text less tokens, keys and passwords of the recipe and the environment: a folder may be published."""
    for secret in sorted(secrets(run), key=len, reverse=True):
        text = text.replace(secret, LEFT_OUT)
    return PASSWORD.sub(r"\1" + LEFT_OUT, text)


def secrets(run: Run) -> list[str]:
    """Return the hub's tokens that the recipe holds, and what the environment calls a token, a key, a password."""
    sections = [run.model, run.tokenizer, run.train, *(s.load for part in run.sources.values() for s in part)]
    given = [section.get(name) for section in sections for name in _SECRETS]
    around = [v for name, v in os.environ.items() if _IN_ENVIRONMENT.search(name) and len(v) >= _SECRET_LETTERS]
    return [value for value in (*given, *around) if isinstance(value, str) and value]


def _source(source: Source) -> dict[str, Any]:
    """Return a source as a recipe writes it, with absolute paths."""
    files = [str(file) for file in source.place.files]
    ours: dict[str, Any] = {"path": files[0] if len(files) == 1 else source.place.name}
    names = ("format", "wording", "rename", "task", "weight", "max_rows")
    ours |= {name: getattr(source, name) for name in names if getattr(source, name)}
    if source.code and not source.code.as_module:
        ours["format"] = f"{source.code.file}:{source.code.name}"
    return ours | {k: v for k, v in source.load.items() if k not in _SECRETS}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit(folder: Path) -> str | None:
    """Return the commit of the recipe's repository, with + where files differ from it; None outside one."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | dict | None) else str(value)
