"""The keys of `launch.config` for Ray: keyword arguments of `ray.init`, and fields of Ray Train's two configurations.

Input: a checked recipe and the mapping of `launch.config`. Outputs: the same mapping as a `RayConfig`, or the faults of
keys and types, which are read from the source of the installed Ray. Without Ray nothing is compared; `launch` then says
that it is missing. Not here: the processes (`launch.ray`). Written for Ray 2.60.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe.checked import Run
from trl_sft.recipe.upstream import fields, packages, types
from trl_sft.recipe.yaml_reader import Key, describe_value

_KEY: Key = ("launch", "config")
_OWNERS = {
    "init": "ray._private.worker:init",
    "scaling_config": "ray.train.v2.api.config:ScalingConfig",
    "run_config": "ray.train.v2.api.config:RunConfig",
}
_SAVES_ITSELF = "Remove the key: checkpoints are the Trainer's, and the same command resumes after a failure."
# Keys of Ray whose value something else decides, and what to do instead.
_DECIDED = {
    ("scaling_config", "num_workers"): "Set `launch.nproc_per_node`, or add --processes NUMBER to the command.",
    ("scaling_config", "use_gpu"): "Remove the key; `train.use_cpu: true` trains on CPUs.",
    ("scaling_config", "use_tpu"): "Remove the key; runs on TPUs were not tried.",
    ("scaling_config", "trainer_resources"): "Remove the key, which Ray Train no longer takes.",
    ("run_config", "failure_config"): _SAVES_ITSELF,
    ("run_config", "checkpoint_config"): _SAVES_ITSELF,
}


@dataclass(frozen=True)
class RayConfig:
    """What `launch.config` hands on to Ray; empty mappings = Ray's own values, and those of `launch.ray`."""

    init: dict[str, Any] = field(default_factory=dict)  # keyword arguments of `ray.init`
    scaling_config: dict[str, Any] = field(default_factory=dict)  # fields of `ray.train.ScalingConfig`
    run_config: dict[str, Any] = field(default_factory=dict)  # fields of `ray.train.RunConfig`


def read(run: Run, config: Mapping[str, Any]) -> RayConfig:
    """Return the mapping of `launch.config`, compared with what the installed Ray takes.

    Raises:
        RecipeError: a key that Ray lacks or that something else decides, or a value of another type.

    """
    if faults := [*_find_faults(run, config)]:
        raise RecipeError(faults)
    return RayConfig(**{name: dict(config.get(name) or {}) for name in _OWNERS})


def _find_faults(run: Run, config: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the faults of each key."""
    for section, values in config.items():
        if section not in _OWNERS:
            problem = f"`{section}` is no part of the configuration of Ray"
            yield _fault(run, (section,), problem, fix=_suggest(section, _OWNERS))
        elif not isinstance(values, dict | None):
            problem = f"`{section}` is {describe_value(values)}, and has to be a mapping"
            yield _fault(run, (section,), problem, fix=f"Write the keys of `{section}` below it.")
        else:
            yield from _find_faults_of_section(run, section, values or {})


def _find_faults_of_section(run: Run, section: str, values: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the faults of the keys of one section."""
    has_ray = packages.find_file("ray.train.v2.api.config") is not None
    declared = fields.read_fields(_OWNERS[section]) if has_ray else {}
    for name, value in values.items():
        place = f"`{section}.{name}`"
        if (section, name) in _DECIDED:
            problem = f"{place} is {describe_value(value)}, but another key decides it"
            yield _fault(run, (section, name), problem, fix=_DECIDED[section, name])
        elif has_ray and name not in declared:
            yield _fault(run, (section, name), f"{place} is no key of Ray", fix=_suggest(name, declared))
        elif has_ray and not types.accepts(declared[name], value):
            expected = types.describe(declared[name])
            problem = f"{place} is {describe_value(value)}, and has to be {expected}"
            yield _fault(run, (section, name), problem, fix=f"Write {expected}.")


def _fault(run: Run, names: tuple[str, ...], problem: str, *, fix: str) -> Fault:
    """Return the fault of a key below `launch.config`, which may be a file."""
    key = _KEY if isinstance(run.launch["config"], str) else (*_KEY, *names)
    return run.recipe.fault(key, problem, fix, code="launch.bad_config")


def _suggest(word: str, names: Collection[str]) -> str:
    """Return the sentence that names the right key."""
    near = types.suggest(word, names)
    return f"Did you mean `{near}`?" if near else f"Write one of {', '.join(names)}."
