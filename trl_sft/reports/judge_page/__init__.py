"""The page on which people judge answers: one HTML file without any other, which sends nothing over a network.

Inputs: the items of `evaluation.blind_items`. Outputs: the text of the page. Its parts stand beside this file:
template, style sheet, script, and texts in English and Chinese. Its security policy lets the browser run this script
alone, and load nothing. Not here: which items there are, and the key to them, which is no part of the page.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from trl_sft import console
from trl_sft.evaluation import blind_items, vote_files

_HERE = Path(__file__).parent


def format_page(items: Sequence[Mapping[str, Any]], page: str) -> str:
    """Return the page.

    Args:
        items: of `blind_items.build`.
        page: the name by which votes are matched with the key: `key["page"]`.

    """
    style, script = _read("page.css"), _read("page.js")
    texts = yaml.safe_load(_read("texts.yaml"))
    data = {"page": page, "format": blind_items.FORMAT, "items": [_escape(item) for item in items], "texts": texts}
    context = {
        "texts": texts,
        "count": len(items),
        "dimensions": vote_files.DIMENSIONS,
        "scores": vote_files.SCORES,
        "style": Markup(style),
        "style_hash": _hash(style),
        "script": Markup(script),
        "script_hash": _hash(script),
        "data": _format_json(data),
    }
    return _load_template().render(context)


def _escape(value: Any) -> Any:
    """Return texts in which characters that reorder or hide others are shown as codes."""
    if isinstance(value, str):
        return console.escape_control_characters(value)
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
