"""The sides of an evaluation: who answers, with which prompt, template and decoding; and their answers.

Inputs: folders of models or a server, and the rows to evaluate. Outputs: answers of each side, from `answers.jsonl` or
generated; a model is loaded only where an answer is missing, one at a time. Not here: which sides there are
(`cli.evaluate`), and scores.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from tqdm.auto import tqdm
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from trl_sft import console, file_digests, run_folder
from trl_sft.cli.evaluate import base_prompts, gguf_side
from trl_sft.errors import EXIT_OUT_OF_MEMORY, Fault, RecipeError, RunStopped, first_line
from trl_sft.evaluation import answer_cache, endpoint, generate, text_loss, thoughts
from trl_sft.evaluation.answer_cache import CacheCounts, StoredAnswer
from trl_sft.evaluation.endpoint import Endpoint
from trl_sft.evaluation.generate import LIMIT
from trl_sft.evaluation.text_loss import TextLoss
from trl_sft.model import base_digest
from trl_sft.serving import model_loading
from trl_sft.serving.model_folder import ModelFolder
from trl_sft.serving.prompts import PromptRenderer

_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "typical_p")
_DIGEST_FILES = ("config.json", run_folder.ADAPTER_CONFIG)
_HUB_KEYS = ("revision", "cache_dir", "local_files_only")
_PROMPT_END = 16  # tokens in which the mark that opens a thought stands
_DATE_FREE_DIGITS = 12  # of the digest of a template


@dataclass(frozen=True)
class Side:
    """One side of an evaluation.

    Attributes:
        name: in the files: base, tuned, base_few_shot, step_100.
        source: the folder of the model; None = a server or a GGUF file answers.
        is_base: whether the base model of `source` answers.
        endpoint: the server; None = a local model answers.
        prompts: one for each row: token ids, or what the server gets.
        opens_thought: for each row whether its prompt opens a thought.
        digest: of the model, its weights and how they are loaded.
        facts: what stands beside the scores: model, template, thinking, examples.
        end_marks: an answer ends before the first of these too; () = at its stop token only.
        gguf: the file that llama.cpp reads; None = `source` or `endpoint` answers.

    """

    name: str
    source: ModelFolder | None
    is_base: bool
    endpoint: Endpoint | None
    prompts: Sequence[Any]
    opens_thought: Sequence[bool]
    digest: str
    facts: Mapping[str, Any]
    end_marks: tuple[str, ...] = ()
    gguf: Path | None = None


@dataclass
class Answerer:
    """Lets the sides answer, and holds the model that is loaded.

    Attributes:
        tokenizer: of the run.
        renderer: renders prompts as training does.
        config: how local models decode.
        seed: of sampled answers.
        batch_size: prompts that are answered at once.
        trusts_code: whether Python code that a model brings may run.
        path: of `answers.jsonl`.
        position_limit: how many tokens prompt and answer may have; None = no limit is known.
        remote_decoding: how a server decodes.

    """

    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer
    config: GenerationConfig
    seed: int
    batch_size: int
    trusts_code: bool
    path: Path
    position_limit: int | None
    remote_decoding: Mapping[str, Any] = field(default_factory=dict)
    _loaded: tuple[str, PreTrainedModel] | None = None

    def answer(self, side: Side) -> tuple[list[dict[str, Any]], CacheCounts]:
        """Return the answers of a side, one for each row, as evaluation.jsonl has them; and what was generated."""
        decoding = self.describe_decoding(side)
        keys = [answer_cache.compute_key(side.digest, prompt, decoding) for prompt in side.prompts]
        stored, counts = answer_cache.fill(
            self.path, keys, lambda missing: self._generate(side, missing), label=side.name
        )
        answers = [
            self._split(answer, side, is_open=is_open)
            for answer, is_open in zip(stored, side.opens_thought, strict=True)
        ]
        return answers, counts

    def measure_losses(self, side: Side, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[TextLoss]:
        """Return the loss of texts under the model of a side; `rows`: token ids of contexts and of texts."""
        with self.open_model(side) as model:
            return text_loss.measure(model, rows, limit=self.position_limit)

    def describe_decoding(self, side: Side) -> dict[str, Any]:
        """Return how a side decodes; a seed only where answers are sampled."""
        if side.endpoint is not None:
            return dict(self.remote_decoding)
        if side.gguf is not None:
            return gguf_side.choose_decoding(self.config, self.seed)
        decoding = {key: value for key, value in self.config.to_diff_dict().items() if key != "transformers_version"}
        return decoding | ({"seed": self.seed} if self.config.do_sample else {})

    def compute_digest(self, source: ModelFolder, *, is_base: bool) -> str:
        """Return the digest of a model: its weights, and how they are loaded."""
        loading = {key: source.inference.get(key) for key in ("model", "quantization", "autocast", "new_tokens")}
        parts = [json.dumps(loading, sort_keys=True, default=str)]
        if is_base or source.is_adapter:
            parts.append(_digest_model(source.base, loading["model"] or {}))
        if not is_base:
            parts.append(_digest_model(str(source.weights), {}))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def release(self) -> None:
        """Free the model that is loaded."""
        self._loaded = None
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def _generate(self, side: Side, missing: Sequence[int]) -> Iterator[dict[int, StoredAnswer]]:
        """Yield the answers of each batch, by the number of their row."""
        bar = tqdm(total=len(missing), desc=f"answers {side.name}", unit="prompt", disable=not console.shows_progress())
        with contextlib.closing(bar):
            prompts = [side.prompts[number] for number in missing]
            if side.endpoint is not None:
                batches = self._ask_server(side, prompts)
            else:
                batches = self._ask_llama(side, prompts) if side.gguf is not None else self._ask_model(side, prompts)
            for batch in batches:
                yield {missing[index]: answer for index, answer in batch.items()}
                bar.update(len(batch))

    def _ask_server(self, side: Side, prompts: Sequence[Any]) -> Iterator[dict[int, StoredAnswer]]:
        """Yield the answers of a server, one at a time."""
        assert side.endpoint is not None
        yield from endpoint.answer_prompts(side.endpoint, prompts, self.remote_decoding)

    def _ask_llama(self, side: Side, prompts: Sequence[list[int]]) -> Iterator[dict[int, StoredAnswer]]:
        """Yield the answers of a GGUF file, one at a time."""
        assert side.gguf is not None
        ends = self.config.eos_token_id
        stop_tokens = set(ends) if isinstance(ends, list) else {ends} - {None}
        answers = gguf_side.answer_prompts(
            side.gguf, prompts, self.describe_decoding(side), stop_tokens={int(token) for token in stop_tokens}
        )
        for number, (tokens, stop) in enumerate(answers):
            yield {number: StoredAnswer(self._decode(tokens), stop, len(tokens))}

    def _ask_model(self, side: Side, prompts: Sequence[list[int]]) -> Iterator[dict[int, StoredAnswer]]:
        """Yield the answers of a local model, batch by batch."""
        seeds = None
        if self.config.do_sample:  # from the prompt too, so that answers do not depend on their order
            seeds = [xxhash.xxh3_64_intdigest(f"{self.seed} {prompt}".encode()) % 2**31 for prompt in prompts]
        with self.open_model(side) as model:
            batches = generate.generate_batches(
                model, self.tokenizer, prompts, config=self.config, batch_size=self.batch_size, seeds=seeds
            )
            for batch in _explain_memory(batches):
                yield {index: StoredAnswer(self._decode(tokens), stop, len(tokens)) for index, tokens, stop in batch}

    @contextlib.contextmanager
    def open_model(self, side: Side) -> Iterator[PreTrainedModel]:
        """Yield the model of a side in the precision of the run; the base of a loaded adapter needs no second load."""
        source = side.source
        assert source is not None
        name = f"{source.weights}"
        wanted = f"base {source.base}" if side.is_base and not source.is_adapter else name
        if self._loaded is None or self._loaded[0] != wanted:
            self.release()
            load = model_loading.load_base if side.is_base and not source.is_adapter else model_loading.load_model
            self._loaded = wanted, load(source, self.tokenizer, trusts_code=self.trusts_code)
        model = self._loaded[1]
        with contextlib.ExitStack() as stack:
            if side.is_base and source.is_adapter:
                stack.enter_context(model.disable_adapter())
            if dtype := source.inference.get("autocast"):
                stack.enter_context(torch.autocast(model.device.type, dtype=getattr(torch, dtype)))
            yield model

    def _decode(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer without special tokens, but with the marks around its thought."""
        marks = self.renderer.encoder.thoughts
        texts = (marks.opening, marks.closing) if marks is not None else ()
        kept = {
            self.tokenizer.convert_tokens_to_ids(text) for text in texts if text in self.tokenizer.all_special_tokens
        }
        special = set(self.tokenizer.all_special_ids) - kept
        if not kept:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return str(self.tokenizer.decode([token for token in tokens if token not in special]))

    def _split(self, answer: StoredAnswer, side: Side, *, is_open: bool) -> dict[str, Any]:
        """Return an answer with its thought apart, as evaluation.jsonl has it."""
        marks = self.renderer.encoder.thoughts
        opening, closing = (marks.opening, marks.closing) if marks is not None else ("", "")
        if side.endpoint is not None:
            opening, closing = (opening, closing) if opening and closing else thoughts.COMMON_MARKS
        split = thoughts.split_thought(answer.text, opening, closing, is_open=is_open)
        text, stop = split.answer, answer.stop
        if side.end_marks and (cut := base_prompts.cut_at_marks(text, side.end_marks)) != text:
            text, stop = cut, base_prompts.NEXT_EXAMPLE
        return {
            "text": text,
            "thought": split.thought,
            "is_closed": split.is_closed,
            "stop": stop,
            "ended": stop != LIMIT,
            "tokens": answer.tokens,
        }


def _explain_memory(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches. Raises RunStopped where the memory of the device is not enough for one."""
    try:
        yield from batches
    except torch.OutOfMemoryError:
        message = "out of memory while a batch was answered; the answers so far are kept\n"
        message += "Run the same command with a smaller --batch-size: it continues."
        raise RunStopped(message, EXIT_OUT_OF_MEMORY, code="run.out_of_memory") from None


def read_model_config(source: ModelFolder, *, trusts_code: bool) -> PretrainedConfig:
    """Return the configuration of a model, without its weights. Raises RecipeError."""
    name, keywords = _name_model(source)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trusts_code, **keywords)
    except Exception as error:  # of the hub, of a damaged file, of the code of a model
        problem = f"{name} cannot be loaded: {first_line(error)}"
        fix = "Copy or download the model again."
        if "trust_remote_code" in str(error):
            fix = "Read the code of the model; if you trust it, add --trust-remote-code."
        raise RecipeError(Fault(str(source.folder), problem, fix, code="chat.unreadable_model")) from None


def _name_model(source: ModelFolder) -> tuple[str, dict[str, Any]]:
    """Return where the configuration of a model is, and keywords for the hub."""
    name = source.base if source.is_adapter else str(source.weights)
    recorded = source.inference.get("model") or {}
    return name, {} if Path(name).is_dir() else {key: recorded[key] for key in _HUB_KEYS if key in recorded}


def choose_config(
    source: ModelFolder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    own: PretrainedConfig,
    max_new_tokens: int,
    options: Mapping[str, Any],
) -> GenerationConfig:
    """Return how every local side decodes: greedy, with the stop tokens of the run; its own keys and options win.

    Args:
        source: the tuned model.
        tokenizer: of the run.
        own: the configuration of the model.
        max_new_tokens: the most tokens of an answer, unless the run or an option says otherwise.
        options: keys of GenerationConfig that the user sets.

    Raises:
        RecipeError: an option that transformers refuses.

    """
    name, keywords = _name_model(source)
    try:
        saved = GenerationConfig.from_pretrained(name, **keywords)
    except OSError:
        saved = GenerationConfig.from_model_config(own)
    stops = model_loading.read_generation_config(source, tokenizer, own=saved)
    generation = dict(source.inference.get("generation", {})) | dict(options)
    if generation.get("do_sample") is False:  # values of sampling alone would be warned about
        generation = {key: value for key, value in generation.items() if key not in _SAMPLING_KEYS}
    try:
        return generate.choose_generation(stops, tokenizer, max_new_tokens=max_new_tokens, generation=generation)
    except (ValueError, TypeError) as error:
        fix = "Correct the option; `python -m trl_sft evaluate --help` shows them."
        raise RecipeError(Fault("the options", first_line(error), fix, code="run.bad_option")) from None


def opens_thought(renderer: PromptRenderer, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Tell whether a prompt ends with the mark that opens a thought."""
    marks = renderer.encoder.thoughts
    if marks is None or not marks.opening:
        return False
    return str(tokenizer.decode(list(ids[-_PROMPT_END:]))).rstrip().endswith(marks.opening)


def describe_template(renderer: PromptRenderer, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return which template and which thinking mode prompts have."""
    template = str(tokenizer.chat_template or "") if renderer.has_history else str(renderer.source_format.wording)
    digest = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()[:_DATE_FREE_DIGITS]
    keywords = renderer.encoder.template_kwargs
    modes = {True: "on", False: "off", None: "as the template decides"}
    thinking = "none" if renderer.encoder.thoughts is None else modes.get(keywords.get("enable_thinking"), "on")
    return {
        "template": renderer.describe(),
        "template_sha256": digest,
        "template_kwargs": dict(keywords),
        "thinking": thinking,
    }


def _digest_model(name: str, keywords: Mapping[str, Any]) -> str:
    """Return the digest of a model: of a folder all bytes of its weights, of a hub id a sample of them."""
    folder = Path(name)
    if not folder.is_dir():
        return str(base_digest.compute_digest(name, keywords.get("revision"), keywords.get("cache_dir")) or name)
    weights = {path for pattern in run_folder.WEIGHTS for path in folder.glob(pattern)}
    files = [path for path in (*sorted(weights), *(folder / file for file in _DIGEST_FILES)) if path.is_file()]
    return " ".join(f"{path.name}:{file_digests.hash_file(path)}" for path in files)
