"""A repository or a bucket of the hub as a storage: `hf://OWNER/NAME/PATH`, `hf://datasets/...`, `hf://buckets/...`.

Inputs: a URL. Outputs: files there; all files of a copy are one commit, sent from where they lie. The file system of
huggingface_hub alone would make a commit of each file, of which the hub takes a limited number in an hour, and would
copy each to the temporary folder first. Not here: other storages (`storage`), a push of the finished model
(`publishing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trl_sft.mirroring.storage import FileDigest, Storage, digest_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class HubStorage(Storage):
    """The folder at a URL of the hub."""

    def upload_files(self, folder: str, files: Mapping[str, Path], *, count: Callable[[int], None]) -> list[FileDigest]:
        """Copy files into a folder in one commit, and compare each copy with its file. Raises DamagedCopy."""
        from huggingface_hub import CommitOperationAdd

        names = [f"{folder}/{name}" for name in files]
        digests = [digest_file(path) for path in files.values()]
        place = self._files.resolve_path(self._join(folder))
        inside = [f"{place.path}/{name}".strip("/") for name in files]
        pairs = list(zip(files.values(), inside, strict=True))
        if _is_bucket(place):
            for path, name in pairs:  # not a transaction, so nothing is gained by one call
                self._api.batch_bucket_files(place.bucket_id, add=[(path, name)])
                count(path.stat().st_size)
        else:
            where = {"repo_id": place.repo_id, "repo_type": place.repo_type, "revision": place.revision}
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for path, name in pairs]
            for operation, (path, _) in zip(operations, pairs, strict=True):  # a large file is sent before the commit
                self._api.preupload_lfs_files(additions=[operation], **where)
                count(path.stat().st_size)
            self._api.create_commit(operations=operations, commit_message=f"Mirror of {folder}", **where)
        for name, digest in zip(names, digests, strict=True):
            self.verify(name, digest)
        return digests

    def is_public(self) -> bool:
        """Tell whether everybody can read the repository or the bucket."""
        place = self._files.resolve_path(self._root)
        if _is_bucket(place):
            return not self._api.bucket_info(place.bucket_id).private
        return not self._api.repo_info(place.repo_id, repo_type=place.repo_type).private

    @property
    def _api(self) -> HfApi:
        """The client of the hub, with the account of the file system."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self._files.endpoint, token=self._files.token)


def _is_bucket(place: object) -> bool:
    """Tell whether a place on the hub is in a bucket, which has no commits."""
    return hasattr(place, "bucket_id")
