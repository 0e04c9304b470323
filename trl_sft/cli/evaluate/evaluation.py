"""One evaluation, top to bottom: rows, sides, answers, scores, verdict, files, screen.

Inputs: a run folder and the options of the command. Outputs: `answers.jsonl`, `evaluation.jsonl`, `eval.json` and
`report.html`. Not here: the arguments (`cli.evaluate`).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import console, run_folder
from trl_sft.cli.evaluate import (
    base_prompts,
    general_suite,
    gguf_side,
    prompts,
    screen,
    sides,
    task_sides,
    training_rows,
)
from trl_sft.cli.evaluate.sides import Answerer, Side
from trl_sft.errors import Fault, RecipeError
from trl_sft.evaluation import (
    answer_format,
    answer_pairs,
    conclusion,
    endpoint,
    format_changes,
    generate,
    items,
    suite,
    task_results,
    verdict,
)
from trl_sft.evaluation.checks import check_requests, sandbox
from trl_sft.evaluation.checks.answer import CheckedAnswer
from trl_sft.evaluation.checks.check_requests import CODE
from trl_sft.evaluation.endpoint import Endpoint
from trl_sft.evaluation.items import EvaluationItem
from trl_sft.evaluation.suite_result import list_lines as suite_lines
from trl_sft.evaluation.verdict import BASE, FEW_SHOT, TUNED
from trl_sft.model import positions
from trl_sft.reports import page, run_files
from trl_sft.serving import model_folder, model_loading
from trl_sft.serving.model_folder import ModelFolder
from trl_sft.serving.prompts import PromptRenderer, RenderedPrompt, build_renderer
from trl_sft.tokenization import chat_template, template_date

_OPINIONS = ("judge", "votes")  # keys of the evaluation that other commands add


class _Models(NamedTuple):
    """The folders of the models that answer."""

    run: ModelFolder  # whose template and decoding count
    tuned: ModelFolder | None  # None = a server or a GGUF file answers
    base: ModelFolder  # `is_base` of it, or the folder of --against
    against: bool  # whether `base` is the folder of --against
    steps: dict[int, ModelFolder]


def run(folder: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a run; return `evaluation` as eval.json has it, and `calls`. Raises UserError."""
    is_gguf = gguf_side.is_file(options.tuned)
    task_sides.check_tasks(options.tasks, has_endpoint=bool(options.endpoint), has_gguf=is_gguf)
    models = _find_models(folder, options)
    tokenizer = model_loading.load_tokenizer(models.run, trusts_code=options.trust_remote_code)
    with template_date.restored():
        if models.run.template_date:
            template_date.pin(datetime.date.fromisoformat(models.run.template_date))
        renderer = build_renderer(models.run, tokenizer)
        asked = _read_items(folder, options)
        training_set = training_rows.compare(
            folder,
            asked,
            [render(renderer, item).content for item in asked],
            data=options.data,
            allows_missing=options.allow_missing_tasks,
        )
        answerer = build_answerer(models.run, tokenizer, renderer, asked=asked, output=output, options=options)
        planned, problem = _plan_sides(models, answerer, asked, folder=folder, options=options)
        console.print_lines(screen.describe_plan(asked, planned, problem))
        records, calls = _answer(answerer, planned, asked)
        suite_result = _ask_suite(models, answerer, planned, records=records, folder=folder, options=options)
        task_result, task_calls = _run_tasks(models, answerer, planned, options=options)
    facts = {side.name: dict(side.facts) | {"decoding": answerer.describe_decoding(side)} for side in planned}
    result = verdict.build(records, facts, steps=list(models.steps))
    if any(request.check.name == CODE for item in asked for request in item.checks):
        result["code_limits"] = sandbox.measure_limits()
    result["few_shot_problem"] = problem
    result["suite"] = suite_result
    result["lm_eval"] = task_result
    result["training_set"] = training_set
    if table := answer_format.measure(answer_pairs.read_records(records)):
        result["format"] = format_changes.describe(table)
    result = conclusion.conclude(_keep_opinions(output, records) | result)
    _write(output, records, result)
    console.print_lines(screen.describe_result(result))
    if "format" in result:
        console.print_lines(format_changes.list_lines(result["format"]))
    if suite_result is not None:
        console.print_lines(suite_lines(suite_result))
    if task_result is not None:
        console.print_lines(task_results.list_lines(task_result))
    console.print_lines(screen.describe_findings(result))
    for line in screen.list_regressions(result):
        console.say(line)
    if (output / run_folder.RUN).is_file():
        page.write_at_end(output)
    console.say(f"wrote     {run_folder.shorten_path(output.absolute() / run_folder.EVAL)}, {run_folder.EVALUATION}")
    return {"evaluation": result, "calls": calls} | ({"task_calls": task_calls} if task_calls else {})


def _find_models(folder: Path, options: argparse.Namespace) -> _Models:
    """Return the folders of all models. Raises RecipeError for one that is missing."""
    steps = {step: model_folder.find_model(folder, step) for step in options.steps}
    is_gguf = gguf_side.is_file(options.tuned)
    source = steps[options.steps[-1]] if steps else model_folder.find_model(folder)
    tuned = None
    if not options.endpoint and not is_gguf:
        tuned = model_folder.find_model(options.tuned) if options.tuned else source
    if options.against is not None:
        return _Models(source, tuned, model_folder.find_model(options.against), True, steps)
    if not source.base:
        problem = "the folder does not name the model that it was trained from, so there is nothing to compare with"
        fix = "Add --against DIR with the folder of the base model."
        raise RecipeError(Fault(str(folder), problem, fix, code="model.missing_base"))
    model_folder.check_base(source)
    return _Models(source, tuned, source, False, steps)


def _read_items(folder: Path, options: argparse.Namespace) -> list[EvaluationItem]:
    """Return the rows with their checks. Raises UserError."""
    requested = check_requests.read_by_task(options.check, folder=Path.cwd(), where="--check")
    found = prompts.read_items(folder, data=options.data, max_rows=options.max_rows)
    return items.choose_checks(found, requested, may_run_code=options.run_code)


def build_answerer(
    source: ModelFolder,
    tokenizer: Any,
    renderer: PromptRenderer,
    *,
    asked: Sequence[EvaluationItem],
    output: Path,
    options: argparse.Namespace,
) -> Answerer:
    """Return what lets the sides answer. Raises RecipeError, DataError."""
    chosen: dict[str, Any] = {}
    if options.max_new_tokens is not None:
        chosen["max_new_tokens"] = options.max_new_tokens
    if options.temperature is not None:
        sampled = options.temperature > 0
        chosen |= {"do_sample": True, "temperature": options.temperature} if sampled else {"do_sample": False}
    limit = generate.MAX_NEW_TOKENS
    references = [item.reference for item in asked]
    if renderer.encoder.thoughts is None and all(references):  # a thought needs more tokens than the reference has
        limit = generate.choose_limit(tokenizer, references)
    own = sides.read_model_config(source, trusts_code=options.trust_remote_code)
    config = sides.choose_config(source, tokenizer, own=own, max_new_tokens=limit, options=chosen)
    seed = options.seed if options.seed is not None else int(source.inference.get("seed", 42))
    remote: Mapping[str, Any] = {}
    if options.endpoint:
        generation = dict(source.inference.get("generation", {})) | chosen
        remote = endpoint.choose_decoding(generation, max_new_tokens=config.max_new_tokens, seed=seed)
    output.mkdir(parents=True, exist_ok=True)
    return Answerer(
        tokenizer=tokenizer,
        renderer=renderer,
        config=config,
        seed=seed,
        batch_size=options.batch_size,
        trusts_code=options.trust_remote_code,
        path=output / run_folder.ANSWERS,
        position_limit=positions.read_limit(own),
        remote_decoding=remote,
    )


def _plan_sides(
    models: _Models,
    answerer: Answerer,
    asked: Sequence[EvaluationItem],
    *,
    folder: Path,
    options: argparse.Namespace,
) -> tuple[list[Side], str]:
    """Return the sides in the order in which they answer, and why the base model has no examples. Raises UserError."""
    rendered = [render(answerer.renderer, item) for item in asked]
    planned = []
    for step, source in models.steps.items():
        planned.append(build_side(f"step_{step}", answerer, rendered, source=source))
    if options.endpoint:
        planned.append(_build_remote_side(answerer, rendered, asked, server=Endpoint(options.endpoint, options.model)))
    elif gguf_side.is_file(options.tuned):
        planned.append(_build_gguf_side(answerer, rendered, options.tuned))
    else:
        planned.append(build_side(TUNED, answerer, rendered, source=models.tuned))
    planned.append(build_side(BASE, answerer, rendered, source=models.base, is_base=not models.against))
    if not options.few_shot:
        return planned, "--few-shot 0"
    examples = prompts.read_examples(folder, asked)
    if examples.problem:
        return planned, examples.problem
    name = str(models.base.tokenizer_source if models.against else models.base.base)
    base_tokenizer = base_prompts.load_base_tokenizer(name, trusts_code=options.trust_remote_code)
    builder = base_prompts.BasePromptBuilder(answerer.renderer, answerer.tokenizer, base_tokenizer)
    limit = answerer.position_limit
    token_limit = None if limit is None else limit - (answerer.config.max_new_tokens or 0)
    built = builder.build(asked, rendered, examples=examples.rows, number=options.few_shot, token_limit=token_limit)
    base = planned[-1]
    facts = dict(base.facts) | {"template": built.template, "examples": built.examples, "prompt_opens_thought": False}
    is_open = [sides.opens_thought(answerer.renderer, answerer.tokenizer, row) for row in built.ids]
    side = dataclasses.replace(
        base, name=FEW_SHOT, prompts=built.ids, opens_thought=is_open, facts=facts, end_marks=built.end_marks
    )
    return [*planned, side], ""


def render(renderer: PromptRenderer, item: EvaluationItem) -> RenderedPrompt:
    """Return the tokens of a prompt, as training renders it. Raises UserError."""
    if item.is_worded:
        return renderer.render_worded(item.prompt, item.tools)
    if isinstance(item.prompt, str):
        return renderer.render(item.prompt)
    return renderer.render_messages(item.prompt, item.tools)


def build_side(
    name: str,
    answerer: Answerer,
    rendered: Sequence[RenderedPrompt],
    *,
    source: ModelFolder | None,
    is_base: bool = False,
) -> Side:
    """Return a side that a local model answers."""
    assert source is not None
    ids = [prompt.ids for prompt in rendered]
    is_open = [sides.opens_thought(answerer.renderer, answerer.tokenizer, row) for row in ids]
    kind = "base model" if is_base else "adapter" if source.is_adapter else "model"
    where = Path(source.base).name if is_base else source.folder.absolute().name
    digest = answerer.compute_digest(source, is_base=is_base)
    facts: dict[str, Any] = {
        "model": {"kind": kind, "name": where, "step": None if is_base else source.step, "digest": digest},
        **sides.describe_template(answerer.renderer, answerer.tokenizer),
        "prompt_opens_thought": any(is_open),
    }
    return Side(name, source, is_base, None, ids, is_open, digest, facts)


def _build_gguf_side(answerer: Answerer, rendered: Sequence[RenderedPrompt], path: Path) -> Side:
    """Return a side that llama.cpp answers. Raises UserError."""
    digest = gguf_side.check_file(path, answerer.tokenizer)
    ids = [prompt.ids for prompt in rendered]
    is_open = [sides.opens_thought(answerer.renderer, answerer.tokenizer, row) for row in ids]
    facts: dict[str, Any] = {
        "model": {"kind": "GGUF file", "name": path.name, "step": None, "digest": digest},
        **sides.describe_template(answerer.renderer, answerer.tokenizer),
        "prompt_opens_thought": any(is_open),
    }
    return Side(TUNED, None, False, None, ids, is_open, digest, facts, gguf=path)


def _build_remote_side(
    answerer: Answerer, rendered: Sequence[RenderedPrompt], asked: Sequence[EvaluationItem], *, server: Endpoint
) -> Side:
    """Return a side that a server answers: it renders chats with its own template, and texts are worded already."""
    remote = [
        [prompt.content, item.tools] if item.tools else prompt.content
        for prompt, item in zip(rendered, asked, strict=True)
    ]
    is_chat = answerer.renderer.has_history
    facts = {
        "model": {"kind": "server", "name": server.model, "step": None, "digest": server.digest},
        "template": "chat template of the server" if is_chat else answerer.renderer.describe(),
        "template_sha256": None,
        "template_kwargs": {},
        "thinking": "as the server decides",
        "prompt_opens_thought": False,
    }
    return Side(TUNED, None, False, server, remote, [False] * len(remote), server.digest, facts)


def _answer(
    answerer: Answerer, planned: Sequence[Side], asked: Sequence[EvaluationItem]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the records of evaluation.jsonl, and how many answers of each side were generated. Raises UserError."""
    records: list[dict[str, Any]] = [
        {
            "id": item.number,
            "row": item.row,
            "task": item.task,
            "prompt": item.prompt,
            "prompt_key": item.prompt_key,
            "reference": item.reference,
            "check": item.checks[0].check.name,
            "answers": {},
            "scores": {},
        }
        for item in asked
    ]
    calls = {}
    for side in planned:
        began = time.monotonic()
        answers, counts = answerer.answer(side)
        seconds = time.monotonic() - began
        calls[side.name] = counts._asdict() | {"seconds": round(seconds, 3)}
        console.print_lines(screen.describe_calls(side.name, counts, seconds))
        for record, item, answer in zip(records, asked, answers, strict=True):
            checked = CheckedAnswer(answer["text"], item.reference, None, item.prompt, item.task)
            record["answers"][side.name] = answer
            record["scores"][side.name] = {request.check.name: request.score(checked) for request in item.checks}
    answerer.release()
    return records, calls


def _ask_suite(
    models: _Models,
    answerer: Answerer,
    planned: Sequence[Side],
    *,
    records: Sequence[Mapping[str, Any]],
    folder: Path,
    options: argparse.Namespace,
) -> dict[str, Any] | None:
    """Return the result of the general suite; None = it is not asked."""
    if not options.suite:
        return None
    asked = suite.read_prompts()
    limit = options.max_new_tokens
    if limit is None and answerer.renderer.encoder.thoughts is None:  # a thought needs more
        limit = suite.MAX_NEW_TOKENS
    own = argparse.Namespace(**vars(options) | {"max_new_tokens": limit, "few_shot": 0})
    suite_answerer = build_answerer(
        models.run, answerer.tokenizer, answerer.renderer, asked=asked, output=answerer.path.parent, options=own
    )
    suite_sides, _ = _plan_sides(models._replace(steps={}), suite_answerer, asked, folder=folder, options=own)
    base = next(side for side in planned if side.name == BASE)
    return general_suite.ask(
        suite_answerer, suite_sides, asked, records=records, main_prompts=base.prompts, folder=folder
    )


def _keep_opinions(output: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what other commands added to eval.json, such as votes, where they were about the answers of `records`."""
    earlier = run_folder.read_json(output / run_folder.EVAL).get("evaluation")
    added = {name: earlier[name] for name in _OPINIONS if name in earlier} if isinstance(earlier, dict) else {}
    if not added:
        return {}
    read = run_files.read_lines(output / run_folder.EVALUATION)
    if answer_pairs.read_records(read) == answer_pairs.read_records(records):
        return added
    console.say(f"note      eval.json loses {' and '.join(added)}: the answers are no longer those that were judged")
    return {}


def _run_tasks(
    models: _Models, answerer: Answerer, planned: Sequence[Side], *, options: argparse.Namespace
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the result of the tasks of lm-eval, None = there are none; and how long each took. Raises UserError."""
    if not options.tasks:
        return None, {}
    name = str(models.base.tokenizer_source if models.against else models.base.base)
    base_tokenizer = base_prompts.load_base_tokenizer(name, trusts_code=options.trust_remote_code)
    has_template = base_tokenizer is not None and bool(chat_template.read_template(base_tokenizer))
    return task_sides.run(answerer, planned, options.tasks, max_items=options.max_rows, base_has_template=has_template)


def _write(output: Path, records: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """Write evaluation.jsonl, and the verdict into eval.json beside what training wrote there."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    run_folder.write_text(output / run_folder.EVALUATION, lines)
    content = run_folder.read_json(output / run_folder.EVAL) | {"evaluation": result}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    run_folder.write_text(output / run_folder.EVAL, text)
