"""Answers to prompts, one at a time, shown while they are generated.

Inputs: a live model and rendered prompts. Outputs: a `ChatAnswer` with the reason why it ended. Decoding is
`evaluation.generate.choose_generation`, as for the answers before and after training. Not here: the screen (`session`).
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from trl_sft.errors import DataError, Fault, RecipeError, first_line
from trl_sft.evaluation import thoughts as answer_thoughts
from trl_sft.evaluation.generate import CONTEXT, LIMIT, STOP_TOKEN, choose_generation
from trl_sft.model import positions
from trl_sft.serving import model_loading
from trl_sft.serving.model_folder import ModelFolder
from trl_sft.serving.prompts import PromptRenderer, RenderedPrompt, build_renderer
from trl_sft.tokenization.thinking import ThoughtMarks

MAX_NEW_TOKENS = 512  # of an answer, unless the recipe or the user says otherwise
INTERRUPTED = "interrupted"
TUNED, BASE = "tuned", "base"


class ChatAnswer(NamedTuple):
    """The answer to one prompt."""

    text: str  # without its thought
    thought: str  # "" = none
    stop_reason: str  # STOP_TOKEN, LIMIT, CONTEXT or INTERRUPTED
    tokens: list[int]  # (tokens,), with the one that ended it
    seconds: float


@dataclass(frozen=True)
class ChatModel:
    """A tuned model that answers, and its base model where it is compared.

    Attributes:
        source: where it is.
        tokenizer: of the folder.
        renderer: renders prompts as training does.
        model: the tuned model.
        base: the base model; None = it is not compared, or `model` with its adapter off.
        config: how answers are decoded.
        seed: of sampled answers.
        positions: how many tokens prompt and answer may have; None = no limit is known.

    """

    source: ModelFolder
    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    model: PreTrainedModel
    base: PreTrainedModel | None
    config: GenerationConfig
    seed: int
    positions: int | None

    @property
    def thoughts(self) -> ThoughtMarks | None:
        """What the template writes around thoughts; None = it has none."""
        return self.renderer.encoder.thoughts

    def answer(
        self,
        prompt: RenderedPrompt,
        *,
        side: str = TUNED,
        show: Callable[[str], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> ChatAnswer:
        """Return the answer to a prompt. Ctrl-C ends it.

        Args:
            prompt: what to ask.
            side: TUNED or BASE.
            show: gets each part of the answer as soon as it is generated; None = nothing is shown.
            is_cancelled: is called after each token; true ends the answer as Ctrl-C does. None = only Ctrl-C ends it.

        Raises:
            DataError: the prompt fills the context of the model.

        """
        config, is_short = self._fit(prompt)
        streamer = _PartStreamer(self.tokenizer, show)
        began, interrupted = time.monotonic(), False
        with contextlib.ExitStack() as stack:
            model = stack.enter_context(self._choose_side(side))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._autocast(model))
            input_ids = torch.tensor([prompt.ids], device=model.device)
            torch.manual_seed(self.seed)
            is_streamed = (config.num_beams or 1) == 1
            keywords: dict[str, Any] = {"streamer": streamer} if is_streamed else {}
            if config.stop_strings:
                keywords["tokenizer"] = self.tokenizer
            if is_cancelled is not None:
                keywords["stopping_criteria"] = StoppingCriteriaList([_Cancellation(is_cancelled)])
            try:
                output = model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    generation_config=config,
                    **keywords,
                )
                tokens = output[0, len(prompt.ids) :].tolist()
                interrupted = is_cancelled is not None and is_cancelled()
            except KeyboardInterrupt:
                interrupted, tokens = True, streamer.tokens
                streamer.end()
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        if show is not None and not is_streamed:
            show(text)
        stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        reason = STOP_TOKEN if tokens and tokens[-1] in stops else CONTEXT if is_short else LIMIT
        thought, text = split_thought(self.thoughts, prompt_opens_thought(self, prompt), text)
        reason = INTERRUPTED if interrupted else reason
        return ChatAnswer(text, thought, reason, tokens, time.monotonic() - began)

    def _fit(self, prompt: RenderedPrompt) -> tuple[GenerationConfig, bool]:
        """Return a config whose answer fits the context, and whether it is shorter for that. Raises DataError."""
        if self.positions is None:
            return self.config, False
        rest = self.positions - len(prompt.ids)
        if rest < 1:
            problem = f"the context is full: the chat has {len(prompt.ids):,} tokens, and the model {self.positions:,}"
            fix = "Write /reset to begin a new chat, or shorten the prompt."
            raise DataError(Fault("the chat", problem, fix, code="chat.context_full"))
        if rest >= (self.config.max_new_tokens or 0):
            return self.config, False
        shorter = copy.deepcopy(self.config)
        shorter.max_new_tokens = rest
        return shorter, True

    @contextlib.contextmanager
    def _choose_side(self, side: str) -> Iterator[PreTrainedModel]:
        """Yield the tuned model or its base."""
        if side == TUNED:
            yield self.model
        elif self.base is not None:
            yield self.base
        else:
            with self.model.disable_adapter():
                yield self.model

    def _autocast(self, model: PreTrainedModel) -> Any:
        """Return the context of the precision that the run computes with."""
        dtype = self.source.inference.get("autocast")
        if not dtype:
            return contextlib.nullcontext()
        return torch.autocast(model.device.type, dtype=getattr(torch, dtype))


class _PartStreamer(TextStreamer):
    """Collects the tokens of an answer and hands on its text, part by part."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None] | None) -> None:
        """Take what is called with each part of the text."""
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens: list[int] = []
        self._show = show

    def put(self, value: torch.Tensor) -> None:
        """Take the next token; the first call brings the prompt."""
        if not self.next_tokens_are_prompt:
            self.tokens += value.reshape(-1).tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002 (upstream's signature)
        """Hand on a part of the text that no later token changes."""
        if self._show is not None and text:
            self._show(text)


class _Cancellation(StoppingCriteria):
    """Ends an answer as soon as a function says so."""

    def __init__(self, is_cancelled: Callable[[], bool]) -> None:
        """Take the function."""
        self._is_cancelled = is_cancelled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG002
        """Return (rows,): whether each row ends here."""
        return torch.full((input_ids.shape[0],), self._is_cancelled(), device=input_ids.device, dtype=torch.bool)


def open_model(
    source: ModelFolder,
    *,
    compares_base: bool,
    options: dict[str, Any],
    seed: int | None,
    trusts_code: bool,
) -> ChatModel:
    """Load a model that answers.

    Args:
        source: where it is.
        compares_base: whether the base model answers too.
        options: keys of GenerationConfig that the user sets.
        seed: of sampled answers; None = that of the run.
        trusts_code: whether Python code that a model brings may run.

    Raises:
        UserError: the model cannot be loaded, or it has neither a chat template nor a wording.

    """
    tokenizer = model_loading.load_tokenizer(source, trusts_code=trusts_code)
    renderer = build_renderer(source, tokenizer)
    model = model_loading.load_model(source, tokenizer, trusts_code=trusts_code)
    base = None
    if compares_base and not source.is_adapter:
        base = model_loading.load_base(source, tokenizer, trusts_code=trusts_code)
    if base is not None:
        base.generation_config = model.generation_config
    generation = {"max_new_tokens": MAX_NEW_TOKENS} | source.inference.get("generation", {}) | options
    if options.get("do_sample") is False:  # values of sampling alone would be warned about
        generation = {key: value for key, value in generation.items() if key not in ("temperature", "top_p", "top_k")}
    try:
        config = choose_generation(
            model.generation_config, tokenizer, max_new_tokens=MAX_NEW_TOKENS, generation=generation
        )
    except (ValueError, TypeError) as error:
        fix = "Correct the option; `python -m trl_sft chat --help` shows them."
        raise RecipeError(Fault("the options", first_line(error), fix, code="run.bad_option")) from None
    recorded = source.inference.get("seed", 42)
    limit = positions.read_limit(model.config)
    return ChatModel(source, tokenizer, renderer, model, base, config, recorded if seed is None else seed, limit)


def prompt_opens_thought(chat: ChatModel, prompt: RenderedPrompt) -> bool:
    """Tell whether a rendered prompt ends with the mark that opens a thought."""
    marks = chat.thoughts
    if marks is None or not marks.opening:
        return False
    return str(chat.tokenizer.decode(prompt.ids[-16:])).rstrip().endswith(marks.opening)


def split_thought(marks: ThoughtMarks | None, is_open: bool, text: str) -> tuple[str, str]:
    """Return the thought of an answer and the rest; `is_open`: the prompt has begun the thought."""
    if marks is None:
        return "", text
    split = answer_thoughts.split_thought(text, marks.opening, marks.closing, is_open=is_open)
    return split.thought, split.answer
