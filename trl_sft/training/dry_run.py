"""Builds the trainer of a run without weights, to find what upstream would refuse only after the weights load.

In: all that a run needs before its weights. Out: nothing, or upstream's refusal as a fault. The model is on torch's
meta device, which has shapes and no values. Upstream builds attention, adapter, optimizer, schedule and data loader as
in the run. Deliberately absent: a list of what upstream refuses.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence

from datasets import Dataset, IterableDataset
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from trl_sft.errors import Fault, RecipeError, UserError, first_line
from trl_sft.evaluation import generation_trial
from trl_sft.model import load, meta_model
from trl_sft.recipe.checked import Run
from trl_sft.recipe.yaml_reader import Key
from trl_sft.suggestions import LOOSE, nearest_name
from trl_sft.tokenization.build import TokenizedRows
from trl_sft.tokenization.tokenizer import ChatTokenizer
from trl_sft.training import refusals

_ONE_ROW = Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[0, 0]]})


def check(
    run: Run, model: load.ModelSource, chat: ChatTokenizer, *, args: SFTConfig, datasets: TokenizedRows | None
) -> str:
    """Build trainer, optimizer, schedule and first batch without weights.

    Args:
        run: the checked recipe.
        model: where the model is, and its configuration.
        chat: the tokenizer.
        args: the live settings.
        datasets: the tokenized rows; None = one row stands for them.

    Returns:
        The reason why the trainer could not be built without weights; "" if it was built. This is not a refusal.

    Raises:
        UserError: upstream refuses a setting.
    """
    batch_size = args.per_device_eval_batch_size
    generation_trial.check_settings(run, chat.tokenizer, batch_size=batch_size, num_embeddings=chat.num_embeddings)
    if model.adapter:
        return "an adapter is built with its weights"
    train, held_out = (datasets.train, datasets.eval) if datasets else (_ONE_ROW, _ONE_ROW)
    if isinstance(train, IterableDataset):  # its rows are counted as they are read
        train = _ONE_ROW
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = SFTTrainer(
                **meta_model.build_trainer_arguments(
                    run, model, new_tokens=chat.new_tokens, vocab_size=chat.num_embeddings
                ),
                args=_copy_without_effects(args, folder),
                processing_class=chat.tokenizer,
                train_dataset=train,
                eval_dataset=held_out,
            )
            _check_lora_names(run, trainer.model)
            trainer.create_optimizer()
            _create_schedule(run, trainer)
            next(iter(trainer.get_train_dataloader()))
    except (ImportError, TypeError, ValueError) as error:
        raise refusals.as_fault(run, error) from error
    except UserError:
        raise
    except Exception as error:  # missing values of weights may be the reason; the run itself will show
        return first_line(error)
    return ""


def list_adapted_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules that the adapter changes."""
    wrappers = ("ModulesToSaveWrapper", "TrainableTokensWrapper")
    return [
        name
        for name, module in model.named_modules()
        if (hasattr(module, "lora_A") and hasattr(module, "active_adapters")) or type(module).__name__ in wrappers
    ]


def list_unknown_lora_names(run: Run, modules: Sequence[str]) -> list[str]:
    """Return the names in `lora:` that no module of the adapter has: peft skips them silently."""
    names: list[str] = []
    for key in ("target_modules", "modules_to_save"):
        value = (run.lora or {}).get(key)
        names += value if isinstance(value, list) else []
    return [name for name in names if not any(f".{module}".endswith(f".{name}") for module in modules)]


def _create_schedule(run: Run, trainer: SFTTrainer) -> None:
    """Create the schedule. It needs no weights, so whatever it raises is a refusal. Raises RecipeError."""
    try:
        trainer.create_scheduler(max(trainer.args.max_steps, 1))
    except (ImportError, TypeError, ValueError):
        raise
    except Exception as error:
        key = ("train", "lr_scheduler_kwargs" if "lr_scheduler_kwargs" in run.train else "lr_scheduler_type")
        # str() of a KeyError would add quotation marks
        problem = f"{type(error).__name__}: {first_line(Exception(*error.args))}"
        fix = "Write keywords that this schedule takes."
        raise RecipeError(Fault(run.recipe.where(key), problem, fix, code="recipe.refused_by_library")) from error


def _check_lora_names(run: Run, model: PreTrainedModel) -> None:
    """Refuse names and patterns in `lora:` that fit no module. Raises RecipeError."""
    faults = []
    modules = [f".{path}" for path, _ in model.named_modules()]
    known = sorted({path.rpartition(".")[2] for path in modules} - {""})
    adapted = list_adapted_modules(model)
    lora = run.lora or {}
    for name in list_unknown_lora_names(run, adapted):
        keys = [key for key in ("target_modules", "modules_to_save") if isinstance(lora.get(key), list)]
        key = next(key for key in keys if name in lora[key])
        nearest = nearest_name(name, known, cutoff=LOOSE)
        fix = f"Did you mean `{nearest}`?" if nearest else "Write the name of a module that the model has."
        faults.append(
            Fault(
                run.recipe.where(("lora", key)),
                f"{name}: the model has no module of this name",
                fix,
                code="model.unknown_module",
            )
        )
    for place, name, fits in _find_patterns(run, adapted, modules):
        if not fits:
            fix = "Write the name of a module that has an adapter, or remove it."
            faults.append(
                Fault(
                    run.recipe.where(place),
                    f"{name} changes nothing: it fits no module",
                    fix,
                    code="model.unknown_module",
                )
            )
    if faults:
        raise RecipeError(faults)


def _find_patterns(run: Run, adapted: list[str], modules: list[str]) -> Iterator[tuple[Key, str, bool]]:
    """Yield each pattern in `lora:` that selects modules: its key, its text, and whether it fits a module."""
    lora = run.lora or {}
    for key in ("rank_pattern", "alpha_pattern"):
        for name in lora.get(key) or {}:
            yield ("lora", key, name), name, any(get_pattern_key([name], path) == name for path in adapted)
    excluded = lora.get("exclude_modules")
    for index, name in enumerate(excluded if isinstance(excluded, list) else []):
        yield ("lora", "exclude_modules", index), name, any(path.endswith(f".{name}") for path in modules)
    layers = lora.get("layers_to_transform")
    if isinstance(layers, int):
        layers = [layers]
    for number in layers or []:
        yield ("lora", "layers_to_transform"), f"layer {number}", any(f".{number}." in path for path in adapted)


def _copy_without_effects(args: SFTConfig, folder: str) -> SFTConfig:
    """Return a deep copy of the settings with which the Trainer writes no file, sends nothing and starts no process."""
    dry = copy.copy(args)
    for field in dataclasses.fields(args):
        setattr(dry, field.name, copy.deepcopy(getattr(args, field.name)))
    dry.output_dir, dry.model_init_kwargs, dry.report_to, dry.push_to_hub = folder, None, [], False
    # the device mesh of the parallelism needs the processes; `recipe.parallelism` has upstream's refusals
    dry.full_determinism, dry.log_level, dry.parallelism_config = False, "passive", None
    dry.dataloader_num_workers = min(args.dataloader_num_workers, 0)  # a negative number is still refused
    dry.dataloader_persistent_workers, dry.dataloader_prefetch_factor = False, None
    return dry
