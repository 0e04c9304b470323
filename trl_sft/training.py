"""The run, top to bottom: tokenizer, rows, settings, trainer, training, held-out loss, saving.

In: a `Run` of `schema.build`. Out: a `Result`, and a run folder. What cannot be honoured is refused
before the weights load.
"""

from __future__ import annotations

import contextlib
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

from trl_sft import (
    attention,
    callbacks,
    chat,
    data,
    dataset,
    ending,
    evaluate,
    launching,
    loss,
    machine,
    model,
    rehearsal,
    rundir,
    screens,
    tokens,
    trust,
)
from trl_sft.callbacks import Guard, Progress
from trl_sft.ending import Result
from trl_sft.errors import Fault, LaunchError
from trl_sft.recipe import Key
from trl_sft.run import Run, Setting
from trl_sft.watch import Watch


class Settled(NamedTuple):
    """What is asked of upstream's classes, and what of it we set."""

    quantized: BitsAndBytesConfig | None
    settings: dict[Key, Setting]
    args: SFTConfig


class Setup(NamedTuple):
    """Model, tokenizer and settings of a run, without weights and rows."""

    found: model.Found
    quantized: BitsAndBytesConfig | None
    chat: chat.Chat
    settings: dict[Key, Setting]
    args: SFTConfig


class Ready(NamedTuple):
    """All that a run needs before weights: checked."""

    found: model.Found
    quantized: BitsAndBytesConfig | None
    chat: chat.Chat
    settings: dict[Key, Setting]
    args: SFTConfig
    rows: data.Rows
    made: dataset.Made


def prepare(run: Run) -> Ready:
    """Do all of a run that needs no weights: machine, tokenizer, rows, tokens, settings. Raises UserError."""
    machine.check(run)
    setup = set_up(run)
    rows = load_rows(run, setup)
    about = machine.describe(setup.args, run.model.get("dtype", "float32"), setup.quantized)
    screens.found(run.notes, setup.found.shown, about, setup.chat.said, rows.said)
    made = dataset.make(run, setup.chat, rows, setup.args)
    screens.lines([*made.said, *launching.said(setup.settings)])
    rehearsal.rehearse(run, setup.found, setup.chat, setup.args, made)
    return Ready(*setup, rows, made)


def set_up(run: Run) -> Setup:
    """Find the model, load the tokenizer, settle what the recipe leaves open. Raises UserError."""
    trust.begin(run)
    quantized, settings, args = settle(run)
    machine.check_packages(run)
    machine.check_trackers(run.recipe.where(("train", "report_to")), args.report_to)
    found = model.find(run)
    model.check(run, found)
    return Setup(found, quantized, chat.load(run, *model.tokenizers(found)), settings, args)


def settle(run: Run, elsewhere: bool = False, processes: int = 1) -> Settled:
    """Make SFTConfig and what quantizes from the recipe. Raises RecipeError, MissingPackage.

    `elsewhere`: the run is for another machine, of so many `processes`; what this one lacks is no fault.
    """
    settings = {} if elsewhere else machine.settings(run.train, run.quantization or {})
    settings |= model.settings(run) | launching.settings(run, processes) | trust.settings(run)
    given = {str(key[-1]): setting.value for key, setting in settings.items() if key[0] == "train"}
    args = _config(run, given | (machine.ANYWHERE if elsewhere else {}))
    return Settled(None if elsewhere and not model.quantizes() else model.quantization(run, settings), settings, args)


def load_rows(run: Run, setup: Setup, head: int | None = None) -> data.Rows:
    """Load and format the rows (`head`: the first of each source), give `setup` the end token that they need."""
    rows = data.load(run, setup.chat.target, head)
    found = chat.settings(run, setup.chat, rows.form == tokens.CHAT) | evaluate.settings(run, bool(rows.eval))
    setup.settings.update(found)
    for key, setting in found.items():
        setattr(setup.args, str(key[-1]), setting.value)
    if setup.args.eos_token is not None:  # TRL sets it too, later
        setup.chat.tokenizer.eos_token = setup.args.eos_token
    if "loss_on" not in run.data:
        setup.settings["data", "loss_on"] = Setting(rows.loss_on, "the response is what is learned; text has none")
    setup.args.dataset_kwargs = {"skip_prepare_dataset": True}
    return rows


def run(run: Run, claim: rundir.Claim) -> Result:
    """Carry a run out in the folder that is its own. Raises UserError before training, RunStopped once it has begun."""
    ready = prepare(run)
    with rundir.held(run.output_dir) as ours:
        if not ours:
            found = f"{run.output_dir}: another process trains there now"
            raise LaunchError(Fault(run.recipe.where(("train", "output_dir")), found, "another train.output_dir"))
        return ending.guarded(run, lambda book: _carry_out(run, ready, claim, book))


def _carry_out(run: Run, ready: Ready, claim: rundir.Claim, book: ending.Book) -> Result:
    """Load, train, evaluate, save; `book` is begun when training begins."""
    trainer = book.trainer = _trainer(run, ready)
    progress, guard = _watchers(run, ready, claim, trainer, book)
    book.checkpoint = claim.checkpoint
    resume = str(claim.checkpoint) if claim.checkpoint else None
    with guard.listening(), contextlib.closing(progress):
        with contextlib.suppress(callbacks.AlreadyTrained):
            trainer.train(resume_from_checkpoint=resume)
        return ending.saved(run, ready.found, trainer, book, evaluate.prompts(run, ready.rows, ready.made))


def _config(run: Run, settings: dict[str, Any]) -> SFTConfig:
    """Return the live SFTConfig; what it refuses becomes a RecipeError."""
    try:
        return SFTConfig(
            **{"output_dir": str(run.output_dir), "model_init_kwargs": trust.keywords(run)} | run.train | settings
        )
    except (ValueError, TypeError) as error:
        raise ending.refused(run, error) from error


def _trainer(run: Run, ready: Ready) -> SFTTrainer:
    """Load the weights."""
    set_seed(ready.args.seed)  # for the adapter's first weights; TRL 1.16 does so itself, 1.8 does not
    loaded = model.arguments(run, ready.found, ready.quantized, ready.chat.new, ready.chat.rows)
    if not isinstance(loaded["model"], str):
        ready.args.model_init_kwargs = None  # they were used; TRL would warn that it ignores them
    rows = {"train_dataset": ready.made.train, "eval_dataset": ready.made.eval}
    trainer = SFTTrainer(args=ready.args, processing_class=ready.chat.tokenizer, **rows, **loaded)
    model.mend(trainer.model)
    loss.install(trainer.model, run.run.get("logits_gib", loss.LOGITS_GIB))
    if trainer.padding_free and "attn_implementation" not in run.model and ready.args.device.type in ("cpu", "mps"):
        attention.install(trainer.model)
    if ready.chat.stop and ready.rows.form == tokens.CHAT:
        model.stop_on(trainer.model, ready.chat.tokenizer.convert_tokens_to_ids(ready.chat.stop))
    trust.hide(trainer.args)
    return trainer


def _watchers(
    run: Run, ready: Ready, claim: rundir.Claim, trainer: SFTTrainer, book: ending.Book
) -> tuple[Progress, Guard]:
    """Put our progress in the place of upstream's, behind the comparison of what was asked with what runs."""
    watch = book.watch = Watch(run, ready.found, ready.quantized, trainer)

    def begin(args: SFTConfig, state: TrainerState, live: PreTrainedModel) -> list[tuple[str, str]]:
        """Begin the run folder, now that nothing is left to refuse; return the table."""
        book.begin(run, claim, ready.settings, ready.made)
        table = screens.before(args, state, live, None if ready.rows.streamed else len(trainer.train_dataset))
        told = evaluate.before(run, trainer, evaluate.prompts(run, ready.rows, ready.made))
        return table + watch.lines() + ([("answers", told)] if told else [])

    progress = Progress(run.output_dir, begin)
    guard = Guard(run.run.get("max_hours"), ending.again(run))
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    for ours in (watch, progress, guard):
        trainer.add_callback(ours)
    return progress, guard
