"""The model card: what was trained on what, what it brought, how to use it, how to do it again.

Inputs: `CardFacts`. Outputs: the text of README.md, with the front matter that the hub reads. Every number in it was
measured by the run; a part that was not measured is absent. TRL's own card names neither a local base nor results.
Deliberately not here: reading files (`card_facts`), and which files go to the hub (`selection`).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from trl_sft import redaction, run_folder
from trl_sft.publishing import next_commands
from trl_sft.publishing.card_facts import CardFacts
from trl_sft.publishing.selection import find_weights
from trl_sft.recipe import paths
from trl_sft.recipe.yaml_reader import format_value

_TAGS = ["trl", "sft", "trl_sft"]
_LICENSE_KEYS = ("license", "license_name", "license_link")
# key of eval.json -> its name in a table, and in the hub's list of metrics
_METRICS = {
    "loss": ("eval loss", "loss"),
    "perplexity": ("perplexity", "perplexity"),
    "token_accuracy": ("token accuracy", "accuracy"),
}
_EVAL_NAMES = {"eval_loss": "loss", "eval_mean_token_accuracy": "token_accuracy"}  # of run.json, without eval.json
_ROW_PARTS = ("read", "trained", "left out", "cut at `max_length`", "tokens", "tokens with loss")


def write_model_card(facts: CardFacts, *, repo_id: str = "", base_license: Mapping[str, str] | None = None) -> str:
    """Return the model card of a run.

    Args:
        facts: Of the run.
        repo_id: Where the model is on the hub; "" = the card is for the run folder.
        base_license: `license`, `license_name`, `license_link` of the base model, as its card has them; None = they
            are not known.

    """
    name = repo_id or facts.name
    lines = ["---", _write_front_matter(facts, repo_id or facts.name, base_license or {}), "---", ""]
    lines += [f"# {name.rpartition('/')[2]}", "", _describe_model(facts), ""]
    lines += ["## Results", "", *_write_results(facts), ""]
    if data := list(_write_data(facts)):
        lines += ["## Data", "", *data, ""]
    if proof := list(_write_proof(facts)):
        lines += ["## Proof of the formats", "", *proof, ""]
    lines += ["## Use", "", *_write_use(facts, name, is_on_hub=bool(repo_id)), ""]
    lines += ["## Reproduce", "", *_write_recipe(facts)]
    return redaction.redact("\n".join(lines) + "\n")


def write_usage(folder: str, *, differs_from_base: bool, fields: Mapping[str, Any] | None = None) -> list[str]:
    """Return the lines of Python that make `ask`, a text-generation pipeline, from a finished run.

    Args:
        folder: The run folder as the reader's Python finds it, or a hub id.
        differs_from_base: Whether it holds an adapter whose tokens or end token are not its base's. transformers
            loads an adapter with the base's tokens, so peft has to grow the embedding and generation has to be told
            where to stop.
        fields: Of the base model's configuration, which the run changed and an adapter does not hold; None = none.

    """
    if not differs_from_base and not fields:
        return ["from transformers import pipeline", f'ask = pipeline("text-generation", {format_value(folder)})']
    return [
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer, GenerationConfig, pipeline",
        f"folder = {format_value(folder)}",
        f"model = AutoPeftModelForCausalLM.from_pretrained(folder{_write_keywords(fields)})",
        "model.generation_config = GenerationConfig.from_pretrained(folder)",
        'ask = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained(folder))',
    ]


def write_merge(folder: str, dtype: str, fields: Mapping[str, Any] | None = None) -> list[str]:
    """Return the lines of Python that merge the adapter of a finished run into its base model.

    peft saves no generation config, and the merged model would have that of the base, which may end a turn with
    another token.

    Args:
        folder: The run folder as the reader's Python finds it, or a hub id.
        dtype: Of the merged weights.
        fields: As in `write_usage`.

    """
    keywords = _write_keywords({"dtype": dtype} | dict(fields or {}))
    return [
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer, GenerationConfig",
        f"folder = {format_value(folder)}",
        f"model = AutoPeftModelForCausalLM.from_pretrained(folder{keywords}).merge_and_unload()",
        "model.generation_config = GenerationConfig.from_pretrained(folder)",
        'model.save_pretrained("merged")',
        'AutoTokenizer.from_pretrained(folder).save_pretrained("merged")',
    ]


def _write_keywords(fields: Mapping[str, Any] | None) -> str:
    """Return fields as keyword arguments of Python, behind another argument: `, dtype="float32"`."""
    return "".join(f", {name}={_write_value(value)}" for name, value in (fields or {}).items())


def _write_value(value: Any) -> str:
    """Return a value as Python writes it, texts in double quotation marks."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_write_value(key)}: {_write_value(item)}" for key, item in value.items()) + "}"
    return format_value(value) if isinstance(value, str) and '"' not in value else repr(value)


def write_best(best: Mapping[str, Any]) -> str:
    """Return the line that says which step was saved; `best` is the entry of run.json."""
    text = f"step {best['step']} of {best['steps']} ({best['metric']} {best['value']:.4g}), whose weights are saved"
    if equal := best.get("equal"):
        steps = f"step{'s' * (len(equal) > 1)} {', '.join(map(str, equal))}"
        text += f"; the value is the same at {steps}, and the Trainer keeps the first"
    return text


def _write_front_matter(facts: CardFacts, name: str, base_license: Mapping[str, str]) -> str:
    """Return the YAML that the hub reads, without the lines around it."""
    gguf = _list_gguf(facts)
    library = "gguf" if gguf and len(gguf) == len(find_weights(facts.export_files)) else "transformers"
    values: dict[str, Any] = {
        "library_name": "peft" if facts.is_adapter else library,
        "pipeline_tag": "text-generation",
        "tags": [*_TAGS, *(["lora"] if facts.is_adapter else []), *(["gguf"] if gguf else [])],
    }
    if facts.base_id:
        values["base_model"] = facts.base_id
        values["base_model_relation"] = "adapter" if facts.is_adapter else "finetune"
    if datasets := facts.list_dataset_ids("data.train", "data.eval"):
        values["datasets"] = datasets
    values |= {key: base_license[key] for key in _LICENSE_KEYS if base_license.get(key)}
    if results := list(_list_eval_results(facts)):
        values |= {"eval_results": results, "model_name": name.rpartition("/")[2]}
    return str(ModelCardData(**values).to_yaml()).strip()


def _list_eval_results(facts: CardFacts) -> Iterator[EvalResult]:
    """Yield each metric after training for the hub's `model-index`."""
    held_out = facts.ledger.get("eval") or {}
    sources = [str(source.get("name")) for part in held_out.values() for source in part.get("sources") or ()]
    names = ", ".join(dict.fromkeys(sources))
    rows = f"held-out rows of {names}" if names else "held-out rows"
    ids = facts.list_dataset_ids("data.eval" if "data.eval" in facts.recipe_values else "data.train")
    for key, value in _list_measured(facts)[1].items():
        title, kind = _METRICS.get(key, (key.replace("_", " "), key))
        yield EvalResult(
            task_type="text-generation",
            dataset_type=ids[0] if len(ids) == 1 else "held-out-rows",
            dataset_name=rows,
            metric_type=kind,
            metric_value=value,
            metric_name=title,
            verified=False,
        )


def _describe_model(facts: CardFacts) -> str:
    """Return the sentence about base, method and length of the training."""
    is_embedded = Path(facts.base).parent == paths.EMBEDDED
    name = Path(facts.base).name
    base = facts.base_id or (f"{paths.PREFIX}{name}" if is_embedded else name) or "a model"
    method = "with LoRA" if facts.trained_adapter else "all weights"
    version = facts.run.get("trl_sft")
    text = f"`{base}`, {method} fine-tuned by trl_sft{f' {version}' if version else ''}"
    text += "; the adapter is merged." if facts.trained_adapter and not facts.is_adapter else "."
    steps, seconds = facts.run.get("steps"), facts.run.get("seconds")
    if isinstance(steps, int) and isinstance(seconds, int | float):
        device = (facts.run.get("hardware") or {}).get("device")
        where = f" on {'a CPU' if device == 'cpu' else device}" if device else ""
        text += f" Training took {steps:,} step{'s' * (steps != 1)} and {seconds:,.0f} s{where}."
    if facts.is_adapter and facts.base and not facts.base_id and not is_embedded:
        text += " The base model was a folder of the machine that trained: the adapter needs that model."
    return text


def _list_measured(facts: CardFacts) -> tuple[dict[str, float], dict[str, float]]:
    """Return the metrics before and after training that were measured, by their key in eval.json."""
    before = _select_numbers(facts.evaluation.get("before"))
    after = _select_numbers(facts.evaluation.get("after"))
    if not after:
        metrics = facts.run.get("metrics") or {}
        after = _select_numbers({name: metrics.get(key) for key, name in _EVAL_NAMES.items()})
    return before, after


def _select_numbers(values: Any) -> dict[str, float]:
    """Return the finite numbers of a mapping, without its inner mappings."""
    pairs = values.items() if isinstance(values, Mapping) else ()
    return {
        str(name): value
        for name, value in pairs
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _write_results(facts: CardFacts) -> Iterator[str]:
    """Yield what came out: the verdict, and the metrics before and after."""
    for line in _list_outcome(facts):
        yield from (_escape(line), "")
    if facts.run.get("outcome") == run_folder.RUNNING:  # its last evaluation is not that of the model at the end
        return
    before, after = _list_measured(facts)
    if not after:
        yield "No rows were held out."
        return
    rows = [[_METRICS.get(key, (key.replace("_", " "),))[0], *_write_pair(key, before, after)] for key in after]
    yield from _write_table(["metric on held-out rows", "before", "after"], rows)
    if prompts := facts.evaluation.get("prompts"):
        yield from ("", f"Answers were generated for {prompts:,} held-out prompts.")
    tasks = facts.evaluation.get("tasks")
    scores = [_write_task(name, task) for name, task in tasks.items()] if isinstance(tasks, Mapping) else []
    rows = [row for task in scores for row in task]
    if len(scores) > 1 and rows:
        yield from ("", *_write_table(["task", "prompts", "metric", "before", "after"], rows))


def _write_task(name: str, task: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of a task in the table of tasks."""
    before, after = _select_numbers(task.get("before")), _select_numbers(task.get("after"))
    prompts = f"{task['prompts']:,}" if isinstance(task.get("prompts"), int) else ""
    return [[name, prompts, key.replace("_", " "), *_write_pair(key, before, after)] for key in after]


def _write_pair(key: str, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Return a metric before and after; "not measured" where the base model was not asked."""
    return [f"{before[key]:.4g}" if key in before else "not measured", f"{after[key]:.4g}"]


def _list_outcome(facts: CardFacts) -> list[str]:
    """Return the lines on what came out, as the run wrote them; of an older run the text of its verdict."""
    lines = facts.run.get("summary")
    if isinstance(lines, list):
        return [str(line) for line in lines if line]
    verdict = facts.run.get("verdict") or {}
    return [str(verdict[key]) for key in ("text", "advice") if verdict.get(key)]


def _write_data(facts: CardFacts) -> Iterator[str]:
    """Yield the ledger: rows read, trained, left out by reason, cut; tokens with loss."""
    every_part = {"training": facts.ledger.get("train"), **(facts.ledger.get("eval") or {})}
    parts: dict[str, Mapping[str, Any]] = {name: part for name, part in every_part.items() if isinstance(part, Mapping)}
    rows, reasons = [], []
    for name, part in parts.items():
        title = {"eval": "held out"}.get(name, name)
        rows.append([title, *_count_part(part)])
        sources = part.get("sources") or []
        if len(sources) > 1:
            rows += [[f"- {source.get('name')}", *_count_part(source)] for source in sources]
        reasons += [f"- {title}: {line}" for line in _list_losses_of_rows(part)]
    if not rows:
        return
    if ids := facts.list_dataset_ids("data.train", "data.eval"):
        yield from (f"Data sets of the hub: {', '.join(f'`{name}`' for name in ids)}.", "")
    yield from _write_table(["rows", *_ROW_PARTS], rows)
    if reasons:
        yield from ("", "What was left out or changed:", "", *(_escape(line) for line in reasons))
    if notes := [part["note"] for part in parts.values() if part.get("note")]:
        yield from ("", _escape(str(notes[0])))


def _count_part(part: Mapping[str, Any]) -> list[str]:
    """Return the numbers of a part or a source: rows, then tokens."""
    rows, tokens = part.get("rows") or {}, part.get("tokens") or {}
    rejected = rows.get("rejected")
    left_out = sum(rejected.values()) if isinstance(rejected, Mapping) else None
    values = [rows.get("input"), rows.get("kept"), left_out, rows.get("truncated"), tokens.get("kept")]
    return [f"{value:,}" if isinstance(value, int) else "" for value in [*values, tokens.get("loss")]]


def _list_losses_of_rows(part: Mapping[str, Any]) -> Iterator[str]:
    """Yield what happened to rows that were not simply trained, with its reason."""
    rows, tokens = part.get("rows") or {}, part.get("tokens") or {}
    for reason, number in (rows.get("rejected") or {}).items():
        yield f"{number:,} left out: {reason}"
    if number := rows.get("truncated"):
        lost = (tokens.get("before_truncation") or 0) - (tokens.get("kept") or 0)
        with_loss = (tokens.get("loss_before_truncation") or 0) - (tokens.get("loss") or 0)
        yield f"{number:,} cut at `train.max_length`, which removed {lost:,} tokens ({with_loss:,} of them with loss)"
    if number := rows.get("tokenized_in_part"):
        yield f"{number:,} of these far longer, of which only the beginning was tokenized"
    if number := rows.get("repeated"):
        yield f"{number:,} repeated, to reach the weight of their source"
    if number := part.get("missing_end_token"):
        yield f"{number:,} without the end token of their last answer"


def _write_proof(facts: CardFacts) -> Iterator[str]:
    """Yield how the formats of an export compare with the trained model; nothing where no proof is recorded."""
    proof = facts.export.get("proof")
    exports = proof.get("exports") if isinstance(proof, Mapping) else None
    rows = []
    for entry in exports if isinstance(exports, list) else ():
        for reader in entry.get("readers") or ():
            prompts = reader.get("prompts") or {}
            cells = [f"{entry.get('format')} {entry.get('type')}", f"{reader.get('reader')} {reader.get('version')}"]
            is_judged = reader.get("judges_prompts")
            cells.append(f"{prompts.get('equal')} of {prompts.get('compared')}" if is_judged else "not judged")
            cells.append(f"{reader.get('equal_answers')} of {reader.get('answers')}")
            cells += [f"{reader[key]:.2g}" if key in reader else "" for key in ("mean_kl", "worst_kl")]
            rows.append(cells)
    if rows:
        yield from ("Each format was read back and compared with the trained model:", "")
        head = ["format", "read by", "equal prompts", "equal greedy answers", "mean KL", "worst KL"]
        yield from _write_table(head, rows)


def _write_use(facts: CardFacts, name: str, *, is_on_hub: bool) -> Iterator[str]:
    """Yield the commands that fit the model, how it is used without this package, and how to merge an adapter."""
    if facts.export_files:
        yield from _write_export_use(facts, name)
        return
    folder = name.rpartition("/")[2]
    words = shlex.quote(folder)
    yield "```sh"
    if is_on_hub:
        yield f"hf download {shlex.quote(name)} --local-dir {words}"
    commands = next_commands.list_next_commands(folder, is_adapter=facts.is_adapter, architecture=facts.architecture)
    for command in commands:
        yield f"python -m trl_sft {shlex.join(command.words)}  # {command.title}"
    yield from (next_commands.format_curl(next_commands.build_request(folder)), "```", "")
    yield from (("Without trl_sft:" if is_on_hub else f"`{folder}` is this folder. Without trl_sft:"), "")
    differs = bool(facts.run.get("differs_from_base"))
    fields = facts.changed_fields
    if fields:
        names = ", ".join(f"`{field}`" for field in fields)
        problem = f"The run changed {names} of the base model's configuration, and an adapter holds no configuration."
        yield from (f"{problem} Without them the adapter gives other answers, so pass them with the folder.", "")
    yield from ("```python", *write_usage(name, differs_from_base=differs, fields=fields), "```")
    if facts.is_adapter:
        dtype = facts.recipe_values.get("model.dtype", "float32")
        yield from ("", "To merge the adapter into the base model, with the tokens that generation stops on:", "")
        yield from ("```python", *write_merge(name, str(dtype), fields), "```")


def _write_export_use(facts: CardFacts, name: str) -> Iterator[str]:
    """Yield how to load the formats of an export from the hub."""
    gguf = _list_gguf(facts)
    if len(find_weights(facts.export_files)) > len(gguf):
        yield from ("```python", *write_usage(name, differs_from_base=False), "```")
    if gguf:
        yield from ("", f"For llama.cpp: {', '.join(f'`{file}`' for file in gguf)}.", "")
        yield from ("```sh", f"hf download {shlex.quote(name)} {shlex.quote(gguf[0])} --local-dir .")
        yield from (f"llama-cli -m {shlex.quote(gguf[0])}", "```")
    if "Modelfile" in facts.export_files:
        folder = shlex.quote(name.rpartition("/")[2])
        yield from ("", "For Ollama:", "", "```sh", f"hf download {shlex.quote(name)} --local-dir {folder}")
        yield from (f"cd {folder}", f"ollama create {folder.lower()} -f Modelfile", "```")


def _list_gguf(facts: CardFacts) -> list[str]:
    """Return the GGUF files of an export."""
    return [path for path in facts.export_files if path.endswith(".gguf")]


def _write_recipe(facts: CardFacts) -> Iterator[str]:
    """Yield the recipe with its overrides, the versions, the machine, and the digests of the data files."""
    overrides = [str(word) for word in facts.run.get("overrides") or () if redaction.REDACTED not in str(word)]
    command = shlex.join(["recipe.yaml", *overrides])
    if facts.recipe:
        fence = "`" * (3 + ("```" in facts.recipe))
        yield from ("The recipe, `recipe.yaml`:", "", f"{fence}yaml", facts.recipe.rstrip(), fence, "")
        yield from ("```sh", f"python -m trl_sft {command}", "```", "")
    if versions := facts.run.get("versions"):
        yield from (f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.", "")
    hardware = facts.run.get("hardware") or {}
    machine = [*(hardware.get("gpus") or []), hardware.get("cpu"), hardware.get("system")]
    details = [f"seed {facts.run['seed']}"] if isinstance(facts.run.get("seed"), int) else []
    details += [f"commit {facts.run['git_commit']} of the recipe's repository"] if facts.run.get("git_commit") else []
    details += [f"machine {', '.join(map(str, filter(None, machine)))}"] if any(machine) else []
    details += [f"Python {hardware['python']}"] if hardware.get("python") else []
    if details:
        yield f"{_capitalize('; '.join(details))}."
    digests = facts.run.get("data")
    if isinstance(digests, Mapping) and digests:
        rows = [[Path(str(file)).name, f"`{digest}`"] for file, digest in digests.items()]
        yield from ("", *_write_table(["data file", "sha256"], rows))


def _capitalize(text: str) -> str:
    """Return a text whose first letter is a capital."""
    return text[:1].upper() + text[1:]


def _write_table(head: list[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield a table of Markdown."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(_escape(cell) for cell in row)} |"


def _escape(text: str) -> str:
    """Return a text that stays in one line and cell, and makes no HTML: file names and reasons come from users."""
    text = " ".join(text.split())
    return text.replace("|", "\\|").replace("<", "&lt;")
