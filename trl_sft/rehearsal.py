"""The trainer of a run made once without weights: what upstream would refuse late is refused before they load.

In: all that a run needs before weights. Out: nothing, or the refusal. The model is made on torch's meta device,
which holds shapes and no numbers, so that attention, adapter, optimizer, schedule and data loader are upstream's own,
made as they will be. Deliberately absent: any list of what upstream refuses.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import tempfile
from collections.abc import Iterator

from datasets import Dataset, IterableDataset
from trl import SFTConfig, SFTTrainer

from trl_sft import asked, ending, live, model, sketch
from trl_sft.chat import Chat
from trl_sft.dataset import Made
from trl_sft.errors import Fault, RecipeError, UserError, first_line
from trl_sft.run import Run

_STANDING_IN = Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[0, 0]]})


def rehearse(run: Run, found: model.Found, chat: Chat, args: SFTConfig, made: Made | None) -> str:
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
                **sketch.arguments(run, found, chat.new, chat.rows),
                args=_without_effects(args, folder),
                processing_class=chat.tokenizer,
                train_dataset=train,
                eval_dataset=held,
            )
            _check_names(run, trainer)
            trainer.create_optimizer_and_scheduler(max(args.max_steps, 1))
            next(_batches(trainer))
    except (ImportError, TypeError, ValueError) as error:
        raise ending.refused(run, error) from error
    except UserError:
        raise
    except Exception as error:  # it may be the missing numbers: the run will tell
        return first_line(error)
    return ""


def _check_names(run: Run, trainer: SFTTrainer) -> None:
    """Refuse names in `lora:` that no module has, which peft passes over beside others. Raises RecipeError."""
    faults = []
    known = sorted({path.rpartition(".")[2] for path, _ in trainer.model.named_modules()} - {""})
    for name in asked.nameless(run, live.adapted(trainer.model)):
        given = {word: (run.lora or {}).get(word) for word in ("target_modules", "modules_to_save")}
        key = next(word for word, names in given.items() if isinstance(names, list) and name in names)
        near = difflib.get_close_matches(name, known, 1, 0.5)
        write = near[0] if near else "the name of a module that the model has"
        faults.append(Fault(run.recipe.where(("lora", key)), f"{name}: no module of the model is called so", write))
    if faults:
        raise RecipeError(faults)


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
