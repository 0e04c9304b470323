"""Pushes a folder to the hub as one commit: a finished run, a merged model, an export.

Inputs: a folder, the name of a repository. Outputs: a commit with our model card, or a refusal that says how to push
later; the folder is only read. Deliberately not here: when training pushes (`training.hub_push`).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from trl_sft import console, run_folder, user_paths
from trl_sft.errors import Fault, RecipeError, UserError
from trl_sft.publishing import base_license, card_facts, model_card, repository, selection
from trl_sft.publishing.card_facts import CardFacts
from trl_sft.publishing.repository import Repository
from trl_sft.publishing.selection import Files
from trl_sft.recipe import hub_names

_WAITS = (2.0, 8.0)  # seconds before a commit is sent again; the upload of files is retried by huggingface_hub itself
_SERVER_ERROR = 500
_BUSY = (408, 429)
_Sent = TypeVar("_Sent")


@dataclass(frozen=True)
class PushedCommit:
    """A commit on the hub."""

    repo_id: str
    url: str  # of the repository
    commit: str
    private: bool | None
    files: list[str]  # paths in the repository
    size: int  # bytes of these files
    removed: list[str]  # weights of an earlier push that this one replaces

    def as_json(self) -> dict[str, Any]:
        """Return the commit as run.json and JSON answers have it."""
        values = {"repository": self.repo_id, "url": self.url, "commit": self.commit}
        return {**values, "private": self.private, "files": self.files}

    def describe(self) -> str:
        """Return the line of the screen."""
        visibility = "private" if self.private else "public"
        text = f"{self.url} ({visibility}), commit {self.commit[:8]}: {len(self.files)} files, "
        text += console.format_bytes(self.size)
        return f"{text}; removed {', '.join(self.removed)}" if self.removed else text


@dataclass(frozen=True)
class PushContent:
    """What a folder gives to a push: its files, and the facts for their card."""

    files: Files
    facts: CardFacts


def read_content(folder: Path, *, with_rows: bool = False) -> PushContent:
    """Return what is pushed of a folder: of a run its model or adapter and its records, of an export all its formats.

    Args:
        folder: A finished run, or a folder that `merge` or `export` wrote.
        with_rows: Whether the files of a run that hold rows of the user go too (`samples.jsonl`, `rows.jsonl`, ...).

    Raises:
        RecipeError: The run is not finished, or the folder holds no model.

    """
    user_paths.check("", folder, user_paths.FOLDER)
    if not folder.is_dir():
        raise RecipeError(Fault(str(folder), "there is no such folder", "Correct the path.", code="hub.no_model"))
    outcome = run_folder.read_json(folder / run_folder.RUN).get("outcome")
    if outcome == run_folder.DONE:
        return PushContent(selection.select_run(folder, with_rows=with_rows), card_facts.read_facts(folder))
    if outcome is not None:
        problem, fix = f"the run is not finished: {outcome}", "Run its command again: it resumes. Then push."
        raise RecipeError(Fault(str(folder), problem, fix, code="hub.unfinished_run"))
    names = (selection.EXPORT_RECORD, selection.MERGE_RECORD)
    record = next(filter(None, (run_folder.read_json(folder / name) for name in names)), None)
    if record is None:
        problem = "the folder is neither a run nor what `merge` or `export` wrote"
        raise RecipeError(Fault(str(folder), problem, "Name the folder of a finished run.", code="hub.no_model"))
    files = selection.select_export(folder)
    run = Path(str(record.get("run") or folder))
    facts = card_facts.read_facts(run if run.is_dir() else folder)
    is_adapter = run_folder.ADAPTER_CONFIG in files
    facts = dataclasses.replace(facts, is_adapter=is_adapter, export=record, export_files=tuple(sorted(files)))
    return PushContent(files, facts)


def find_target(where: str, repo: str, *, private: bool | None = None) -> Repository:
    """Return the repository that a name means, if the token of this machine may write there; create nothing.

    Args:
        where: The option that names the repository, for messages.
        repo: `OWNER/NAME`, or `NAME` for the owner of the token.
        private: Whether a new repository is private; None = the owner's default.

    Raises:
        UserError: The name cannot be one, or the hub refuses or cannot be reached.

    """
    if fault := hub_names.check(where, repo):
        raise RecipeError(fault)
    repository.check_token(where)
    return repository.inspect(where, repo, private=private)


def push(content: PushContent, target: Repository) -> PushedCommit:
    """Push to the hub in one commit, with a model card: the repository is created where it does not exist.

    Weights of an earlier push that would be loaded beside the new ones are removed in the same commit.

    Args:
        content: That `read_content` returned.
        target: That `find_target` returned.

    Raises:
        LaunchError: The hub refuses, or cannot be reached.

    """
    target = repository.create(target)
    files = content.files | {run_folder.CARD: write_card(content.facts, target)}
    return commit(target, files, f"Model trained by trl_sft: {content.facts.name}")


def write_card(facts: CardFacts, target: Repository) -> bytes:
    """Return the model card for a repository, with the license of the base model where the hub knows it."""
    license_of_base = base_license.find_license(facts.base, is_online=True, token=target.token)
    return model_card.write_model_card(facts, repo_id=target.repo_id, base_license=license_of_base).encode()


def commit(
    target: Repository,
    files: Files,
    message: str,
    *,
    revision: str | None = None,
    replaces_weights: bool = True,
) -> PushedCommit:
    """Upload files in one commit; a commit that the hub does not answer is sent again.

    Args:
        target: A repository that exists.
        files: By their path in it.
        message: Of the commit.
        revision: The branch; None = the main branch.
        replaces_weights: Whether weights of an earlier push that are not among the files are removed.

    Raises:
        LaunchError: The hub refuses, or cannot be reached.

    """
    api = HfApi(token=target.token)

    def send() -> tuple[CommitInfo, list[str]]:
        stale: list[str] = []
        if replaces_weights:
            stale = selection.find_stale_weights(files, api.list_repo_files(target.repo_id, revision=revision))
        operations = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
        deletions = [CommitOperationDelete(path) for path in stale]
        info = api.create_commit(target.repo_id, [*operations, *deletions], commit_message=message, revision=revision)
        return info, stale

    try:
        with _without_hints():
            info, stale = _retry(send)
    except UserError:
        raise
    except Exception as error:
        raise repository.translate_error(target.where, target.repo_id, error) from error
    size = sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in files.values())
    return PushedCommit(target.repo_id, target.url, info.oid, target.private, sorted(files), size, stale)


def _retry(send: Callable[[], _Sent]) -> _Sent:
    """Call a function again where the hub was busy or the connection broke."""
    for wait in _WAITS:
        try:
            return send()
        except Exception as error:
            if not _is_transient(error):
                raise
            time.sleep(wait)
    return send()


def _is_transient(error: BaseException) -> bool:
    """Tell whether the same request may succeed later: a broken connection, or a server that is busy."""
    status = repository.find_status(error)
    if status is not None:
        return status >= _SERVER_ERROR or status in _BUSY
    return repository.is_of_transport(error)


@contextmanager
def _without_hints() -> Iterator[None]:
    """Keep huggingface_hub from logging each retry and commits without a change; the screen says what came out."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
