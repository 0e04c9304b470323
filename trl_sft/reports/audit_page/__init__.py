"""The page of an audit: one HTML file without any other, which sends nothing over a network.

Inputs: what `audit --json` answers, with the rows that have a finding. Outputs: the text of the page. Its parts stand
beside this file: template, style sheet, script, and texts in English and Chinese. Its security policy lets the browser
run this script alone, and load nothing. Not here: what is a fault (`building.gates`).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from trl_sft import console, redaction

_HERE = Path(__file__).parent


def format_page(content: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        content: `data`, `rows`, `clean`, `removed`, `gates`, `statistics`, `set_findings`, `findings` (each with gate,
            row, reason and turns) and `most_findings`.

    """
    style, script = _read("page.css"), _read("page.js")
    texts = yaml.safe_load(_read("texts.yaml"))
    data = _escape({"findings": content["findings"], "gates": content["gates"], "texts": texts})
    context = {
        "texts": texts,
        "audit": content,
        "style": Markup(style),
        "style_hash": _hash(style),
        "script": Markup(script),
        "script_hash": _hash(script),
        "data": _format_json(data),
    }
    return _load_template().render(context)


def _escape(value: Any) -> Any:
    """Return texts in which characters that reorder or hide others are shown as codes, and secrets are left out."""
    if isinstance(value, str):
        return console.escape_control_characters(redaction.redact_shapes(value))
    if isinstance(value, Mapping):
        return {name: _escape(inner) for name, inner in value.items()}
    return [_escape(inner) for inner in value] if isinstance(value, list) else value


def _format_json(value: Any) -> Markup:
    """Return a value as JSON inside a script element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _hash(text: str) -> str:
    """Return what a Content-Security-Policy allows an inline script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _load_template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


@functools.cache
def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
