"""Tasks of lm-eval: found by name or file, and run on a model that is loaded already; what lm-eval prints is kept back.

Inputs: names of tasks or YAML files, a live model with its tokenizer. Outputs: `SuiteTask`s, and for each side the
samples of lm-eval with their metrics. Written for lm-eval 0.4.13. Scores are those of lm-eval's own command: its
seeds, its few-shot sampling, its filters. Not here: comparison of two sides (`task_results`), and who is asked (`cli`).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from trl_sft import suggestions, user_paths
from trl_sft.errors import Fault, RecipeError, UserError, first_line

_SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "few_shot": 1234}  # of lm-eval's command
_YAML = (".yaml", ".yml")
_LENGTHS = 1  # by how many characters a name that is suggested is longer or shorter, as lm-eval has 14,000
_NEEDS_PUNKT = ("length_constraints:number_sentences", "change_case:capital_word_frequency")  # IFEval's, by nltk
_QUIET_LOGGERS = ("lm_eval", "datasets", "huggingface_hub", "evaluate", "absl", "nltk", "transformers")
_OFFLINE = (
    "ConnectionError",
    "OfflineModeIsEnabled",
    "DatasetNotFoundError",
    "LocalEntryNotFoundError",
    "HfHubHTTPError",
)


class SuiteTask(NamedTuple):
    """A task that lm-eval runs."""

    name: str
    source: str  # the YAML file that the user named, or "" for lm-eval's own tasks
    task: Any  # lm_eval.api.task.Task
    numbers: list[int] | None  # of the items that are asked; None = all
    skipped: int  # items whose checker needs data of nltk that is not installed
    sha256: str  # of its configuration and its items

    @property
    def items(self) -> int:
        """How many items are asked."""
        return len(self.task.eval_docs) if self.numbers is None else len(self.numbers)

    @property
    def aggregations(self) -> dict[str, Callable[[Sequence[Any]], float]]:
        """How the values of the items become one score, by metric."""
        return dict(self.task.aggregation())


class PromptForm(NamedTuple):
    """How the prompts of a task are rendered, and where an answer begins."""

    has_template: bool  # whether they are rendered as chats
    template_kwargs: Mapping[str, Any]  # of the chat template
    thought_end: str  # the mark behind which an answer begins; "" = the model writes no thoughts


class SideScores(NamedTuple):
    """What one side did in one task."""

    scores: dict[str, float]  # "metric,filter" -> lm-eval's score
    samples: list[dict[str, Any]]  # of each item and filter: doc_id, doc, target, arguments, resps, metrics


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Keep back what lm-eval prints, logs and warns of inside the block, and let nltk download nothing.

    Yields:
        What was printed.

    """
    loggers = [logging.getLogger(name) for name in _QUIET_LOGGERS]
    levels = [logger.level for logger in loggers]
    text = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(text))
        stack.enter_context(contextlib.redirect_stderr(text))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_without_downloads())
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield text
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def load_tasks(names: Sequence[str], *, max_items: int | None = None) -> list[SuiteTask]:
    """Return the tasks that names, groups, tags and YAML files stand for, in order, each once.

    Args:
        names: as lm-eval knows them, or paths of YAML files. A relative `data_files` is looked for beside the file
            first, and then in the current folder, where lm-eval looks.
        max_items: of each task, from its beginning; None = all.

    Raises:
        RecipeError: a name is unknown, a file is damaged, or its data cannot be read; of all names at once.

    """
    from lm_eval.tasks import TaskManager

    with quiet():
        is_local = all(_is_file(name) and not _is_group(Path(name)) for name in names)
        manager = TaskManager(include_defaults=not is_local)
    tasks: dict[str, SuiteTask] = {}
    faults: list[Fault] = []
    for name in names:
        try:
            loaded = _load(manager, name)
        except UserError as error:
            faults += error.faults
            continue
        for title, task in loaded.items():
            if title in tasks:
                problem = f"there are two tasks named {title}"
                fix = "Name each task once, and give the files different values of `task:`."
                faults.append(Fault(f"--tasks {name}", problem, fix, code="evaluation.bad_task"))
                continue
            try:
                tasks[title] = _describe(title, name if _is_file(name) else "", task, max_items=max_items)
            except UserError as error:
                faults += error.faults
    if faults:
        raise RecipeError(faults)
    return list(tasks.values())


def run_task(
    suite_task: SuiteTask, model: Any, tokenizer: Any, *, batch_size: int, prompt_form: PromptForm
) -> SideScores:
    """Let a model do a task, as `lm_eval run` does.

    Args:
        suite_task: the task.
        model: a live model, on its device.
        tokenizer: with the chat template that prompts get.
        batch_size: requests at once.
        prompt_form: how its prompts are rendered.

    Raises:
        RecipeError: lm-eval cannot run it on this model.

    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with quiet():
        try:
            task = copy.copy(suite_task.task)  # its requests belong to one side
            task._instances = None
            _set_seeds(task)
            harness = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                chat_template_args=dict(prompt_form.template_kwargs),
                think_end_token=prompt_form.thought_end or None,
            )
            numbers = {suite_task.name: suite_task.numbers} if suite_task.numbers is not None else None
            result = evaluate(
                lm=harness,
                task_dict={"tasks": {suite_task.name: task}},
                samples=numbers,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=prompt_form.has_template,
                fewshot_as_multiturn=prompt_form.has_template,
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of lm-eval, of a task's own functions
            problem = f"lm-eval cannot run it on this model: {first_line(error) or type(error).__name__}"
            fix = "Correct the task; `lm_eval run --tasks NAME` shows the whole message."
            if "max tokens to generate" in problem:
                fix = "Set `generation_kwargs: {max_gen_toks: N}` in the task, so that prompt and answer fit the model."
            raise RecipeError(
                Fault(f"--tasks {suite_task.name}", problem, fix, code="evaluation.task_failed")
            ) from None
    found = result["results"][suite_task.name]
    scores = {key: float(value) for key, value in found.items() if "," in key and "_stderr" not in key}
    samples = json.loads(json.dumps(result["samples"][suite_task.name], default=_serialize))
    return SideScores(scores, samples)


def list_metrics(suite_task: SuiteTask) -> dict[str, bool]:
    """Return the metrics of a task in its own order, with whether more of each is better."""
    better = suite_task.task.higher_is_better()
    return {name: better.get(name) is not False for name in suite_task.task.aggregation()}


@contextlib.contextmanager
def _without_downloads() -> Iterator[None]:
    """Let nltk, which IFEval's checkers import, download nothing inside the block."""
    try:
        import nltk
    except ImportError:
        yield
        return
    download = nltk.download
    nltk.download = lambda *_words, **_options: False
    try:
        yield
    finally:
        nltk.download = download


def _is_file(name: str) -> bool:
    """Tell whether a name is that of a YAML file."""
    return name.lower().endswith(_YAML)


def _is_group(path: Path) -> bool:
    """Tell whether a YAML file describes a group, whose tasks may be lm-eval's own."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return "task" not in (content := load_yaml(path, resolve_func=False)) or "group" in content
    except Exception:  # `_load` explains it
        return False


def _load(manager: Any, name: str) -> dict[str, Any]:
    """Return the tasks of one name. Raises RecipeError."""
    if not _is_file(name):
        if name not in manager.task_index:
            problem = "lm-eval has no task, group or tag with this name"
            fix = "Write a name that `lm_eval ls tasks` lists, or the path of a YAML file."
            alike = [other for other in manager.all_tasks if abs(len(other) - len(name)) <= _LENGTHS]
            if near := suggestions.nearest_name(name, alike, cutoff=suggestions.STRICT, limit=3):
                fix = f"Did you mean {near}?"
            raise RecipeError(Fault(f"--tasks {name}", problem, fix, code="evaluation.bad_task"))
        folder = Path.cwd()
    else:
        user_paths.check("--tasks", Path(name), user_paths.FILE)
        if not Path(name).is_file():
            raise RecipeError(
                Fault(f"--tasks {name}", "there is no such file", "Correct the path.", code="evaluation.bad_task")
            )
        folder = Path(name).resolve().parent
        name = str(Path(name).resolve())
    faults = []
    folders = [folder, *([Path.cwd()] if folder != Path.cwd() else [])]
    for place in folders:
        try:
            with quiet(), contextlib.chdir(place):
                return dict(manager.load([name])["tasks"])
        except Exception as error:  # of lm-eval, of datasets, of the YAML file
            faults.append(_explain(name, error))
            if not isinstance(error, FileNotFoundError):
                break
    raise RecipeError(faults[0])


def _explain(name: str, error: Exception) -> Fault:
    """Return the fault of a task that cannot be loaded."""
    kinds = {kind.__name__ for cause in (error, error.__cause__, error.__context__) for kind in type(cause).__mro__}
    title = name if not _is_file(name) else Path(name).name
    reason = first_line(error) or type(error).__name__
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        reason = f"line {error.problem_mark.line + 1}: {error.problem}"
    if kinds & set(_OFFLINE) and not isinstance(error, FileNotFoundError):
        problem = f"its data cannot be fetched from the hub: {reason}"
        fix = "Run once with access to the hub, or write a task with local data (docs/how-to/task-suites.md)."
        return Fault(f"--tasks {title}", problem, fix, code="evaluation.task_data_missing")
    if isinstance(error, FileNotFoundError):
        fix = "Correct `data_files` in the task: it is relative to the file of the task."
        return Fault(f"--tasks {title}", f"its data is missing: {reason}", fix, code="evaluation.task_data_missing")
    return Fault(
        f"--tasks {title}",
        f"lm-eval cannot load it: {reason}",
        "Correct the file of the task.",
        code="evaluation.bad_task",
    )


def _describe(name: str, source: str, task: Any, *, max_items: int | None) -> SuiteTask:
    """Return a loaded task with the items that are asked. Raises RecipeError."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        kind = "runs code that models write, without limits" if getattr(task, "UNSAFE_CODE", False) else "needs images"
        fix = "Remove it; the check `code` runs code under limits." if "code" in kind else "Remove it."
        raise RecipeError(Fault(f"--tasks {name}", f"the task {kind}", fix, code="evaluation.bad_task"))
    with quiet():
        docs = [dict(doc) for doc in task.eval_docs]
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        examples = [dict(doc) for doc in task.fewshot_docs() or ()] if task.get_config("num_fewshot") else []
    usable = list(range(len(docs)))
    if not _has_punkt():
        usable = [n for n in usable if not set(_NEEDS_PUNKT) & set(docs[n].get("instruction_id_list") or ())]
    skipped = len(docs) - len(usable)
    usable = usable[:max_items]
    if not usable:
        raise RecipeError(
            Fault(
                f"--tasks {name}",
                "the task has no item that can be asked",
                "Correct its data.",
                code="evaluation.bad_task",
            )
        )
    numbers = usable if len(usable) < len(docs) else None
    content = json.dumps([task.dump_config(), docs, examples, numbers], sort_keys=True, default=_serialize)
    return SuiteTask(name, source, task, numbers, skipped, hashlib.sha256(content.encode()).hexdigest())


def _has_punkt() -> bool:
    """Tell whether nltk has the data that two of IFEval's checkers need."""
    try:
        import nltk

        nltk.data.find("tokenizers/punkt_tab")
    except (ImportError, LookupError):
        return False
    return True


def _set_seeds(task: Any) -> None:
    """Set the seeds that lm-eval's command sets."""
    random.seed(_SEEDS["random"])
    np.random.seed(_SEEDS["numpy"])
    torch.manual_seed(_SEEDS["torch"])
    task.set_fewshot_seed(seed=_SEEDS["few_shot"])


def _serialize(value: Any) -> Any:
    """Return a value that JSON can write."""
    if isinstance(value, np.generic):
        return value.item()
    if callable(value):  # its address would differ in each process
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return sorted(value, key=str) if isinstance(value, set) else str(value)
