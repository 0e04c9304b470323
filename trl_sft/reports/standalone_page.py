"""A page in one HTML file without any other, whose script alone may run and which loads nothing over a network.

Inputs: a folder with template, style sheet, script and texts in English and Chinese; what the template and the script
show. Outputs: the text of the page. Not here: what the pages show (`judge_page`, `audit_page`).
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


def format_page(folder: Path, context: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Return a page.

    Args:
        folder: has page.html.jinja, page.css, page.js and texts.yaml.
        context: what the template shows beside the texts.
        data: what the script shows beside the texts: a value of JSON.

    """
    style, script = _read(folder / "page.css"), _read(folder / "page.js")
    texts = yaml.safe_load(_read(folder / "texts.yaml"))
    parts = {
        "texts": texts,
        "style": Markup(style),
        "style_hash": _hash(style),
        "script": Markup(script),
        "script_hash": _hash(script),
        "data": _format_json({**data, "texts": texts}),
    }
    return load_template(folder).render({**context, **parts})


@functools.cache
def load_template(folder: Path) -> jinja2.Template:
    """Return page.html.jinja of a folder; every value that it shows is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def escape_texts(value: Any, *, without_secrets: bool) -> Any:
    """Return texts in which characters that reorder or hide others are shown as codes.

    Args:
        value: a value of JSON.
        without_secrets: leave out what looks like a secret key.

    """
    if isinstance(value, str):
        return console.escape_control_characters(redaction.redact_shapes(value) if without_secrets else value)
    if isinstance(value, Mapping):
        return {name: escape_texts(inner, without_secrets=without_secrets) for name, inner in value.items()}
    if isinstance(value, list):
        return [escape_texts(inner, without_secrets=without_secrets) for inner in value]
    return value


def _format_json(value: Any) -> Markup:
    """Return a value as JSON inside a script element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _hash(text: str) -> str:
    """Return what a Content-Security-Policy allows an inline script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
