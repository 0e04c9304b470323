"""The run, top to bottom: tokenizer, rows, settings, trainer, training, held-out loss, saving.

In: a `Run` of `schema.build`. Out: a `Result`, and a run folder. What cannot be honoured is refused
before the weights load.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerState,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from trl_sft import run_folder
from trl_sft.data import rows as data_rows
from trl_sft.data.rows import CHAT
from trl_sft.errors import Fault, LaunchError
from trl_sft.evaluation import before_after
from trl_sft.model import cpu_loss, device, load, packed_attention, patches, trust
from trl_sft.recipe import processes as recipe_processes
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.yaml_reader import Key
from trl_sft.tokenization import build, encode, tokenizer
from trl_sft.training import callbacks, dry_run, finish, summary
from trl_sft.training.callbacks import Guard, Progress
from trl_sft.training.finish import Result
from trl_sft.training.verify import Watch


class Settled(NamedTuple):
    """What is asked of upstream's classes, and what of it we set."""

    quantized: BitsAndBytesConfig | None
    settings: dict[Key, Setting]
    args: SFTConfig


class Setup(NamedTuple):
    """Model, tokenizer and settings of a run, without weights and rows."""

    found: load.ModelSource
    quantized: BitsAndBytesConfig | None
    chat: tokenizer.ChatTokenizer
    settings: dict[Key, Setting]
    args: SFTConfig


class Ready(NamedTuple):
    """All that a run needs before weights: checked."""

    found: load.ModelSource
    quantized: BitsAndBytesConfig | None
    chat: tokenizer.ChatTokenizer
    settings: dict[Key, Setting]
    args: SFTConfig
    rows: data_rows.RunRows
    made: build.TokenizedRows


def prepare(run: Run) -> Ready:
    """Do all of a run that needs no weights: machine, tokenizer, rows, tokens, settings. Raises UserError."""
    device.check_machine(run)
    setup = set_up(run)
    rows = load_rows(run, setup)
    about = device.describe_precision(setup.args, run.model.get("dtype", "float32"), setup.quantized)
    summary.found(run.notes, setup.found.title, about, setup.chat.said, rows.notes)
    made = build.make(run, setup.chat, rows, setup.args)
    summary.lines([*made.said, *recipe_processes.describe_settings(setup.settings)])
    dry_run.rehearse(run, setup.found, setup.chat, setup.args, made)
    return Ready(*setup, rows, made)


def set_up(run: Run) -> Setup:
    """Find the model, load the tokenizer, settle what the recipe leaves open. Raises UserError."""
    trust.announce(run)
    quantized, settings, args = settle(run)
    device.check_packages(run)
    device.check_trackers(run.recipe.where(("train", "report_to")), args.report_to)
    found = load.find_model(run)
    load.check_model(run, found)
    return Setup(found, quantized, tokenizer.load(run, *load.list_tokenizer_sources(found)), settings, args)


def settle(run: Run, elsewhere: bool = False, processes: int = 1) -> Settled:
    """Make SFTConfig and what quantizes from the recipe. Raises RecipeError, MissingPackage.

    `elsewhere`: the run is for another machine, of so many `processes`; what this one lacks is no fault.
    """
    settings = {} if elsewhere else device.choose_machine_settings(run.train, run.quantization or {})
    settings |= load.choose_adapter_settings(run) | trust.choose_weight_settings(run)
    settings |= recipe_processes.compute_settings(run, processes)
    given = {str(key[-1]): setting.value for key, setting in settings.items() if key[0] == "train"}
    args = _config(run, given | (device.ANY_MACHINE if elsewhere else {}))
    quantized = None
    if load.has_bitsandbytes() or not elsewhere:
        quantized = load.make_quantization_config(run, settings)
    return Settled(quantized, settings, args)


def load_rows(run: Run, setup: Setup, head: int | None = None) -> data_rows.RunRows:
    """Load and format the rows (`head`: the first of each source), give `setup` the end token that they need."""
    rows = data_rows.load(run, setup.chat.target, head)
    found = tokenizer.settings(run, setup.chat, rows.row_type == CHAT) | before_after.settings(run, bool(rows.eval))
    setup.settings.update(found)
    for key, setting in found.items():
        setattr(setup.args, str(key[-1]), setting.value)
    if setup.args.eos_token is not None:  # TRL sets it too, later
        setup.chat.tokenizer.eos_token = setup.args.eos_token
    if "loss_on" not in run.data:
        setup.settings["data", "loss_on"] = Setting(rows.loss_on, "the response is what is learned; text has none")
    setup.args.dataset_kwargs = {"skip_prepare_dataset": True}
    return rows


def run(run: Run, claim: run_folder.Claim) -> Result:
    """Carry a run out in the folder that is its own. Raises UserError before training, RunStopped once it has begun."""
    ready = prepare(run)
    with run_folder.lock(run.output_dir) as ours:
        if not ours:
            found = f"{run.output_dir}: another process trains there now"
            raise LaunchError(Fault(run.recipe.where(("train", "output_dir")), found, "another train.output_dir"))
        return finish.guarded(run, lambda book: _carry_out(run, ready, claim, book))


def _carry_out(run: Run, ready: Ready, claim: run_folder.Claim, book: finish.Book) -> Result:
    """Load, train, evaluate, save; `book` is begun when training begins."""
    trainer = book.trainer = _trainer(run, ready)
    progress, guard = _watchers(run, ready, claim, trainer, book)
    book.checkpoint = claim.checkpoint
    resume = str(claim.checkpoint) if claim.checkpoint else None
    with guard.listening(), contextlib.closing(progress):
        with contextlib.suppress(callbacks.AlreadyTrained):
            trainer.train(resume_from_checkpoint=resume)
        return finish.saved(run, ready.found, trainer, book, _prompts(run, ready))


def _config(run: Run, settings: dict[str, Any]) -> SFTConfig:
    """Return the live SFTConfig; what it refuses becomes a RecipeError."""
    try:
        defaults = {"output_dir": str(run.output_dir), "model_init_kwargs": trust.build_load_keywords(run)}
        return SFTConfig(**defaults | run.train | settings)
    except (ValueError, TypeError) as error:
        raise finish.refused(run, error) from error


def _trainer(run: Run, ready: Ready) -> SFTTrainer:
    """Load the weights."""
    set_seed(ready.args.seed)  # for the adapter's first weights; TRL 1.16 does so itself, 1.8 does not
    loaded = load.build_trainer_arguments(
        run,
        ready.found,
        quantization=ready.quantized,
        new_tokens=ready.chat.new,
        vocab_size=ready.chat.rows,
    )
    if not isinstance(loaded["model"], str):
        ready.args.model_init_kwargs = None  # they were used; TRL would warn that it ignores them
    rows = {"train_dataset": ready.made.train, "eval_dataset": ready.made.eval}
    trainer = SFTTrainer(args=ready.args, processing_class=ready.chat.tokenizer, **rows, **loaded)
    patches.repair(trainer.model)
    cpu_loss.install(trainer.model, run.options.get("logits_gib", cpu_loss.LOGITS_GIB))
    if trainer.padding_free and "attn_implementation" not in run.model and ready.args.device.type in ("cpu", "mps"):
        packed_attention.install(trainer.model)
    if ready.chat.stop and ready.rows.row_type == CHAT:
        load.add_stop_token(trainer.model, ready.chat.tokenizer.convert_tokens_to_ids(ready.chat.stop))
    trust.hide_tokens(trainer.args)
    return trainer


def _prompts(run: Run, ready: Ready) -> before_after.Asked:
    """Return the held-out prompts that base and tuned answer."""
    return before_after.prompts(
        run, ready.rows, functools.partial(encode.prompt, ready.made.encoder), ready.made.ledger
    )


def _watchers(
    run: Run, ready: Ready, claim: run_folder.Claim, trainer: SFTTrainer, book: finish.Book
) -> tuple[Progress, Guard]:
    """Put our progress in the place of upstream's, behind the comparison of what was asked with what runs."""
    watch = book.watch = Watch(run, ready.found, ready.quantized, trainer)

    def begin(args: SFTConfig, state: TrainerState, live: PreTrainedModel) -> list[tuple[str, str]]:
        """Begin the run folder, now that nothing is left to refuse; return the table."""
        book.begin(run, claim, ready.settings, ready.made)
        table = summary.before(args, state, live, None if ready.rows.streaming else len(trainer.train_dataset))
        told = before_after.before(run, trainer, _prompts(run, ready))
        return table + watch.lines() + ([("answers", told)] if told else [])

    progress = Progress(run.output_dir, begin)
    guard = Guard(run.options.get("max_hours"), finish.again(run))
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    for ours in (watch, progress, guard):
        trainer.add_callback(ours)
    return progress, guard
