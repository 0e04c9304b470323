"""The judge that the options name: behind an endpoint, or on this machine; who it is, and what it costs.

Inputs: the options of the command. Outputs: an `EndpointJudge` or a `LocalJudge`, and facts about it. Not here: what is
asked (`model_judge`).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from trl_sft import file_digests, run_folder
from trl_sft.errors import Fault, LaunchError, RecipeError, UsageError
from trl_sft.evaluation.answer_pairs import BASE, TUNED
from trl_sft.evaluation.call_log import CallLog
from trl_sft.evaluation.endpoint import Endpoint
from trl_sft.evaluation.judging import judge_identity
from trl_sft.evaluation.judging.endpoint_judge import DECODING, EndpointJudge
from trl_sft.evaluation.judging.judge_identity import JudgedModel
from trl_sft.evaluation.model_calls import ERRORS, CallLimits, ModelCaller
from trl_sft.recipe import paths

if TYPE_CHECKING:
    from trl_sft.evaluation.judging.local_judge import LocalJudge

Judge: TypeAlias = "EndpointJudge | LocalJudge"
_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"
_BYTES_PER_TOKEN = 4  # where no tokenizer is there to count with


def check(options: argparse.Namespace, folder: Path, evaluation: Mapping[str, Any]) -> list[str]:
    """Return warnings about the judge. Raises RecipeError for one that is judged, or that is no model.

    Args:
        options: of the command.
        folder: the run.
        evaluation: of eval.json; {} = it has none.

    """
    path = None if options.endpoint else _find_folder(options.model)
    return judge_identity.check_judge(options.model, path, _list_models(folder, evaluation))


def build(options: argparse.Namespace, log: CallLog) -> Judge:
    """Return the judge; a model on this machine is loaded with its first question. Raises LaunchError."""
    if options.endpoint:
        limits = CallLimits(
            concurrent=options.concurrent,
            seconds=options.timeout,
            max_calls=options.max_calls,
            max_cost=options.max_cost,
            input_price=options.input_price,
            output_price=options.output_price,
        )
        own = DECODING | {"max_tokens": options.max_tokens, "seed": options.seed}
        if "max_completion_tokens" in options.decoding:  # servers take one of both
            own.pop("max_tokens")
        decoding = {name: value for name, value in (own | options.decoding).items() if value is not None}
        if options.max_cost is not None and not {"max_tokens", "max_completion_tokens"} & decoding.keys():
            problem = "without a limit of tokens a reply can cost any amount, so no call fits into --max-cost"
            fix = 'Name a limit: {"max_completion_tokens": 4000}.'
            raise UsageError(Fault("--decoding", problem, fix, code="run.bad_option"))
        caller = ModelCaller(Endpoint(options.endpoint, options.model), log, limits)
        return EndpointJudge(caller, decoding, sends_schema=not options.no_schema)
    from trl_sft.evaluation.judging.local_judge import LocalJudge

    path = _find_folder(options.model)
    weights = sorted({file for pattern in run_folder.WEIGHTS for file in path.glob(pattern)})
    files = [file for file in (*weights, path / _CONFIG, path / _TOKENIZER) if file.is_file()]
    digest = " ".join(f"{file.name}:{file_digests.hash_file(file)}" for file in files)
    return LocalJudge(path, digest, log, trusts_code=options.trust_remote_code)


def describe(judge: Judge, options: argparse.Namespace) -> dict[str, Any]:
    """Return who judges, as `eval.json` has it."""
    if isinstance(judge, EndpointJudge):
        return {"kind": "endpoint", "model": options.model, "decoding": dict(judge.decoding)}
    return {"kind": "local", "model": judge.path.name, "decoding": None}


def describe_cost(judge: Judge) -> dict[str, Any]:
    """Return the tokens of all replies that the result rests on, and what they cost; null = without prices."""
    if not isinstance(judge, EndpointJudge):
        return {"tokens": None, "cost": None}
    used = judge.used.values()
    tokens = {
        "input": sum(answer.input_tokens or 0 for answer in used),
        "output": sum(answer.output_tokens or 0 for answer in used),
    }
    limits = judge.caller.limits
    return {"tokens": tokens, "cost": limits.compute_cost(*tokens.values()) if limits.has_prices else None}


def describe_calls(judge: Judge) -> dict[str, Any]:
    """Return what the calls of this process were."""
    if isinstance(judge, EndpointJudge):
        return judge.caller.counts.describe() | {"stop": judge.caller.stop}
    return dict(judge.counts)


def refuse_errors(judge: Judge) -> None:
    """Raise LaunchError if the calls stopped after errors in a row."""
    if not isinstance(judge, EndpointJudge) or judge.caller.stop != ERRORS:
        return
    caller = judge.caller
    name, last = caller.problems[-1]
    problem = f"the model {caller.endpoint.model} failed {caller.limits.errors_in_row} requests in a row, "
    problem += f"the last one ({name}) with: {last}"
    fix = "Correct the server or the options, and run the same command again: answers so far are kept."
    if last.startswith("400"):
        fix = "Leave out what the server refuses (--no-schema, --decoding), or name a model with a longer context."
    raise LaunchError(Fault(caller.endpoint.url, problem, fix, code="evaluation.endpoint_failed"))


def find_token_counter(folder: Path) -> tuple[Callable[[str], int], str]:
    """Return a function that counts tokens, and what it counts with: the tokenizer of the run or of its base.

    The tokenizer of a judge behind an endpoint is not known.
    """
    record = run_folder.read_json(folder / run_folder.RUN).get("inference") or {}
    for place in (folder, Path(str(record.get("base") or folder))):
        if (place / _TOKENIZER).is_file():
            from tokenizers import Tokenizer

            try:
                tokenizer = Tokenizer.from_file(str(place / _TOKENIZER))
            except Exception:  # of the Rust library; a damaged file
                continue
            return functools.partial(_count_tokens, tokenizer), "the tokenizer of the run"
    return (lambda text: len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN + 1), "four bytes for a token"


def _count_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer.encode(text).ids)


def _find_folder(name: str) -> Path:
    """Return the folder of a judge on this machine. Raises RecipeError."""
    found = paths.EMBEDDED / name.removeprefix("trl_sft:") if name.startswith("trl_sft:") else Path(name)
    adapter = run_folder.ADAPTER_CONFIG
    if (found / _CONFIG).is_file() and not (found / adapter).is_file():
        return found
    problem = "this is no folder of a whole model"
    fix = "Name the folder of a model with its config.json, or add --endpoint URL of a server that has this model."
    if (found / adapter).is_file():
        problem, fix = "this is an adapter", "Merge it into its base model, and name the merged model."
    raise RecipeError(Fault(name, problem, fix, code="judge.no_model"))


def _list_models(folder: Path, evaluation: Mapping[str, Any]) -> list[JudgedModel]:
    """Return the models whose answers are judged, with all that is known of them."""
    record = run_folder.read_json(folder / run_folder.RUN).get("inference") or {}
    sides = evaluation.get("sides") or {}
    adapter = run_folder.read_json(folder / run_folder.ADAPTER_CONFIG)
    base = str(record.get("base") or adapter.get("base_model_name_or_path") or "")
    base_folder = Path(base) if base and Path(base).is_dir() else None
    from trl_sft.model import base_digest

    tuned_digest = "" if adapter else base_digest.compute_digest(str(folder)) or ""
    return [
        JudgedModel("the tuned model", (folder.absolute().name, _get_name(sides, TUNED)), folder, tuned_digest),
        JudgedModel(
            "the base model", (base, _get_name(sides, BASE)), base_folder, str(record.get("base_digest") or "")
        ),
    ]


def _get_name(sides: Mapping[str, Any], side: str) -> str:
    """Return the name of a side's model, as `evaluate` wrote it; "" = unknown."""
    model = (sides.get(side) or {}).get("model") or {}
    return str(model.get("name") or "")
