"""The arguments of SFTConfig by which an engine of `launch:` divides a model among processes.

Input: a checked recipe. Outputs: keyword arguments for SFTConfig, and faults of a configuration that contradicts its
engine. The engine's own file is handed on as it is: a DeepSpeed file for ZeRO; for FSDP the keys of transformers'
`fsdp_config`, which an accelerate file has under that name too. Not here: whether the machine and the installed
packages can run an engine (`launch.plan`), and which engine ran (`training.live`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import parallelism, ray_config
from trl_sft.recipe.checked import Run

AUTO, DDP, FSDP, RAY = "auto", "ddp", "fsdp", "ray"
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}  # engine -> the stage of DeepSpeed's ZeRO
_CONFIG = ("launch", "config")
_GATHERS = "stage3_gather_16bit_weights_on_model_save"  # of `zero_optimization`
# What DeepSpeed cannot do without; `auto` takes the value of the recipe (transformers, HfTrainerDeepSpeedConfig).
_DEEPSPEED: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def get_engine(run: Run) -> str:
    """Return the engine that several processes of a run use: `auto` is DDP, or what divides a row needs."""
    engine = str(run.launch.get("engine", AUTO))
    if engine == AUTO and parallelism.ACCELERATE_NAME in run.train:
        return parallelism.find_engine(run.train) or DDP
    return DDP if engine == AUTO else engine


def build_arguments(run: Run) -> dict[str, Any]:
    """Return the keyword arguments of SFTConfig for the engine of a recipe; empty for DDP and Ray, which runs DDP.

    Raises:
        RecipeError: `launch.config` cannot be read, or is for another engine.

    """
    engine = get_engine(run)
    config = read_config(run)
    if engine == RAY:
        ray_config.read(run, config)
    if engine == FSDP:
        return {"fsdp": True, "fsdp_config": {"version": 2} | config}
    if engine in STAGES:
        config = config or _DEEPSPEED | {"zero_optimization": {"stage": STAGES[engine]}}
        return {"deepspeed": _gather_weights(run, config) if STAGES[engine] == 3 else config}
    return {}


def _gather_weights(run: Run, config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of ZeRO-3 that saves whole weights. Raises RecipeError.

    Without this key transformers 5.23 writes DeepSpeed's shards in place of a model, which nothing else can load.
    """
    zero: dict[str, Any] = config["zero_optimization"]
    if zero.get(_GATHERS) is False:
        problem = f"`{_GATHERS}` is false: the run would end without a model that can be loaded"
        raise RecipeError(
            run.recipe.fault(_CONFIG, problem, f"Remove `{_GATHERS}`, or set it to true.", code="launch.bad_config")
        )
    return config | {"zero_optimization": {_GATHERS: True} | zero}


def read_config(run: Run) -> dict[str, Any]:
    """Return `launch.config` as the engine reads it; empty without one. Raises RecipeError."""
    value = run.launch.get("config") or {}
    engine = get_engine(run)
    if isinstance(value, str):
        value = _read_file(run, Path(value))
    if engine == FSDP and isinstance(value.get("fsdp_config"), dict):  # a file of accelerate
        value = value["fsdp_config"]
    if engine == FSDP and "zero_optimization" in value:
        raise _contradiction(run, "`zero_optimization` is a key of DeepSpeed, and the engine is fsdp")
    if engine in STAGES and "deepspeed_config" in value:
        raise _contradiction(run, "this is a file of accelerate, and ZeRO takes DeepSpeed's own")
    if engine == RAY and {"zero_optimization", "fsdp_config", "deepspeed_config"} & set(value):
        raise _contradiction(run, "this is the configuration of FSDP or DeepSpeed, and the engine is ray")
    if engine in STAGES and value:
        stage = (value.get("zero_optimization") or {}).get("stage", 0)
        if stage != STAGES[engine]:
            raise _contradiction(run, f"`zero_optimization.stage` is {stage}, and the engine is {engine}")
    return dict(value)


def _read_file(run: Run, path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON or YAML file. Raises RecipeError."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        fault = run.recipe.fault(
            _CONFIG, f"{path.name} cannot be read: {reason}", "Correct the file.", code="launch.bad_config"
        )
        raise RecipeError(fault) from None
    if not isinstance(value, dict):
        raise _contradiction(run, f"{path.name} holds no mapping")
    return value


def _contradiction(run: Run, problem: str) -> RecipeError:
    """Return the error of a configuration that is not for the engine."""
    fix = "Name the engine's own file (DeepSpeed's JSON for zero1, zero2, zero3), or set `engine` to the file's."
    fault: Fault = run.recipe.fault(_CONFIG, problem, fix, code="launch.bad_config")
    return RecipeError(fault)
