"""The run, top to bottom: prepare, lock the folder, build the trainer, train, evaluate, save.

In: a `Run` of `recipe.build`. Out: a `Result`, and a run folder. What cannot be honoured is refused before the
weights load. Deliberately absent: the steps themselves; each is one function of `stages` or `finish`.
"""

from __future__ import annotations

import functools
from contextlib import closing, nullcontext

from transformers import PreTrainedModel, TrainerState
from trl import SFTConfig

from trl_sft import earlier_run, ranks
from trl_sft.evaluation import before_after
from trl_sft.recipe.checked import Run
from trl_sft.recipe.folder_decision import FolderDecision
from trl_sft.tokenization import encode, template_date
from trl_sft.training import failures, finish, monitor, resume, summary, trackers
from trl_sft.training.callbacks import Guard, watch
from trl_sft.training.early_stopping import EarlyStopping
from trl_sft.training.finish import Result
from trl_sft.training.generation_metric import score_answers
from trl_sft.training.hub_push import HubPush
from trl_sft.training.mirror import Mirror
from trl_sft.training.progress import Progress
from trl_sft.training.record import RunRecord
from trl_sft.training.sample_answers import SampleAnswers
from trl_sft.training.source_losses import SourceLosses
from trl_sft.training.stages import build_trainer, replace_callbacks
from trl_sft.training.throughput import Throughput
from trl_sft.training.verify import Verification


@template_date.restored()
def run(checked: Run, decision: FolderDecision) -> Result:
    """Train, evaluate and save one run in its run folder.

    Args:
        checked: the recipe, as `recipe.build` returns it.
        decision: how the run may use its folder, as `folder_decision.check_folder` returns it.

    Raises:
        UserError: before training; nothing was written.
        RunStopped: training began and ended early.
    """
    inputs, tokens = resume.prepare(checked, decision)
    with resume.claim_folder(checked, tokens) as final_decision:
        record = RunRecord(checked, final_decision)
        with failures.explained(checked, record):
            trainer = record.trainer = build_trainer(checked, inputs)
            verification = record.verification = Verification(checked, inputs, trainer)
            entries = resume.describe_run(checked, inputs.args, tokens=tokens, day=inputs.chat.template_date)
            stopping = record.stopping = EarlyStopping(checked, final_decision, record.show)
            losses = SourceLosses(trainer, inputs.datasets.groups, verification=verification, show=record.show)
            resume_state = resume.ResumeState(
                final_decision, trainer, verification=verification, stopping=stopping, losses=losses, entries=entries
            )
            encode_prompt = functools.partial(encode.encode_prompt, inputs.datasets.encoder)
            prompts = before_after.select_prompts(
                checked, inputs.rows, encode=encode_prompt, ledger=inputs.datasets.ledger
            )
            record.answer_metric = score_answers(checked, inputs, trainer, prompts=prompts, show=record.show)

            def begin(args: SFTConfig, state: TrainerState, model: PreTrainedModel) -> list[tuple[str, str]]:
                """Start writing the run folder, after the last check; return the table before step 1."""
                record.begin(inputs, entries)
                rows = None if inputs.rows.streaming else len(trainer.train_dataset)
                answers = before_after.ask_base(checked, trainer, prompts)
                lines = resume_state.describe_changes(args, state)
                lines += summary.before(args, state, model, rows=rows) + stopping.first_screen(args, state)
                lines += record.answer_metric.first_screen(args, state) if record.answer_metric else []
                lines += losses.first_screen() + verification.first_screen() + progress.estimate_time(state)
                return lines + ([("answers", answers)] if answers else [])

            measured = record.throughput = Throughput(trainer, verification)
            price = checked.options.get("price_per_hour")
            progress = record.progress = Progress(checked.output_dir, begin, measured, price_per_hour=price)
            complete_rows = functools.partial(finish.measure_completions, checked, inputs, trainer)
            record.monitor = monitor.Monitor(
                progress.show, prompts.loss_tokens, clock=measured.clock, measure_completions=complete_rows
            )
            guard = Guard(checked.options.get("max_hours"), failures.resume_command(checked), note=record.monitor.note)
            push = HubPush(checked, inputs.push, progress.show) if inputs.push and ranks.is_first() else None
            mirror = Mirror(checked, final_decision, progress.show) if "mirror" in checked.options else None
            samples = SampleAnswers(checked, trainer, prompts, own=inputs.prompts, record=record)
            states = [stopping, verification, resume_state, samples, progress, record.monitor]
            replace_callbacks(trainer, [*states, *filter(None, [push, mirror]), guard])
            record.monitor.alert = trackers.isolate(trainer, progress.show)
            with watch(trainer, guard, measured), closing(progress), push or nullcontext(), mirror or nullcontext():
                resume.train(trainer, record.checkpoint)
                result = finish.save(checked, inputs, trainer, record=record, prompts=prompts)
                if ranks.is_first():
                    earlier_run.remove_replaced(checked.output_dir)
            return result._replace(pushed=push.finish(trainer, record.add_push)) if push else result
