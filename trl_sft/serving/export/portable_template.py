"""The chat template that needs nothing beside it: the run's, with what the run renders it with.

Inputs: what renders the prompts of the run. Outputs: a Jinja template that needs no keyword, no tag of transformers
alone and no clock, so that
llama.cpp, vLLM and transformers render what training rendered. A run without a chat template gets one that
writes its wording around one turn. Deliberately not here: the comparison of what is rendered (`serving.proof`), and
the template of Ollama.
"""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

from trl_sft.data.formats import CHAT
from trl_sft.errors import Fault, TemplateError
from trl_sft.serving.model_folder import ModelFolder
from trl_sft.serving.prompts import PromptRenderer
from trl_sft.tokenization import chat_template

# the tag is transformers' own: it marks what is trained, and writes nothing
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_DATE_CALL = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
_TRIALS = ("Qx7 zv", "One more: 42?\nLine two.")


def build(source: ModelFolder, renderer: PromptRenderer) -> str:
    """Return the template of a run for other programs.

    Args:
        source: The folder of the run.
        renderer: Renders its prompts.

    Raises:
        TemplateError: The wording of the run is not one text around the prompt.

    """
    if renderer.row_type != CHAT:
        return _build_for_wording(source, renderer)
    template = _GENERATION.sub(
        lambda match: f"{{%{match[1]} {'endif' if match[2] else 'if true'} {match[3]}%}}",
        chat_template.read_template(renderer.encoder.tokenizer),
    )
    settings = ""
    if source.template_date and "strftime_now" in template:
        settings += _write_date(template, datetime.date.fromisoformat(source.template_date))
    for name, value in source.inference.get("chat_template_kwargs", {}).items():
        settings += f"{{%- set {name} = {_write_literal(value)} %}}"
    # a line break after a block is removed by the template engine of transformers, so one that the template begins
    # with is written twice
    return settings + ("\n" if settings and template.startswith("\n") else "") + template


def is_needed(source: ModelFolder, renderer: PromptRenderer) -> bool:
    """Tell whether the tokenizer's own template would render the prompts of the run otherwise, or there is none."""
    if renderer.row_type != CHAT:
        return True
    has_date = bool(source.template_date) and "strftime_now" in str(renderer.encoder.tokenizer.chat_template)
    return has_date or bool(source.inference.get("chat_template_kwargs"))


def _write_date(template: str, day: datetime.date) -> str:
    """Return a macro in place of the function that reads the clock, which writes the day of the run."""
    moment = datetime.datetime.combine(day, datetime.time())
    formats = dict.fromkeys(match["format"] for match in _DATE_CALL.finditer(template))
    cases = "".join(
        f"{{%- if format == {json.dumps(text)} %}}{{{{- {json.dumps(moment.strftime(text))} }}}}{{%- endif %}}"
        for text in formats
    )
    return f"{{%- macro strftime_now(format) %}}{cases}{{%- endmacro %}}"


def _write_literal(value: Any) -> str:
    """Return a value as the template engine reads it: JSON, with `none` for null."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_write_literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_write_literal(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def _build_for_wording(source: ModelFolder, renderer: PromptRenderer) -> str:
    """Return a template that writes the wording of the run around the last turn. Raises TemplateError."""
    tokenizer = renderer.encoder.tokenizer
    texts = [str(tokenizer.decode(renderer.render(trial).ids)) for trial in _TRIALS]
    before, found, after = texts[0].partition(_TRIALS[0])
    if not found or texts[1] != before + _TRIALS[1] + after:
        problem = "the wording of the run is not one text before the prompt and one after it"
        fix = "Export with `--to merged` or `--to vllm`, and write the wording in your own program."
        raise TemplateError(Fault(str(source.folder), problem, fix, code="export.unsupported_template"))
    parts = (_write_literal(before), "messages[-1]['content']", _write_literal(after))
    return "".join(f"{{{{- {part} -}}}}" for part in parts)
