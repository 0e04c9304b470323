"""The trainer of a run: SFTTrainer with its weights, our loss and attention inside it, and our callbacks.

In: `TrainingInputs`. Out: a live SFTTrainer. Deliberately absent: a trainer class of our own.
"""

from __future__ import annotations

from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from trl import SFTTrainer

from trl_sft.data.rows import CHAT
from trl_sft.model import cpu_loss, load, packed_attention, patches, trust
from trl_sft.recipe.checked import Run
from trl_sft.training.inputs import TrainingInputs


def build_trainer(run: Run, inputs: TrainingInputs) -> SFTTrainer:
    """Load the weights and return the trainer that trains them.

    Without Triton the loss and, for packed rows, the attention are this package's (`model.cpu_loss`,
    `model.packed_attention`): the same values as TRL's, faster.
    """
    args, chat = inputs.args, inputs.chat
    set_seed(args.seed)  # for the adapter's first weights; TRL 1.16 does so itself, 1.8 does not
    arguments = load.build_trainer_arguments(
        run, inputs.model, quantization=inputs.quantization, new_tokens=chat.new, vocab_size=chat.rows
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
    patches.repair(trainer.model)
    cpu_loss.install(trainer.model, run.options.get("logits_gib", cpu_loss.LOGITS_GIB))
    if trainer.padding_free and "attn_implementation" not in run.model and args.device.type in ("cpu", "mps"):
        packed_attention.install(trainer.model)
    if chat.stop and inputs.rows.row_type == CHAT:
        load.add_stop_token(trainer.model, chat.tokenizer.convert_tokens_to_ids(chat.stop))
    trust.hide_tokens(trainer.args)
    return trainer


def replace_callbacks(trainer: SFTTrainer, callbacks: list[TrainerCallback]) -> None:
    """Put our callbacks in the place of upstream's progress bar and printer; they are called in this order."""
    for upstream in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(upstream)
    for callback in callbacks:
        trainer.add_callback(callback)
