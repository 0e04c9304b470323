"""The repository on the hub that a model is pushed to: its name, whether the token may write there, who sees it.

Inputs: a name as a user writes it, and a token. Outputs: a `Repository`; refusals with what to write instead. Nothing
is created before `create`. Deliberately not here: which files go there (`selection`), and the upload (`upload`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, constants, errors, get_token

from trl_sft import suggestions
from trl_sft.errors import Fault, LaunchError, UserError, first_line

_TIMEOUT = 10.0  # seconds for the hub to answer
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2")  # of huggingface_hub 1.x and 2.x
_MAX_CAUSES = 9  # exceptions behind an exception that are looked at
_FORBIDDEN = 403
_UNAUTHORIZED = 401
_WRITES = "`hf auth login` with a token of the role `write`"


@dataclass(frozen=True)
class Repository:
    """A model repository on the hub."""

    repo_id: str  # OWNER/NAME
    private: bool | None  # None = as the owner's default is: public, unless an organization says otherwise
    exists: bool = False
    token: str | None = None  # None = the one of this machine
    where: str = ""  # the key or option that names it, for messages

    @property
    def url(self) -> str:
        """Its page."""
        return f"{constants.ENDPOINT}/{self.repo_id}"

    @property
    def visibility(self) -> str:
        """Who sees it, in words."""
        words = {True: "private", False: "public", None: "public, unless its owner's default is private"}
        return words[self.private]


def check_token(where: str, token: str | None = None) -> None:
    """Refuse a push while the machine is offline, or without a token. Raises LaunchError."""
    if constants.HF_HUB_OFFLINE:
        problem = "the model cannot be pushed to the hub while HF_HUB_OFFLINE is set"
        fix = f"Unset HF_HUB_OFFLINE.{_advise_later(where)}"
        raise LaunchError(Fault(where, problem, fix, code="hub.offline"))
    if not (token or get_token()):
        fix = "Run `hf auth login`, or set HF_TOKEN."
        problem = "the model cannot be pushed to the hub without a token"
        raise LaunchError(Fault(where, problem, fix, code="hub.no_token"))


def inspect(where: str, name: str, *, private: bool | None, token: str | None = None) -> Repository:
    """Ask the hub whose token this is, whether it may write, and whether the repository exists; create nothing.

    Args:
        where: The key or option that names it, for messages.
        name: That `recipe.hub_names.check` accepts.
        private: Whether a new repository is private; None = the owner's default. Of one that exists it is ignored.
        token: For the hub; None = the one of this machine.

    Raises:
        LaunchError: The token is refused or may not write there, or the hub cannot be reached.

    """
    api = HfApi(token=token)
    try:
        account = api.whoami()
        repo_id = name if "/" in name else f"{account['name']}/{name}"
        _check_access(where, repo_id, account)
        try:
            info = api.model_info(repo_id, timeout=_TIMEOUT)
        except errors.RepositoryNotFoundError:
            return Repository(repo_id, private, token=token, where=where)
    except UserError:
        raise
    except Exception as error:
        raise translate_error(where, name, error) from error
    if private is not None and private != bool(info.private):
        there, wanted = ("private", "public") if info.private else ("public", "private")
        problem = f"{repo_id} exists and is {there}; a push does not make it {wanted}"
        fix = f"Make it {wanted} in its settings on the hub, or write the name of a new repository."
        raise LaunchError(Fault(where, problem, fix, code="hub.other_visibility"))
    return Repository(repo_id, bool(info.private), exists=True, token=token, where=where)


def create(repository: Repository, *, revision: str | None = None) -> Repository:
    """Create a repository on the hub where it does not exist, with its branch; return it as it is there.

    Args:
        repository: That `inspect` returned.
        revision: A branch; None = the main branch.

    Raises:
        LaunchError: The hub refuses, or cannot be reached.

    """
    api = HfApi(token=repository.token)
    try:
        if not repository.exists:
            api.create_repo(repository.repo_id, private=repository.private, exist_ok=True)
            info = api.model_info(repository.repo_id, timeout=_TIMEOUT)
            repository = dataclasses.replace(repository, exists=True, private=bool(info.private))
        if revision and revision != constants.DEFAULT_REVISION:
            api.create_branch(repository.repo_id, branch=revision, exist_ok=True)
    except Exception as error:
        raise translate_error(repository.where, repository.repo_id, error) from error
    return repository


def translate_error(where: str, name: str, error: BaseException) -> LaunchError:
    """Return our error for one of the hub or of the transport, with what to do."""
    status = find_status(error)
    if status == _UNAUTHORIZED:
        problem = f"{constants.ENDPOINT} refuses the token: it is not valid, or no longer"
        fix = f"Run {_WRITES}, or set HF_TOKEN; HF_TOKEN comes before what `hf auth login` stored."
        return LaunchError(Fault(where, problem, fix, code="hub.refused_token"))
    if status == _FORBIDDEN:
        problem = f"the token may not write to {name}"
        fix = f"Run {_WRITES} that includes this repository, or write another OWNER/NAME."
        return LaunchError(Fault(where, problem, fix, code="hub.no_write_access"))
    if isinstance(error, errors.RevisionNotFoundError):
        fix = "Set `train.hub_revision` to a branch."
        return LaunchError(Fault(where, f"{name} has no such revision", fix, code="hub.unknown_revision"))
    if status is not None:
        problem = f"the hub refuses {name}: {first_line(error)}"
        fix = "Read what the hub says, and try again later."
        return LaunchError(Fault(where, problem, fix, code="hub.push_refused"))
    if not is_of_transport(error):
        texts = dict.fromkeys(first_line(link) for link in (error, _list_causes(error)[-1]))
        problem = f"the push to {name} failed: {': '.join(texts)}"
        return LaunchError(Fault(where, problem, "Correct this, and push again.", code="hub.push_failed"))
    problem = f"{constants.ENDPOINT} cannot be reached ({first_line(error)})"
    fix = f"Try again with a connection.{_advise_later(where)}"
    return LaunchError(Fault(where, problem, fix, code="hub.push_unreachable"))


def _advise_later(where: str) -> str:
    """Return how a run trains without the hub; "" for a command that only pushes."""
    is_option = where.startswith("--")
    return "" if is_option else " Or train without `train.push_to_hub`, and push the run folder later."


def find_status(error: BaseException) -> int | None:
    """Return the HTTP status of an error, or of those behind it; None = the hub did not answer."""
    for link in _list_causes(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def is_of_transport(error: BaseException) -> bool:
    """Tell whether an error is one of the connection, whichever library reports it."""
    return any(
        isinstance(link, ConnectionError | TimeoutError) or type(link).__module__.partition(".")[0] in _TRANSPORTS
        for link in _list_causes(error)
    )


def _list_causes(error: BaseException) -> list[BaseException]:
    """Return an error and those behind it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < _MAX_CAUSES:
        chain.append(cause)
    return chain


def _check_access(where: str, repo_id: str, account: Mapping[str, Any]) -> None:
    """Refuse a token that may only read, and an owner that is neither its user nor one of its organizations."""
    access = (account.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        problem = f"the token {access.get('displayName') or 'of this machine'} may only read"
        raise LaunchError(Fault(where, problem, f"Run {_WRITES}.", code="hub.no_write_access"))
    owner = repo_id.partition("/")[0]
    organizations = account.get("orgs")
    if owner == account.get("name") or not isinstance(organizations, list):
        return
    roles = {str(entry.get("name")): entry.get("roleInOrg") for entry in organizations if isinstance(entry, Mapping)}
    if owner in roles and roles[owner] != "read":
        return
    if owner in roles:
        problem = f"{account.get('name')} may only read in the organization {owner}"
    else:
        problem = f"the token belongs to {account.get('name')}, who is no member of {owner}"
    writable = [str(account.get("name")), *(name for name, role in roles.items() if role != "read")]
    nearest = suggestions.nearest_name(owner, writable, cutoff=suggestions.LOOSE) or writable[0]
    fix = f"Write `{nearest}/{repo_id.partition('/')[2]}`, or run {_WRITES} of {owner}."
    raise LaunchError(Fault(where, problem, fix, code="hub.no_write_access"))
