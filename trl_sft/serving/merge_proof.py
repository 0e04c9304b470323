"""The proof of a merge: the logits of the merged model against those of the adapter on its base model.

Inputs: the merged folder, the adapter, rows of the run. Outputs: a mapping for merge.json, or a refusal. Both models
compute in float32, one after the other, so that the difference is that of the weights alone. Where the memory does not
hold one model, the proof covers the tensors only, and says so. Deliberately not here: answers and quantized formats.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trl_sft import run_folder
from trl_sft.errors import Fault, RecipeError, first_line
from trl_sft.serving.merge import DEQUANTIZED, Merger

# The largest difference of logits, as a share of their spread, that rounding the merged weights to a dtype explains.
# It grows with the layers: SmolLM2-135M (30 layers) differs by 6e-6, 0.0022 and 0.044 to 0.05 or more.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 0.15}
_MOST_OF_CHANGE = 0.75  # a merged model further from the tuned one is about as far from it as the base model is
_FLOOR = 1e-5  # differences of float32 in another order of additions
_ROWS, _TOKENS = 8, 128
_MEMORY_FACTOR = 1.25  # of the weights: what loading and computing need beside them
_TEXT = "The quick brown fox jumps over the lazy dog. 1 + 1 = 2. 你好，世界。"
HELD_OUT, TRAINING, FIXED = "held-out rows", "training rows", "a fixed text"


def prove(merger: Merger, folder: Path) -> dict[str, Any]:
    """Compare the merged model with the adapter on its base model.

    Args:
        merger: What was merged.
        folder: With the merged model.

    Returns:
        What was compared, with the differences; `covers` is "logits", or "tensors" where the memory is too small.

    Raises:
        RecipeError: The models differ more than the dtype explains, or transformers cannot load the folder.

    """
    kind, rows = collect_rows(merger)
    available = read_available_memory()
    needed = sum(tensor.numel() for tensor in merger.shapes.values()) * 4 * _MEMORY_FACTOR
    needed += 4 * sum(map(len, rows)) * merger.model.config.get_text_config().vocab_size * 4
    if available is not None and needed > available:
        return {"covers": "tensors", "needed_bytes": int(needed), "available_bytes": available}
    merged = _compute_merged(folder, rows)
    is_dequantized = merger.base == DEQUANTIZED
    tuned, base = _compute_adapter(merger, rows, dequantizes=is_dequantized)
    proof = {"covers": "logits", "rows": len(rows), "rows_from": kind, "tokens": sum(map(len, rows))}
    proof |= {"tolerance": TOLERANCES[str(merger.dtype).removeprefix("torch.")]}
    proof |= {"merged_against_tuned": compare(merged, tuned), "base_against_tuned": compare(base, tuned)}
    if merger.adapter.quantization is not None and not is_dequantized:
        quantized, _ = _compute_adapter(merger, rows, dequantizes=True)
        proof["merged_against_quantized"] = compare(merged, quantized)
    _judge(merger, proof)
    return proof


def read_available_memory() -> int | None:
    """Return the bytes of memory that are free, or can be freed; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def collect_rows(merger: Merger) -> tuple[str, list[list[int]]]:
    """Return where the rows of the proof are from, and their token ids: at most 8 rows of 128 tokens."""
    run, tokenizer = merger.adapter.run, merger.tokenizer
    texts = [
        text
        for sample in run_folder.read_first_lines(run / run_folder.SAMPLES, _ROWS)
        if (text := _render_sample(sample, tokenizer))
    ]
    kind = HELD_OUT
    if not texts:
        kind = TRAINING
        lines = run_folder.read_first_lines(run / run_folder.ROWS, _ROWS)
        texts = ["".join(str(segment[0]) for segment in line.get("segments", ())) for line in lines]
    if not any(texts):
        kind, texts = FIXED, [_TEXT]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:_TOKENS] for text in texts[:_ROWS]]
    size = merger.shapes[_get_embedding_name(merger.model)].shape[0]
    return kind, [[token for token in row if token < size] for row in rows if row]


def _get_embedding_name(model: PreTrainedModel) -> str:
    """Return the name of the weight of the embedding."""
    embedding = model.get_input_embeddings()
    return str(next(name for name, module in model.named_modules() if module is embedding)) + ".weight"


def _render_sample(sample: dict[str, Any], tokenizer: Any) -> str:
    """Return the text of a held-out prompt with the tuned model's answer; "" where it cannot be rendered."""
    prompt, answer = sample.get("prompt"), sample.get("after")
    if isinstance(prompt, list):
        try:
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template of the user's
            return ""
    if not isinstance(prompt, str):
        return ""
    return f"{prompt}{answer}" if isinstance(answer, str) else prompt


def _get_class(folder: Path) -> Any:
    """Return the class that training loads."""
    config = AutoConfig.from_pretrained(folder)
    return getattr(transformers, (config.architectures or [""])[0], None) or AutoModelForCausalLM


@torch.no_grad()
def _compute_logits(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """Return the logits of each row: (tokens, vocabulary) each."""
    model.eval()
    return [model(input_ids=torch.tensor([row])).logits[0].float() for row in rows]


def _compute_merged(folder: Path, rows: list[list[int]]) -> list[torch.Tensor]:
    """Return the logits of the merged folder, as plain transformers loads it. Raises RecipeError if it cannot."""
    try:
        model, report = _get_class(folder).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        _fail(folder, f"transformers cannot load the merged folder: {first_line(error)}")
    if unread := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        _fail(folder, f"transformers does not load the merged folder as it is: {unread[0]}")
    return _compute_logits(model, rows)


def _compute_adapter(
    merger: Merger, rows: list[list[int]], *, dequantizes: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the logits of the adapter on its base model, and those of the base model alone."""
    adapter = merger.adapter
    model = _get_class(adapter.base).from_pretrained(adapter.base, dtype=torch.float32, **adapter.fields)
    if model.get_input_embeddings().weight.shape[0] != merger.rows:
        model.resize_token_embeddings(merger.rows, mean_resizing=False)
    if dequantizes:
        parameters = dict(model.named_parameters())
        for name in merger.tensors.quantized:
            parameters[name].data = merger.tensors.read_dequantized(name).float()
    peft_model = PeftModel.from_pretrained(model, adapter.folder)
    tuned = _compute_logits(peft_model, rows)
    with peft_model.disable_adapter():
        return tuned, _compute_logits(peft_model, rows)


def compare(logits: list[torch.Tensor], reference: list[torch.Tensor]) -> dict[str, float]:
    """Return how far logits are from a reference.

    Args:
        logits: (tokens, vocabulary) for each row.
        reference: The same of the other model.

    Returns:
        `relative`: the root mean square of the difference by that of the centred reference, of the worst row; `max` and
        `mean` of the absolute differences; `mean_kl` and `worst_kl` of the next-token distribution, in nats;
        `equal_tokens`: the share of positions with the same most likely token.

    """
    worst = largest = total = values = kl_total = kl_worst = equal = tokens = 0.0
    for row, reference_row in zip(logits, reference, strict=True):
        width = min(row.shape[-1], reference_row.shape[-1])
        ours, theirs = row[:, :width].double(), reference_row[:, :width].double()
        difference = (ours - theirs).abs()
        spread = float((theirs - theirs.mean(-1, keepdim=True)).square().mean().sqrt())
        worst = max(worst, float(difference.square().mean().sqrt()) / (spread or 1.0))
        log_theirs = theirs.log_softmax(-1)
        kl = (log_theirs.exp() * (log_theirs - ours.log_softmax(-1))).sum(-1).clamp(min=0)
        largest, total = max(largest, float(difference.max())), total + float(difference.sum())
        kl_worst, kl_total = max(kl_worst, float(kl.max())), kl_total + float(kl.sum())
        equal += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        values, tokens = values + width * len(ours), tokens + len(ours)
    names = ("relative", "max", "mean", "mean_kl", "worst_kl", "equal_tokens")
    return dict(zip(names, (worst, largest, total / values, kl_total / tokens, kl_worst, equal / tokens), strict=True))


def _judge(merger: Merger, proof: dict[str, Any]) -> None:
    """Raise RecipeError if the merged model is further from the tuned one than its dtype explains."""
    error, change = (proof[name]["relative"] for name in ("merged_against_tuned", "base_against_tuned"))
    tolerance, dtype = proof["tolerance"], str(merger.dtype).removeprefix("torch.")
    if not math.isfinite(error) or error > tolerance:
        _fail(
            merger.adapter.folder,
            f"the logits of the merged model differ by {error:.2g} of their spread from those of the adapter on its "
            f"base model; {dtype} explains at most {tolerance:g}",
        )
    if error > max(_MOST_OF_CHANGE * change, _FLOOR):
        problem = (
            f"rounding to {dtype} loses what was trained: the adapter changes the logits by {change:.2g} of their "
            f"spread, and the merged model differs from it by {error:.2g}"
        )
        fix = "Write `--dtype float32`, or train longer."
        raise RecipeError(Fault(str(merger.adapter.folder), problem, fix, code="merge.lost_in_rounding"))


def _fail(where: Path, problem: str) -> None:
    """Raise RecipeError for a merged model that is not the trained one."""
    fix = "Use the adapter on its base model, and report this with the versions in run.json."
    raise RecipeError(Fault(str(where), f"{problem}; nothing is written", fix, code="merge.not_proved"))
