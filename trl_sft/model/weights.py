"""Compares the weight files of a model or an adapter with its architecture, before any weight is loaded.

In: a `Run` and its `ModelSource`. Out: nothing, or faults that name the tensors. transformers draws missing tensors at
random and passes over extra ones with a note. Here upstream's own loading runs on torch's meta device: it reads the
headers of the files and applies upstream's own renaming and tying, and holds no values (0.02 s for 38 tensors).
`check_values` looks at the weights once they are loaded. Deliberately absent: weights that were saved quantized.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trl_sft.errors import Edit, Fault, RecipeError, first_line
from trl_sft.model import trust
from trl_sft.model.load import ModelSource
from trl_sft.recipe.checked import Run

_MAX_NAMES = 3  # tensors that a message names
# Keys of `model:` that decide which files are read, and how their tensors are named
_FILE_KEYS = ("cache_dir", "key_mapping", "local_files_only", "revision", "subfolder", "token", "variant")
_ACCEPTED = "unused_weights"  # word of run.allow
_UNREADABLE = (
    OSError,
    SafetensorError,
    RuntimeError,
    ValueError,
    KeyError,
    pickle.UnpicklingError,
)  # what upstream raises for broken files
_NO_WEIGHTS = ("I", "U", "BOOL")  # how the dtypes of safetensors begin that are no floating point


def check_weights(run: Run, source: ModelSource) -> None:
    """Refuse weights that are missing, damaged or of another shape, and weights that the model does not use.

    Args:
        run: The checked recipe.
        source: The model. If it is on the hub, its files are downloaded.

    Raises:
        RecipeError: The files do not fit the model; the first tensors are named.

    """
    if getattr(source.config, "quantization_config", None) is not None or run.model.get("gguf_file"):
        return
    where = run.recipe.where(("model", "name_or_path"))
    _check_index(source.name, where)
    with quiet_upstream():
        model, report = _load_on_meta(run, source, where)
        _check_dtypes(model, source.name, where)
        if report["mismatched_keys"]:
            raise RecipeError(_explain_shapes(run, source, report["mismatched_keys"]))
        _refuse_differences(run, source, source.name, missing=report["missing_keys"], unused=report["unexpected_keys"])
        if source.adapter and Path(source.adapter).is_dir():
            _check_adapter_dtypes(source.adapter, where)
            result = _load_adapter(model, source.adapter, where)
            _refuse_differences(run, source, source.adapter, missing=result.missing_keys, unused=result.unexpected_keys)


def check_values(run: Run, source: ModelSource, model: PreTrainedModel) -> None:
    """Refuse loaded weights that are not finite: no step of training makes them finite. Raises RecipeError.

    Args:
        run: The checked recipe.
        source: The model, for its name.
        model: With its weights.

    """
    names = [name for name, values in model.named_parameters() if _is_not_finite(values)]
    if names:
        where = run.recipe.where(("model", "name_or_path"))
        problem = f"{source.name}: {_count_tensors(names)} not finite (NaN or infinite)"
        fix = "Copy or download the files again, or use another model."
        raise RecipeError(Fault(where, problem, fix, code="model.incomplete_weights"))


def _is_not_finite(values: torch.Tensor) -> bool:
    """Tell whether a tensor of numbers holds one that is not finite; tensors without values hold none."""
    if values.is_meta or not values.is_floating_point() or values.element_size() == 1:
        return False
    return not bool(values.detach().isfinite().all())


def _check_index(name: str, where: str) -> None:
    """Refuse an index of shards that is no mapping from tensors to file names. Raises RecipeError."""
    for path in Path(name).glob("*.index.json") if Path(name).is_dir() else ():
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RecipeError(_explain_unreadable(name, where, ValueError(f"{path.name}: {error}"))) from None
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
            problem = f"{name}: {path.name} has no `weight_map` that names the file of each tensor"
            fix = "Copy or download the files again, or use another model."
            raise RecipeError(Fault(where, problem, fix, code="model.incomplete_weights"))


def _check_dtypes(model: PreTrainedModel, name: str, where: str) -> None:
    """Refuse whole numbers in place of weights: cast to the model's dtype they are others. Raises RecipeError."""
    parameters = {parameter for parameter, values in model.named_parameters() if values.is_floating_point()}
    wrong = []
    for path in sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else ():
        with safe_open(path, "pt") as file:
            for tensor in file.keys():  # noqa: SIM118 (not a mapping)
                is_weight = tensor in parameters or f"{model.base_model_prefix}.{tensor}" in parameters
                if is_weight and file.get_slice(tensor).get_dtype().startswith(_NO_WEIGHTS):
                    wrong.append(tensor)
    if wrong:
        problem = (
            f"{name}: {_count_tensors(wrong)} stored as whole numbers, and config.json has no `quantization_config`"
        )
        fix = "Use files with weights in float32, float16 or bfloat16."
        raise RecipeError(Fault(where, problem, fix, code="model.incomplete_weights"))


def _check_adapter_dtypes(adapter: str, where: str) -> None:
    """Refuse whole numbers in place of the weights of an adapter, which are not trained. Raises RecipeError."""
    wrong = []
    for path in sorted(Path(adapter).glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                wrong += [name for name in names if file.get_slice(name).get_dtype().startswith(_NO_WEIGHTS)]
        except _UNREADABLE as error:
            raise RecipeError(_explain_unreadable(adapter, where, error)) from None
    if wrong:
        problem = f"{adapter}: {_count_tensors(wrong)} stored as whole numbers, which cannot be trained"
        fix = "Use an adapter with weights in float32, float16 or bfloat16."
        raise RecipeError(Fault(where, problem, fix, code="model.incomplete_weights"))


def _load_on_meta(run: Run, source: ModelSource, where: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model without values, and upstream's report on its files. Raises RecipeError."""
    model_class = getattr(transformers, source.config.architectures[0], None) or AutoModelForCausalLM  # as TRL chooses
    keywords = trust.build_load_keywords(run)
    keywords = {key: keywords[key] for key in (*_FILE_KEYS, "trust_remote_code", "use_safetensors") if key in keywords}
    keywords |= run.model.get("config") or {}
    try:
        model, report = model_class.from_pretrained(
            source.name, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, **keywords
        )
    except _UNREADABLE as error:
        raise RecipeError(_explain_unreadable(source.name, where, error)) from None
    return model, report


def _explain_shapes(run: Run, source: ModelSource, mismatched: Collection[tuple[str, Any, Any]]) -> Fault:
    """Return the fault of tensors whose shape in the files is another one than in the model.

    Args:
        run: The checked recipe.
        source: The model.
        mismatched: Of each tensor its name, its shape in the files, and its shape in the model.

    """
    tensors = sorted((tensor, tuple(in_files), tuple(in_model)) for tensor, in_files, in_model in mismatched)
    first, in_files, in_model = tensors[0]
    problem = f"{source.name}: {first} has the shape {in_files} in its files and {in_model} in the model"
    if len(tensors) > 1:
        problem += f", and {len(tensors) - 1} more differ"
    fix = "Use the config.json that belongs to the weights, or copy or download the files again."
    fault = Fault(run.recipe.where(("model", "name_or_path")), problem, fix, code="model.incomplete_weights")
    return _name_fields(run, source, fault)


def _name_fields(run: Run, source: ModelSource, fault: Fault) -> Fault:
    """Return a fault of tensors that do not fit, which names the fields of `model.config` that are the reason."""
    fields = _list_shape_fields(run, source)
    if not fields:
        return fault
    names = ", ".join(f"`{field}`" for field in fields)
    problem = f"{fault.problem}; {names} of `model.config` change{'s' * (len(fields) == 1)} the tensors of the model"
    edits = tuple(Edit("remove", ("model", "config", field)) for field in fields)
    return run.recipe.fault(("model", "config", fields[0]), problem, f"Remove {names}.", code=fault.code, edits=edits)


def _list_shape_fields(run: Run, source: ModelSource) -> list[str]:
    """Return the fields of `model.config` each of which alone gives the model other tensors, or other shapes."""
    fields: dict[str, Any] = run.model.get("config") or {}
    if not fields:
        return []
    keywords = {key: run.model[key] for key in ("revision", "subfolder", "cache_dir") if key in run.model}
    trusted = bool(run.model.get("trust_remote_code"))
    saved = AutoConfig.from_pretrained(source.name, trust_remote_code=trusted, **keywords)
    shapes = _list_shapes(saved, trusted=trusted)
    changed = []
    for field, value in fields.items():
        config = type(saved).from_dict(saved.to_dict(), **{field: value})
        try:
            if _list_shapes(config, trusted=trusted) != shapes:
                changed.append(field)
        except (ValueError, RuntimeError, TypeError, ArithmeticError):  # the class builds no model of it alone
            changed.append(field)
    return changed


def _list_shapes(config: PretrainedConfig, *, trusted: bool) -> dict[str, torch.Size]:
    """Return the shape of each stored tensor of a model with a configuration; tied tensors are stored once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    return {name: tensor.shape for name, tensor in model.named_parameters()}


def _load_adapter(model: PreTrainedModel, adapter: str, where: str) -> Any:
    """Return peft's report on the files of an adapter. Raises RecipeError."""
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(adapter)
        empty = PeftModel(model, config, low_cpu_mem_usage=True)
        return empty.load_adapter(adapter, "default", torch_device="cpu", low_cpu_mem_usage=True)
    except (*_UNREADABLE, TypeError, AttributeError) as error:
        raise RecipeError(_explain_unreadable(adapter, where, error)) from None


def _refuse_differences(
    run: Run, source: ModelSource, name: str, *, missing: Collection[str], unused: Collection[str]
) -> None:
    """Refuse tensors that the files of a model or adapter lack or that are not used. Raises RecipeError."""
    where = run.recipe.where(("model", "name_or_path"))
    faults = []
    if missing:
        problem = f"{name}: {_count_tensors(missing)} missing in its files and would be drawn at random"
        fix = "Copy or download the files again, or use another model."
        faults.append(Fault(where, problem, fix, code="model.incomplete_weights"))
    if unused and _ACCEPTED not in run.options.get("allow", []):
        problem = f"{name}: {_count_tensors(unused)} in its files and not in the model that config.json describes"
        fix = f"Use files that fit the model. Or train without these tensors: run.allow: [{_ACCEPTED}]."
        faults.append(Fault(where, problem, fix, code="model.unused_weights"))
    if faults:
        raise RecipeError([_name_fields(run, source, fault) for fault in faults])


def _count_tensors(names: Collection[str]) -> str:
    """Return a number of tensors with the first names: 2 tensors (a, b) are."""
    shown = sorted(names)
    more = f" and {len(shown) - _MAX_NAMES} more" if len(shown) > _MAX_NAMES else ""
    number, verb = ("1 tensor", "is") if len(shown) == 1 else (f"{len(shown)} tensors", "are")
    return f"{number} ({', '.join(shown[:_MAX_NAMES])}{more}) {verb}"


def _explain_unreadable(name: str, where: str, error: Exception) -> Fault:
    """Return the fault of files that upstream cannot read."""
    problem = f"{name}: its weights cannot be read: {first_line(error)}"
    return Fault(
        where, problem, "Copy or download the files again, or use another model.", code="model.incomplete_weights"
    )


@contextlib.contextmanager
def quiet_upstream() -> Iterator[None]:
    """Silence the loggers of transformers and peft: what they report of missing weights becomes a fault."""
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "py.warnings")]
    levels = [logger.level for logger in loggers]
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bar:
            transformers.utils.logging.enable_progress_bar()
