"""The commit of a folder, compared with what git itself says."""

import subprocess

import pytest

from trl_sft.training.git_commit import find_commit


def git(folder, *words):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "protocol.file.allow=always"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", ".")
    (folder / "recipe.yaml").write_text("x: 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_commit_is_the_one_that_git_says(repository):
    assert find_commit(repository) == git(repository, "rev-parse", "HEAD")


def test_commit_is_found_from_a_folder_below(repository):
    (repository / "a/b").mkdir(parents=True)
    assert find_commit(repository / "a/b") == git(repository, "rev-parse", "HEAD")


def test_commit_of_a_detached_head(repository):
    git(repository, "commit", "--allow-empty", "-qm", "second")
    git(repository, "checkout", "-q", "HEAD~1")
    assert find_commit(repository) == git(repository, "rev-parse", "HEAD")


def test_commit_of_packed_references(repository):
    git(repository, "branch", "feature/one")
    git(repository, "pack-refs", "--all")
    assert find_commit(repository) == git(repository, "rev-parse", "HEAD")


def test_commit_of_a_linked_worktree(repository, tmp_path):
    git(repository, "worktree", "add", "-qb", "other", str(tmp_path / "linked"))
    git(tmp_path / "linked", "commit", "--allow-empty", "-qm", "second")
    assert find_commit(tmp_path / "linked") == git(tmp_path / "linked", "rev-parse", "HEAD")
    assert find_commit(tmp_path / "linked") != find_commit(repository)


def test_commit_of_a_submodule(repository, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q", ".")
    git(outer, "submodule", "-q", "add", str(repository), "inner")
    assert find_commit(outer / "inner") == git(outer / "inner", "rev-parse", "HEAD")


def test_repository_without_a_commit_and_no_repository_have_none(tmp_path):
    assert find_commit(tmp_path) is None
    git(tmp_path, "init", "-q", ".")
    assert find_commit(tmp_path) is None


@pytest.mark.parametrize(
    "head", ["", "ref: ", "ref: ../../../etc/passwd", "ref: refs/heads/../../x", "zzz", "\0", "ref: refs/\0"]
)
def test_broken_head_is_no_commit(repository, head):
    (repository / ".git/HEAD").write_text(head)
    assert find_commit(repository) is None


@pytest.mark.parametrize("key", ["core.fsmonitor", "filter.x.clean", "diff.external", "core.pager", "core.sshCommand"])
def test_program_that_the_repository_configures_is_not_run(repository, key):
    (repository / "evil.sh").write_text(f'#!/bin/sh\ntouch "{repository}/RAN"\n')
    (repository / "evil.sh").chmod(0o755)
    (repository / ".gitattributes").write_text("* filter=x\n")
    git(repository, "config", key, str(repository / "evil.sh"))
    (repository / "recipe.yaml").write_text("x: 2\n")
    assert find_commit(repository)
    assert not (repository / "RAN").exists()
