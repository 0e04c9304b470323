"""Secrets among the settings of another trainer: which they are, and a value without them.

Input: settings by name. Output: whether a value is a secret, what to do with it, and values without secrets. What a
secret looks like stands in `redaction`; here are the settings that hold one though their name does not say so.
Deliberately not here: screens and files, which `redaction` keeps clean of every secret that is registered.
"""

from __future__ import annotations

from typing import Any

from trl_sft import redaction

# OpenRLHF's key of wandb, and the address of a chat bot
_NAMES = ("use_wandb", "swanlab_lark_webhook_url")
_SWITCHES = ("true", "false", "none", "null")  # values of `use_wandb` that turn it on or off
# the beginning of a setting with a secret: the variable that its service reads
_VARIABLES = {
    **{"wandb": "WANDB_API_KEY", "use_wandb": "WANDB_API_KEY", "comet": "COMET_API_KEY"},
    **{"swanlab_lark": "", "swanlab": "SWANLAB_API_KEY", "ms_": "MODELSCOPE_API_TOKEN", "om_": "OPENMIND_TOKEN"},
}


def is_secret(name: object, value: Any) -> bool:
    """Return whether the value of a setting, or of a key inside one, is a secret."""
    if not isinstance(value, str) or not value or value.lower() in _SWITCHES:
        return False
    return name in _NAMES or redaction.is_secret_name(name, value)


def explain_secret(name: str) -> str:
    """Return what to do with a secret."""
    variable = next((variable for start, variable in _VARIABLES.items() if name.startswith(start)), "HF_TOKEN")
    return "A recipe holds no secret." + (f" Set {variable} before the command." if variable else "")


def register_secrets(values: Any, name: object = "") -> None:
    """Make the secrets of settings known, so that no screen and no file has them."""
    if isinstance(values, dict):
        for key, inner in values.items():
            register_secrets(inner, key)
    elif isinstance(values, list):
        for inner in values:
            register_secrets(inner, name)
    elif is_secret(name, values):
        redaction.register(values)


def strip_secrets(value: Any) -> Any:
    """Return a value without the keys whose value is a secret; in a text a sign stands in place of the secret."""
    if isinstance(value, dict):
        return {key: strip_secrets(inner) for key, inner in value.items() if not is_secret(key, inner)}
    if isinstance(value, list):
        return [strip_secrets(inner) for inner in value]
    return redaction.redact_shapes(value) if isinstance(value, str) else value
