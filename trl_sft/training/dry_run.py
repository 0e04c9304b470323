"""The trainer of a run made once without weights: what upstream would refuse late is refused before they load.

In: all that a run needs before weights. Out: nothing, or the refusal. The model is made on torch's meta device,
which holds shapes and no numbers, so that attention, adapter, optimizer, schedule and data loader are upstream's own,
made as they will be. Deliberately absent: any list of what upstream refuses.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator

from datasets import Dataset, IterableDataset
from peft.utils.other import get_pattern_key
from trl import SFTConfig, SFTTrainer

from trl_sft.errors import Fault, RecipeError, UserError, first_line
from trl_sft.model import load, meta_model
from trl_sft.recipe.checked import Run
from trl_sft.recipe.yaml_reader import Key
from trl_sft.suggestions import LOOSE, nearest_name
from trl_sft.tokenization.build import TokenizedRows
from trl_sft.tokenization.tokenizer import ChatTokenizer
from trl_sft.training import live, refusals

_STANDING_IN = Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[0, 0]]})


def check(run: Run, found: load.ModelSource, chat: ChatTokenizer, args: SFTConfig, made: TokenizedRows | None) -> str:
    """Make the trainer, its optimizer and schedule and its first batch. Raises UserError.

    `made` None: of a row that stands for those that are not there. Returns why that was not possible without
    weights, "" where it was: nothing is refused for that.
    """
    if found.adapter:
        return "an adapter is made with its weights"
    train, held = (made.train, made.eval) if made else (_STANDING_IN, _STANDING_IN)
    if isinstance(train, IterableDataset):  # its rows are counted as they are read
        train = _STANDING_IN
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = SFTTrainer(
                **meta_model.build_trainer_arguments(run, found, new_tokens=chat.new, vocab_size=chat.rows),
                args=_without_effects(args, folder),
                processing_class=chat.tokenizer,
                train_dataset=train,
                eval_dataset=held,
            )
            _check_names(run, trainer)
            trainer.create_optimizer()
            _schedule(run, trainer)
            next(_batches(trainer))
    except (ImportError, TypeError, ValueError) as error:
        raise refusals.as_fault(run, error) from error
    except UserError:
        raise
    except Exception as error:  # it may be the missing numbers: the run will tell
        return first_line(error)
    return ""


def _schedule(run: Run, trainer: SFTTrainer) -> None:
    """Make the schedule: it needs no numbers of the model's, so whatever it raises is a refusal. Raises RecipeError."""
    try:
        trainer.create_scheduler(max(trainer.args.max_steps, 1))
    except (ImportError, TypeError, ValueError):
        raise
    except Exception as error:
        key = ("train", "lr_scheduler_kwargs" if "lr_scheduler_kwargs" in run.train else "lr_scheduler_type")
        found = f"{type(error).__name__}: {first_line(Exception(*error.args))}"  # a KeyError quotes its text
        raise RecipeError(Fault(run.recipe.where(key), found, "keywords that this schedule takes")) from error


def _check_names(run: Run, trainer: SFTTrainer) -> None:
    """Refuse names in `lora:` that no module has, which peft passes over beside others. Raises RecipeError."""
    faults = []
    modules = [f".{path}" for path, _ in trainer.model.named_modules()]
    known = sorted({path.rpartition(".")[2] for path in modules} - {""})
    adapted = live.adapted_modules(trainer.model)
    for name in live.lora_names_without_module(run, adapted):
        given = {word: (run.lora or {}).get(word) for word in ("target_modules", "modules_to_save")}
        key = next(word for word, names in given.items() if isinstance(names, list) and name in names)
        write = nearest_name(name, known, cutoff=LOOSE) or "the name of a module that the model has"
        faults.append(Fault(run.recipe.where(("lora", key)), f"{name}: no module of the model is called so", write))
    for place, name, fits in _patterns(run, adapted, modules):
        if not fits:
            write = "the name of a module that has an adapter, or leave it out"
            faults.append(Fault(run.recipe.where(place), f"{name} changes nothing: it fits no module", write))
    if faults:
        raise RecipeError(faults)


def _patterns(run: Run, adapted: list[str], modules: list[str]) -> Iterator[tuple[Key, str, bool]]:
    """Yield what in `lora:` picks modules by a pattern: its place, as written, and whether it fits one."""
    lora = run.lora or {}
    for word in ("rank_pattern", "alpha_pattern"):
        for name in lora.get(word) or {}:
            yield ("lora", word, name), name, any(get_pattern_key([name], path) == name for path in adapted)
    excluded = lora.get("exclude_modules")
    for n, name in enumerate(excluded if isinstance(excluded, list) else []):
        yield ("lora", "exclude_modules", n), name, any(path.endswith(f".{name}") for path in modules)
    layers = lora.get("layers_to_transform")
    for number in layers if isinstance(layers, list) else [] if layers is None else [layers]:
        yield ("lora", "layers_to_transform"), f"layer {number}", any(f".{number}." in path for path in adapted)


def _batches(trainer: SFTTrainer) -> Iterator[object]:
    return iter(trainer.get_train_dataloader())


def _without_effects(args: SFTConfig, folder: str) -> SFTConfig:
    """Return the settings less what writes, sends or starts something; the Trainer may change what is in them."""
    dry = copy.copy(args)
    for field in dataclasses.fields(args):
        setattr(dry, field.name, copy.deepcopy(getattr(args, field.name)))
    dry.output_dir, dry.model_init_kwargs, dry.report_to, dry.push_to_hub = folder, None, [], False
    dry.full_determinism, dry.log_level = False, "passive"
    dry.dataloader_num_workers = min(args.dataloader_num_workers, 0)  # one below 0 is refused as ever
    dry.dataloader_persistent_workers, dry.dataloader_prefetch_factor = False, None
    return dry
