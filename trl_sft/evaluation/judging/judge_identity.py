"""Whether a judge is the model that it would judge, or of its family: models prefer their own words.

Inputs: the name or the folder of the judge, and facts of both sides. Outputs: a fault, or a warning. Self-preference
was measured at 10% for GPT-4 and 25% for Claude-v1 (Zheng et al. 2023, arXiv 2306.05685, section 3.3). Its name is all
that is known of a model behind an endpoint. Not here: what a judge says (`judge_result`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trl_sft import run_folder
from trl_sft.errors import Fault, RecipeError
from trl_sft.model import base_digest

_CONFIG = "config.json"
_FAMILIES = (
    *("llama", "qwen", "mistral", "mixtral", "gemma", "gemini", "phi", "smollm", "deepseek", "glm", "yi", "gpt"),
    *("claude", "falcon", "olmo", "granite", "command", "internlm", "baichuan", "minicpm", "kimi", "hunyuan", "ernie"),
)
_ALIKE = {"mixtral": "mistral", "gemini": "gemma", "vicuna": "llama"}


@dataclass(frozen=True)
class JudgedModel:
    """One of the models whose answers are judged.

    Attributes:
        role: `the tuned model` or `the base model`.
        names: by which it is known: a hub id, the name of a folder, the name at a server.
        folder: where it is on this machine; None = unknown.
        digest: of its configuration and a sample of its weights; "" = unknown.

    """

    role: str
    names: tuple[str, ...]
    folder: Path | None = None
    digest: str = ""


def check_judge(judge: str, folder: Path | None, models: list[JudgedModel]) -> list[str]:
    """Return warnings about a judge.

    Args:
        judge: its name, or its path.
        folder: of a judge on this machine; None = it is behind an endpoint.
        models: whose answers are judged.

    Raises:
        RecipeError: the judge is one of them.

    """
    digest = base_digest.compute_digest(str(folder)) or "" if folder is not None else ""
    for model in models:
        if _is_same(model, judge, folder, digest=digest):
            problem = f"the judge {judge} is {model.role}: a model prefers its own answers"
            fix = "Name a judge of another family."
            raise RecipeError(Fault("--model", problem, fix, code="judge.is_student"))
    family = find_family(judge, folder)
    alike = [
        model.role for model in models if family and family in {find_family(name, model.folder) for name in model.names}
    ]
    if not alike:
        return []
    return [f"the judge is of the family of {' and '.join(alike)} ({family}), so it may prefer their style"]


def find_family(name: str, folder: Path | None) -> str:
    """Return the family of a model: by its name, else the `model_type` of its configuration; "" = unknown."""
    words = re.findall(r"[a-z]+", name.rstrip("/").rpartition("/")[2].casefold())
    for family in (*_FAMILIES, *_ALIKE):
        if any(word == family or (len(family) > 3 and family in word) for word in words):
            return _ALIKE.get(family, family)
    kind = run_folder.read_json(folder / _CONFIG).get("model_type") if folder is not None else None
    kind = re.sub(r"[\d_.].*", "", str(kind or "")).casefold()
    return _ALIKE.get(kind, kind)


def _is_same(model: JudgedModel, judge: str, folder: Path | None, *, digest: str) -> bool:
    """Tell whether a judge is a model: the same name, folder or weights."""
    if folder is None:
        return _simplify(judge) in {_simplify(name) for name in model.names if name}
    if model.folder is not None and model.folder.exists() and folder.resolve() == model.folder.resolve():
        return True
    return bool(digest) and digest == model.digest


def _simplify(name: str) -> str:
    """Return a name without its owner, folder, case and marks: `Qwen/Qwen2.5-7B` and `qwen2.5:7b` are the same."""
    return re.sub(r"[^a-z0-9]", "", name.rstrip("/").rpartition("/")[2].casefold())
