"""llama.cpp reads a GGUF file: its own template engine, tokenizer and arithmetic, as its server and Ollama have them.

Inputs: an `ExportedModel` and the reference. Outputs: a `ReaderOutput`. llama.cpp comes from the wheel `xllamacpp`, and
runs in a child process (`llama_server`). Not here: transformers' reader (`folder_reader`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Iterator
from typing import Any

from trl_sft.errors import Fault, RecipeError
from trl_sft.row_progress import RowProgress
from trl_sft.serving.proof import gguf_tokens, llama_client
from trl_sft.serving.proof.answer_comparison import AnswerComparison, AnswerSummary, compare_steps
from trl_sft.serving.proof.exported_model import ExportedModel
from trl_sft.serving.proof.folder_reader import LLAMA_CPP, ReaderOutput
from trl_sft.serving.proof.gguf_tokens import GgufTokens
from trl_sft.serving.proof.llama_client import MARGIN, LlamaFailure, LlamaServer, ServerRefusal
from trl_sft.serving.proof.run_prompts import ProofPrompt
from trl_sft.serving.proof.trained_reference import TrainedReference, pinned_date

MOST_LISTED = 1000  # tokens whose probability llama.cpp lists at each position; the others count as one


def read(exported: ExportedModel, reference: TrainedReference, *, known: ReaderOutput | None = None) -> ReaderOutput:
    """Let llama.cpp render the prompts of a GGUF file and answer them, and compare it with the reference.

    Args:
        exported: what was written.
        reference: the trained model.
        known: of the same weights with another template, whose answers are taken; None = llama.cpp answers.

    Raises:
        RecipeError: llama.cpp cannot load the file.

    """
    longest = max((len(answer.prompt.ids) for answer in reference.answers), default=0)
    with _serve(exported, longest + reference.answer_tokens + MARGIN) as server:
        ids: list[list[int]] = []
        problems: dict[int, str] = {}
        with pinned_date(reference.source):
            for number, prompt in enumerate(reference.prompts.prompts):
                try:
                    ids.append(_render_prompt(server, prompt, exported))
                except ServerRefusal as error:
                    ids.append([])
                    problems[number] = str(error)
        if known is not None:
            return dataclasses.replace(known, ids=ids, problems=problems)
        tokens = gguf_tokens.read(exported.path)
        comparisons, continued = _answer(server, reference, tokens, title=exported.title)
    return ReaderOutput(
        reader=LLAMA_CPP,
        version=importlib.metadata.version("xllamacpp"),
        ids=ids,
        problems=problems,
        stop_tokens=tokens.stop_tokens,
        summary=AnswerSummary(comparisons),
        continued=continued,
    )


@contextlib.contextmanager
def _serve(exported: ExportedModel, context: int) -> Iterator[LlamaServer]:
    """Yield a server of a GGUF file; `context`: tokens. Raises RecipeError if llama.cpp cannot load the file."""
    try:
        with llama_client.serve(exported.path, context) as server:
            yield server
    except LlamaFailure as error:
        raise RecipeError(_explain(exported, str(error))) from None


def _explain(exported: ExportedModel, cause: str) -> Fault:
    """Return the fault of a file that llama.cpp cannot load."""
    code = "proof.wrong_template" if "chat template" in cause else "proof.unreadable_export"
    fix = "Serve the run itself with `chat` or `serve`, and report this with the versions in run.json."
    return Fault(exported.title, f"llama.cpp cannot use the export: {cause}", fix, code=code)


def _render_prompt(server: LlamaServer, prompt: ProofPrompt, exported: ExportedModel) -> list[int]:
    """Return the tokens of a prompt as the runtime makes them: a chat by its template, a text as it is."""
    if isinstance(prompt.content, str):
        return server.tokenize(prompt.content, add_special=not prompt.is_rendered)
    if exported.render is not None:
        return server.tokenize(exported.render(prompt.content), add_special=True)
    content = {"messages": prompt.content} | ({"tools": prompt.tools} if prompt.tools else {})
    if exported.template_kwargs:
        content["chat_template_kwargs"] = dict(exported.template_kwargs)
    return server.tokenize(server.post("/apply-template", content)["prompt"], add_special=True)


def _answer(
    server: LlamaServer, reference: TrainedReference, vocabulary: GgufTokens, *, title: str
) -> tuple[list[AnswerComparison], int]:
    """Return the comparison of each answer, and how many of them go on after the trained answer's end."""
    comparisons, continued = [], 0
    with RowProgress(f"Exported {title}", len(reference.answers), unit="answers") as bar:
        for trained in reference.answers:
            request = {
                "prompt": trained.prompt.ids,
                "n_predict": reference.answer_tokens,
                "temperature": 0,
                "repeat_penalty": 1.0,
                "n_probs": min(trained.log_probs.shape[-1], MOST_LISTED),
                "return_tokens": True,
                "cache_prompt": False,
            }
            answer = server.post("/completion", request)
            tokens = [int(token) for token in answer["tokens"]]
            steps = _align(answer.get("completion_probabilities", []), tokens, vocabulary.find_listed(tokens))
            comparisons.append(compare_steps(trained, tokens, steps))
            is_equal = comparisons[-1].position is None
            continued += is_equal and trained.tokens[-1] in reference.stop_tokens and len(tokens) > len(trained.tokens)
            bar.update(1)
    return comparisons, continued


def _align(listed: list[dict[str, Any]], tokens: list[int], is_listed: list[bool]) -> list[dict[int, float] | None]:
    """Return token -> log-probability at each position of an answer; None = the server does not list it.

    Args:
        listed: what the server lists, in the order of the answer.
        tokens: the answer.
        is_listed: for each token, whether the server lists its probabilities.

    """
    steps: list[dict[int, float] | None] = []
    waiting = iter(listed)
    for token, is_there in zip(tokens, is_listed, strict=True):
        step = next(waiting, None) if is_there else None
        if step is not None and int(step["id"]) != token:
            break  # another rule than that of this version: what follows cannot be told apart
        entries = step["top_logprobs"] if step is not None else []
        steps.append({int(entry["id"]): float(entry["logprob"]) for entry in entries} or None)
    return steps
