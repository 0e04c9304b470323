"""Asks the hub whether it knows an id, before anything heavy, and without half a minute of retries.

Inputs: an id.
Outputs: whether the hub answered; our faults for its errors. Where the hub cannot be reached, upstream's libraries are
switched to offline mode, and take what the cache holds.
Not here: downloads.
"""

from __future__ import annotations

from typing import Any

import datasets
from huggingface_hub import HfApi, constants, errors

from trl_sft import console
from trl_sft.errors import Fault, RecipeError, Unreached, UserError

_TIMEOUT = 10.0  # seconds for the hub to answer
_MAX_CAUSES = 9  # exceptions behind an exception that are looked at


def disable_telemetry() -> None:
    """Switch off TRL's telemetry, also where the libraries were imported before us."""
    constants.HF_HUB_DISABLE_TELEMETRY = True


def check_id(kind: str, name: str, keywords: dict[str, Any]) -> bool:
    """Tell whether the hub was reached and knows an id.

    Args:
        kind: "model" or "dataset".
        name: The id.
        keywords: Keyword arguments of the loading function, of which `revision` and `token` are used.

    Returns:
        False if the hub cannot be reached, or offline mode is on.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: The hub refuses.
        huggingface_hub.errors.HFValidationError: The name cannot be an id.

    """
    if constants.HF_HUB_OFFLINE:
        return False
    used = {word: keywords[word] for word in ("revision", "token") if word in keywords}
    try:
        getattr(HfApi(), f"{kind}_info")(name, timeout=_TIMEOUT, **used)
    except (errors.HfHubHTTPError, errors.HFValidationError):
        raise
    except Exception:  # the errors of the transport, whichever library that is
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        console.say(f"The hub cannot be reached. {name} is looked up in the cache.")
        return False
    return True


def translate_error(where: str, name: str, error: BaseException) -> UserError | None:
    """Return our error for an error of the hub; None for any other error."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < _MAX_CAUSES:
        chain.append(cause)

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if is_a(errors.GatedRepoError):
        fix = "Ask for access on its page on the hub, then run `hf auth login` with a token that has it."
        return RecipeError(Fault(where, f"{name}: access to this repository is restricted", fix, code="hub.gated"))
    if is_a(errors.RevisionNotFoundError):
        problem = f"{name}: the hub has no such revision of it"
        return RecipeError(
            Fault(where, problem, "Set `revision` to a branch, a tag or a commit of it.", code="hub.unknown_revision")
        )
    if is_a(errors.RepositoryNotFoundError, errors.HFValidationError):
        problem = f"{name}: there is no such path here, and no such id on the hub"
        return RecipeError(
            Fault(where, problem, "Correct the id. A path starts with ./ or is absolute.", code="hub.unknown_id")
        )
    if is_a(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        problem = f"{name}: there is no such path here, it is not in the cache, and the hub cannot be reached"
        return Unreached(
            Fault(
                where,
                problem,
                "Name a path that exists, or try again with a connection to the hub.",
                code="hub.unreachable",
            )
        )
    return None
