"""Asks the hub whether it knows an id, before anything heavy, and without half a minute of retries.

In: an id. Out: whether the hub answered. Where it cannot be reached, upstream's libraries are told so
once, and take what the cache holds.
"""

from __future__ import annotations

from typing import Any

import datasets
from huggingface_hub import HfApi, constants, errors

from trl_sft import console
from trl_sft.errors import Fault, RecipeError, Unreached, UserError

_PATIENCE = 10.0  # seconds for the hub to answer


def disable_telemetry() -> None:
    """Turn TRL's pings off, also where the libraries were imported before us."""
    constants.HF_HUB_DISABLE_TELEMETRY = True


def check_id(kind: str, name: str, keywords: dict[str, Any]) -> bool:
    """Tell whether the hub was reached and knows `name` (kind: model, dataset).

    `keywords` may hold revision and token. Raises what huggingface_hub raises when the hub says no.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    asked = {word: keywords[word] for word in ("revision", "token") if word in keywords}
    try:
        getattr(HfApi(), f"{kind}_info")(name, timeout=_PATIENCE, **asked)
    except (errors.HfHubHTTPError, errors.HFValidationError):
        raise
    except Exception:  # the transport's own errors, whichever library that is
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        console.say(f"the hub cannot be reached; {name} is looked for in the cache")
        return False
    return True


def translate_error(where: str, name: str, error: BaseException) -> UserError | None:
    """Return our error for one of the hub's; None where it is another's."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 9:
        chain.append(cause)

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if is_a(errors.GatedRepoError):
        write = "a token that may read it: hf auth login, after asking on its page"
        return RecipeError(Fault(where, f"{name}: gated on the hub", write))
    if is_a(errors.RevisionNotFoundError):
        write = "revision: a branch, a tag or a commit of it"
        return RecipeError(Fault(where, f"{name}: the hub knows no such revision", write))
    if is_a(errors.RepositoryNotFoundError, errors.HFValidationError):
        write = "an id that exists, or ./PATH for a path"
        return RecipeError(Fault(where, f"{name}: no path here, and the hub knows no such id", write))
    if is_a(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        found = f"{name}: no path here, not in the cache, and the hub cannot be reached"
        return Unreached(Fault(where, found, "an existing path, or try again with a connection"))
    return None
