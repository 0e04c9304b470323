"""Every step of a run before training, once, in order; each is a function with plain arguments.

    settle_settings -> find_model -> load_tokenizer -> load_rows -> tokenize -> dry_run.check -> build_trainer

`prepare` calls all but the last one after another. `training.run`, `check`, `preview`, `prepare` and the probe call
these and nothing else. What cannot be honoured raises a `UserError` before the weights load.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import BitsAndBytesConfig, PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from transformers.integrations import deepspeed
from trl import SFTConfig, SFTTrainer

from trl_sft import console, ranks
from trl_sft.data import rows as data_rows
from trl_sft.data.formats import CHAT
from trl_sft.data.rows import RunRows
from trl_sft.errors import LaunchError, MissingPackage, RecipeError, UserError
from trl_sft.evaluation import before_after, own_prompts, planned_checks
from trl_sft.evaluation.own_prompts import OwnPrompt
from trl_sft.model import (
    cpu_loss,
    device,
    load,
    needed_packages,
    packed_attention,
    parallelism,
    patches,
    trust,
    weights,
)
from trl_sft.model.load import ModelSource
from trl_sft.publishing import repository
from trl_sft.recipe import early_stopping, engines, folder_decision
from trl_sft.recipe import processes as recipe_processes
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.yaml_reader import Key
from trl_sft.tokenization import build, encode, template_date, tokenizer
from trl_sft.tokenization.build import TokenizedRows
from trl_sft.tokenization.tokenizer import ChatTokenizer
from trl_sft.training import best_metric, dry_run, hub_push, refusals, repeated_rows, row_lengths
from trl_sft.training.best_metric import AnswerMetric
from trl_sft.training.hub_push import PushPlan


@dataclass(frozen=True)
class RunSettings:
    """The live settings of a run."""

    args: SFTConfig
    quantization: BitsAndBytesConfig | None
    chosen: dict[Key, Setting]  # values that the recipe leaves open and this package sets, each with the reason


@dataclass(frozen=True)
class TrainingInputs:
    """Everything that SFTTrainer needs, except the weights."""

    settings: RunSettings
    model: ModelSource
    chat: ChatTokenizer
    rows: RunRows
    datasets: TokenizedRows
    prompts: Sequence[OwnPrompt] = ()  # of `evaluate.prompts`
    push: PushPlan | None = None  # to the hub

    @property
    def args(self) -> SFTConfig:
        """The live settings of SFTTrainer."""
        return self.settings.args

    @property
    def quantization(self) -> BitsAndBytesConfig | None:
        """How bitsandbytes quantizes the weights; None = it does not."""
        return self.settings.quantization


def prepare(run: Run, *, any_machine: bool = False) -> TrainingInputs:
    """Run all stages that need no weights, and print their lines.

    Args:
        run: the checked recipe.
        any_machine: what this machine lacks for the run is a line, not a fault: nothing is trained here.

    Raises:
        UserError: a fault of the recipe, the rows, the tokenizer or the machine.

    """
    for note in run.notes:
        console.say(note)
    try:
        device.check_machine(run)
    except LaunchError as error:
        if not any_machine:
            raise
        console.print_lines(_describe_missing_hardware(error))
    settings, model, chat, rows = read_rows(run, any_machine=any_machine, show=console.print_lines)
    push = plan_push(run, settings, model) if run.train.get("push_to_hub") and not any_machine else None
    datasets = tokenize(run, chat, rows, settings=settings)
    if ranks.is_first_on_host():
        ranks.wait()
    console.print_lines([*datasets.notes, *describe_settings(run, settings)])
    console.print_lines(check_row_lengths(run, model, datasets, settings=settings))
    prompts = load_prompts(run, model, rows, datasets=datasets)
    console.print_lines(describe_prompts(settings, prompts))
    if ranks.count() == 1:  # `launch` has tried it before it started the processes
        dry_run.check(run, model, chat, args=settings.args, datasets=datasets)
    return TrainingInputs(settings, model, chat, rows, datasets, prompts, push)


def read_rows(
    run: Run,
    *,
    head: int | None = None,
    any_machine: bool = False,
    show: Callable[[list[tuple[str, str]]], None] | None = None,
) -> tuple[RunSettings, ModelSource, ChatTokenizer, RunRows]:
    """Run the stages up to the formatted rows.

    Args:
        run: the checked recipe.
        head: only so many rows of each source, from its beginning; None = all.
        any_machine: what this machine lacks for the run is a line, not a fault: nothing is trained here.
        show: prints the lines of each stage, name and value; None = nothing is printed.

    Raises:
        UserError: a fault of the recipe, the rows or the tokenizer.

    """
    show = show or (lambda _: None)
    trust.announce(run)
    settings, lines = _settle_for_rows(run, any_machine=any_machine)
    show(lines)
    if not ranks.is_first_on_host():  # it prepares the rows, and the others read them from the cache
        ranks.wait()
    model = find_model(run)
    check_model(run, model)
    show([("model", model.title)])
    chat = load_tokenizer(run, model)
    show([("tokens", line) for line in chat.notes])
    rows = load_rows(run, chat, settings, head=head)
    show([("rows", line) for line in rows.notes])
    return settings, model, chat, rows


def _settle_for_rows(run: Run, *, any_machine: bool) -> tuple[RunSettings, list[tuple[str, str]]]:
    """Return the settings, and the lines on the machine: device and precision, or what it lacks for the run.

    Raises UserError; with `any_machine` only if another machine would not change that.
    """
    try:
        settings = settle_settings(run)
        check_packages(run, settings)
        return settings, [("machine", describe_machine(run, settings))]
    except (RecipeError, LaunchError, MissingPackage) as error:
        if not any_machine:
            raise
        try:
            settings = settle_settings(run, elsewhere=True)
        except UserError:
            raise error from None
        return settings, _describe_missing_hardware(error)


def _describe_missing_hardware(error: UserError) -> list[tuple[str, str]]:
    """Return the lines that say what a machine lacks for the run."""
    heading = "this machine cannot train the run, and only reads its rows"
    return [("note", f"{heading}: {fault.where}: {fault.problem.rstrip('.')}") for fault in error.faults]


def settle_settings(run: Run, *, elsewhere: bool = False, processes: int | None = None) -> RunSettings:
    """Make SFTConfig and the quantization from the recipe.

    Args:
        run: the checked recipe.
        elsewhere: the run is for another machine, so hardware that is missing here is not a fault.
        processes: how many processes train; None = those that were started.

    Raises:
        RecipeError: upstream refuses a value.
        MissingPackage: packages that keys of the recipe need.

    """
    if not elsewhere:
        needed_packages.check(run)
    chosen = {} if elsewhere else device.choose_machine_settings(run.train, run.quantization or {})
    if "global_batch_size" in run.options:
        chosen |= recipe_processes.compute_settings(run, processes or ranks.count())
    chosen |= load.choose_adapter_settings(run) | trust.choose_weight_settings(run) | run.implied
    keywords = {"output_dir": str(run.output_dir), "model_init_kwargs": trust.build_load_keywords(run)} | run.train
    keywords |= {str(key[-1]): setting.value for key, setting in chosen.items() if key[0] == "train"}
    keywords |= device.ANY_MACHINE if elsewhere else {}
    if run.launch and ranks.count() > 1:
        keywords |= engines.build_arguments(run)
    if "parallelism_config" in run.train or "distributed_config" in run.model:
        keywords |= parallelism.build_arguments(run, processes if elsewhere else processes or ranks.count())
    try:
        args = SFTConfig(**keywords)
    except (ValueError, TypeError) as error:
        raise refusals.as_fault(run, error) from error
    if args.deepspeed:  # else transformers would shard the models without weights that the stages build
        deepspeed.unset_hf_deepspeed_config()
    can_quantize = not elsewhere or needed_packages.is_installed("bitsandbytes")
    return RunSettings(args, load.make_quantization_config(run, chosen) if can_quantize else None, chosen)


def describe_settings(run: Run, settings: RunSettings) -> list[tuple[str, str]]:
    """Return lines, name and value, on the settings that follow from keys of `run:`."""
    lines: list[tuple[str, str]] = []
    if "global_batch_size" in run.options:
        lines += recipe_processes.describe_settings(settings.chosen)
    if "early_stopping" in run.options:
        lines += early_stopping.describe_settings(settings.chosen)
    return lines


def check_packages(run: Run, settings: RunSettings) -> None:
    """Refuse settings whose packages are not installed, and a push without a token. Raises UserError."""
    needed_packages.check(run, settings.args.report_to)
    if {"label_smoothing_factor", "optim"} & run.train.keys():
        from trl_sft.training import version_limits  # noqa: PLC0415 (for few runs)

        version_limits.check(run, settings.args)
    if run.train.get("push_to_hub"):
        repository.check_token(run.recipe.where(("train", "push_to_hub")), run.train.get("hub_token"))


def describe_machine(run: Run, settings: RunSettings) -> str:
    """Return device, threads and precision as the screen shows them."""
    return device.describe_precision(settings.args, run.model.get("dtype", "float32"), settings.quantization)


def plan_push(run: Run, settings: RunSettings, model: ModelSource) -> PushPlan:
    """Ask the hub where a run pushes, print what, and turn upstream's own push off. Raises LaunchError."""
    push = hub_push.plan(run, settings.args)
    settings.args.push_to_hub = False
    console.print_lines(hub_push.describe(run, push, model.name))
    return push


def find_model(run: Run) -> ModelSource:
    """Return the model's configuration and where its weights are; no weight is read. Raises UserError."""
    return load.find_model(run)


def check_model(run: Run, model: ModelSource) -> None:
    """Refuse settings and weight files that do not fit the model. Raises RecipeError."""
    load.check_model(run, model)
    if {"parallelism_config", "distributed_config"} & {*run.train, *run.model}:
        parallelism.check_model(run, model.config)
    if Path(model.name).is_dir():  # those of the hub are compared once they are downloaded, before training
        weights.check_weights(run, model)


def load_tokenizer(run: Run, model: ModelSource) -> ChatTokenizer:
    """Return the tokenizer with its chat template set up and checked. Raises TemplateError.

    If the template writes a date, it writes that of the run's first day from now on, in this process.
    """
    template_date.pin(None)
    chat = tokenizer.load(run, *load.list_tokenizer_sources(model))
    if not template_date.writes_date(chat.tokenizer, run.chat_template_kwargs):
        return chat
    earlier = folder_decision.find_template_date(run)
    day = earlier or datetime.date.today()
    template_date.pin(day)
    note = template_date.describe(chat.tokenizer, day, is_earlier=earlier is not None)
    return chat._replace(template_date=day, notes=(*chat.notes, note))


def load_rows(run: Run, chat: ChatTokenizer, settings: RunSettings, *, head: int | None = None) -> RunRows:
    """Return the formatted rows, and add the settings that follow from them to `settings` and to the tokenizer.

    Args:
        run: the checked recipe.
        chat: the tokenizer; it takes the end token that the rows need.
        settings: takes the end token, the loss and the first evaluation that follow from the rows.
        head: only so many rows of each source, from its beginning; None = all.

    Raises:
        DataError: a file or a row that cannot be read or formatted.
        RecipeError: a key that does not fit the rows.

    """
    rows = data_rows.load(run, chat.features, head)
    chosen = tokenizer.choose_settings(run, chat, rows.row_type == CHAT) | before_after.choose_settings(
        run, has_eval_rows=bool(rows.eval)
    )
    for key, setting in chosen.items():
        setattr(settings.args, str(key[-1]), setting.value)
    settings.chosen.update(chosen)
    if "loss_on" not in run.data:
        reason = "the model learns responses; rows of format text have no response, so all tokens carry loss"
        settings.chosen["data", "loss_on"] = Setting(rows.loss_on, reason)
    if settings.args.eos_token is not None:  # TRL sets it too, later
        chat.tokenizer.eos_token = settings.args.eos_token
    settings.args.dataset_kwargs = {"skip_prepare_dataset": True}
    return rows


def tokenize(
    run: Run, chat: ChatTokenizer, rows: RunRows, *, settings: RunSettings, thorough: bool = False
) -> TokenizedRows:
    """Return the datasets that SFTTrainer gets, with their ledger. Raises DataError, RecipeError, TemplateError.

    Args:
        run: the checked recipe.
        chat: the tokenizer.
        rows: the formatted rows.
        settings: max_length, packing and the batch size.
        thorough: compare every row with the template, not the first 1,000 and 1% of the rest.

    """
    find_answer_metric(run, rows, args=settings.args)
    return build.tokenize(run, chat, rows, args=settings.args, check_all=thorough)


def find_answer_metric(run: Run, rows: RunRows, *, args: SFTConfig) -> AnswerMetric | None:
    """Return the mean score of answers that decides which checkpoint is the best; None = a loss does, or nothing.

    Args:
        run: the checked recipe.
        rows: the formatted rows.
        args: the live settings.

    Raises:
        UserError: no evaluation logs `train.metric_for_best_model`, or its check cannot be used.

    """
    if args.metric_for_best_model is None:
        return None
    return best_metric.find(run, rows, args=args)


def check_row_lengths(
    run: Run, model: ModelSource, datasets: TokenizedRows, *, settings: RunSettings
) -> list[tuple[str, str]]:
    """Return lines on rows that are longer than the model's positions. Raises DataError where it has no more."""
    return list(row_lengths.check(run, model, datasets, args=settings.args))


def load_prompts(run: Run, model: ModelSource, rows: RunRows, *, datasets: TokenizedRows) -> list[OwnPrompt]:
    """Return the prompts of `evaluate.prompts` with their tokens, and check `evaluate.checks`. Raises UserError."""
    if "checks" in (run.evaluate or {}):
        planned_checks.check(run, rows)
    if "prompts" not in (run.evaluate or {}):
        return []
    encode_prompt = functools.partial(encode.encode_prompt, datasets.encoder)
    return own_prompts.load(run, rows, encode=encode_prompt, config=model.config)


def describe_prompts(settings: RunSettings, prompts: Sequence[OwnPrompt]) -> list[tuple[str, str]]:
    """Return a line, name and value, on when the prompts of `evaluate.prompts` are answered; empty without prompts."""
    if not prompts:
        return []
    when = "at each checkpoint" if settings.args.eval_strategy == "no" else "at each evaluation"
    number = "1 prompt" if len(prompts) == 1 else f"{len(prompts):,} prompts"
    return [("prompts", f"{number} of evaluate.prompts, answered before training, {when}, and after training")]


def read_first_rows(run: Run, number: int) -> tuple[RunSettings, ChatTokenizer, RunRows]:
    """Return settings, tokenizer and the first rows of each source, on any machine. Raises UserError.

    Args:
        run: the checked recipe.
        number: how many rows of each source.

    """
    settings, _, chat, rows = read_rows(run, head=number, any_machine=True)
    return settings, chat, rows


def build_trainer(run: Run, inputs: TrainingInputs) -> SFTTrainer:
    """Load the weights and return the trainer that trains them.

    Without Triton the loss and, for packed rows, the attention are this package's (`model.cpu_loss`,
    `model.packed_attention`): the same values as TRL's, faster.
    """
    args, chat = inputs.args, inputs.chat
    if not Path(inputs.model.name).is_dir():
        weights.check_weights(run, inputs.model)
    if args.deepspeed:
        deepspeed.set_hf_deepspeed_config(args.hf_deepspeed_config)
    set_seed(args.seed)  # for the adapter's first weights; TRL 1.16 does so itself, 1.8 does not
    arguments = load.build_trainer_arguments(
        run, inputs.model, quantization=inputs.quantization, new_tokens=chat.new_tokens, vocab_size=chat.num_embeddings
    )
    if not isinstance(arguments["model"], str):
        args.model_init_kwargs = None  # they were used; TRL would warn that it ignores them
    trainer = SFTTrainer(
        args=args,
        processing_class=chat.tokenizer,
        train_dataset=inputs.datasets.train,
        eval_dataset=inputs.datasets.eval,
        **arguments,
    )
    weights.check_values(run, inputs.model, trainer.model)
    patches.repair(trainer.model)
    cpu_loss.install(trainer.model, run.options.get("logits_gib", cpu_loss.LOGITS_GIB))
    if trainer.padding_free and "attn_implementation" not in run.model and args.device.type in ("cpu", "mps"):
        packed_attention.install(trainer.model)
    if chat.stop_token and inputs.rows.row_type == CHAT:
        load.add_stop_token(trainer.model.generation_config, chat.tokenizer.convert_tokens_to_ids(chat.stop_token))
    trust.hide_tokens(trainer.args)
    if ranks.count() > 1:
        repeated_rows.remove_labels(trainer)
    return trainer


def replace_callbacks(trainer: SFTTrainer, callbacks: list[TrainerCallback]) -> None:
    """Put our callbacks in the place of upstream's progress bar and printer; they are called in this order."""
    for upstream in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(upstream)
    for callback in callbacks:
        trainer.add_callback(callback)
