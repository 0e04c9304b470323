"""The license of a base model, as its own card has it.

Inputs: the base model. Outputs: the entries of its card about the license. Deliberately not here: what a license
allows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache

from trl_sft import run_folder
from trl_sft.publishing.card_facts import is_hub_id, read_front_matter

_KEYS = ("license", "license_name", "license_link")
_TIMEOUT = 10.0  # seconds for the hub to answer


def find_license(base: str, *, is_online: bool, token: str | None = None) -> dict[str, str]:
    """Return `license`, `license_name` and `license_link` of a base model; empty = they are not known.

    Args:
        base: A hub id, or the path of a folder.
        is_online: Whether the hub may be asked; otherwise only the cache of its files is read.
        token: For the hub; None = the one of this machine.

    """
    if base and Path(base).is_dir():
        return _select_license(_read_card(Path(base) / run_folder.CARD))
    if not is_hub_id(base):
        return {}
    cached = try_to_load_from_cache(base, run_folder.CARD)
    if isinstance(cached, str) and (known := _select_license(_read_card(Path(cached)))):
        return known
    if not is_online:
        return {}
    try:
        card = HfApi().model_info(base, timeout=_TIMEOUT, token=token).card_data
    except Exception:  # whatever keeps the hub from answering: the card then has no license
        return {}
    return _select_license(card.to_dict() if card else {})


def _read_card(path: Path) -> dict[str, Any]:
    """Return the front matter of a card; empty if there is none."""
    try:
        return read_front_matter(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}
    except OSError:
        return {}


def _select_license(card: dict[str, Any]) -> dict[str, str]:
    """Return the entries of a card about the license; of several licenses none, since the hub takes one."""
    return {key: card[key] for key in _KEYS if isinstance(card.get(key), str) and card[key]}
