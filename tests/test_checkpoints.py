"""Which checkpoints are whole: the record that this package writes, and each kind of damage."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trl_sft import checkpoints


def make_checkpoint(folder, step, *, record=True, weights_only=False):
    """Write a small checkpoint as the Trainer does, and its record; return the folder."""
    path = Path(folder) / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"w": torch.full((8,), float(step))}, path / "model.safetensors")
    if not weights_only:
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"state": torch.zeros(64)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if record:
        checkpoints.write_record(path, {"fingerprint": "f"})
    return path


def cut(path):
    """Remove the second half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def test_whole_checkpoint_has_no_damage_and_its_record_names_every_file(tmp_path):
    path = make_checkpoint(tmp_path, 4)
    assert checkpoints.find_damage(path) == ""
    record = checkpoints.read_record(path)
    assert record["fingerprint"] == "f"
    assert sorted(record["files"]) == sorted(FILES)
    assert record["files"]["optimizer.pt"]["bytes"] == (path / "optimizer.pt").stat().st_size


def empty(path):
    path.write_bytes(b"")


def link_to_nothing(path):
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, empty, Path.unlink, link_to_nothing, replace_by_folder])
def test_file_that_is_cut_off_or_missing_is_named(damage, name, record, tmp_path):
    path = make_checkpoint(tmp_path, 4, record=record)
    damage(path / name)
    text = checkpoints.find_damage(path)
    assert text
    if name != "model.safetensors" or record:
        assert name.partition(".")[0] in text


@pytest.mark.parametrize("name", FILES)
def test_file_with_one_changed_byte_is_named(name, tmp_path):
    path = make_checkpoint(tmp_path, 4)
    flip(path / name)
    assert checkpoints.find_damage(path) == f"{name} has other contents than when it was saved"
    assert checkpoints.find_damage(path, read_contents=False) in ("", "trainer_state.json cannot be read")


def test_changed_byte_in_a_state_without_record_is_found_by_the_check_sums_of_its_archive(tmp_path):
    path = make_checkpoint(tmp_path, 4, record=False)
    with zipfile.ZipFile(path / "optimizer.pt") as archive:
        info = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray((path / "optimizer.pt").read_bytes())
    content[info.header_offset + 200] ^= 1
    (path / "optimizer.pt").write_bytes(content)
    assert checkpoints.find_damage(path) == "optimizer.pt cannot be read"


@pytest.mark.parametrize(
    "content", [None, "", "{}", "[]", "null", "[" * 100_000, '{"files": 3}', '{"files": {"a": 1}}']
)
def test_record_that_cannot_be_read_is_damage(content, tmp_path):
    path = make_checkpoint(tmp_path, 4)
    record = path / checkpoints.RECORD
    record.write_text(record.read_text()[:200] if content is None else content)
    assert checkpoints.find_damage(path).startswith("trl_sft.json ")


def test_changed_character_of_a_record_is_damage(tmp_path):
    path = make_checkpoint(tmp_path, 4)
    record, before = path / checkpoints.RECORD, checkpoints.read_record(path)
    text = record.read_text()
    for position in range(len(text)):
        record.write_text(text[:position] + chr(ord(text[position]) ^ 1) + text[position + 1 :])
        damage = checkpoints.find_damage(path, read_contents=False)
        assert damage.startswith("trl_sft.json ") or checkpoints.read_record(path) == before, position


@pytest.mark.parametrize(
    "name",
    [
        *("pytorch_model.bin", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "scaler.pt"),
        *("adapter_model.safetensors", "adapter_config.json", "rng_state_0.pth", "optimizer.bin", "global_step4/a"),
    ],
)
def test_added_file_that_would_be_read_is_named(name, tmp_path):
    path = make_checkpoint(tmp_path, 4)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(b"x")
    assert checkpoints.find_damage(path) == f"{name.partition('/')[0]} was added after it was saved"


def test_added_file_that_nothing_reads_is_no_damage(tmp_path):
    path = make_checkpoint(tmp_path, 4)
    for name in ("notes.txt", ".DS_Store", "eval_results.json", "optimizer.pt.bak"):
        (path / name).write_text("{}")
    assert checkpoints.find_damage(path) == ""


def test_link_to_the_same_contents_is_no_damage_and_to_other_contents_is(tmp_path):
    path, elsewhere = make_checkpoint(tmp_path, 4), tmp_path / "optimizer.pt"
    (path / "optimizer.pt").rename(elsewhere)
    (path / "optimizer.pt").symlink_to(elsewhere)
    assert checkpoints.find_damage(path) == ""
    flip(elsewhere)
    assert checkpoints.find_damage(path) == "optimizer.pt has other contents than when it was saved"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_file_or_link_with_the_name_of_a_checkpoint_is_removed_and_not_followed(kind, tmp_path):
    (tmp_path / "out").mkdir()
    other = make_checkpoint(tmp_path, 9)
    (other / checkpoints.RECORD).unlink()
    (other / "trainer_state.json").unlink()
    path = tmp_path / "out" / "checkpoint-8"
    if kind == "file":
        path.write_text("x")
    else:
        path.symlink_to(other)
    make_checkpoint(tmp_path / "out", 4)
    choice = checkpoints.choose(tmp_path / "out")
    assert choice.newest == tmp_path / "out" / "checkpoint-4"
    checkpoints.set_aside(choice)
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["checkpoint-4"]
    assert (other / "model.safetensors").is_file()


def test_newest_whole_checkpoint_is_chosen_and_newer_ones_are_named(tmp_path):
    for step in (2, 4, 10, 12):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-14").mkdir()
    (tmp_path / "checkpoint-14" / "model.safetensors").write_bytes(b"")
    cut(tmp_path / "checkpoint-12" / "optimizer.pt")
    choice = checkpoints.choose(tmp_path)
    assert choice.newest == tmp_path / "checkpoint-10"
    assert [item.path.name for item in choice.damaged] == ["checkpoint-12"]
    assert choice.unfinished == (tmp_path / "checkpoint-14",)


def write_run(folder):
    """Write run.json as a version does that writes records."""
    (folder / "run.json").write_text(json.dumps({checkpoints.ROWS_PER_STEP: 2}))


def test_newest_checkpoint_without_a_record_is_unfinished_and_several_without_one_are_damaged(tmp_path):
    for step in (2, 4, 6):
        make_checkpoint(tmp_path, step, record=step != 6)
    write_run(tmp_path)
    assert checkpoints.choose(tmp_path) == (tmp_path / "checkpoint-4", (), (tmp_path / "checkpoint-6",))
    (tmp_path / "checkpoint-4" / checkpoints.RECORD).unlink()
    choice = checkpoints.choose(tmp_path)
    assert choice.newest == tmp_path / "checkpoint-2"
    assert [(item.path.name, item.damage) for item in choice.damaged] == [
        ("checkpoint-6", "trl_sft.json is missing"),
        ("checkpoint-4", "trl_sft.json is missing"),
    ]
    assert choice.unfinished == ()


@pytest.mark.parametrize(
    ("outcome", "log", "is_damaged"),
    [
        ("running", "", False),
        ("running", '{"loss": 1.0, "step": 4}\n', False),
        ("running", '{"loss": 1.0, "step": 5}\n{"loss"', True),
        ("stopped by SIGTERM after step 4 of 9; saved in out/checkpoint-4\nTo resume: x", "", True),
        ("stopped by SIGTERM after step 40 of 90; saved in out/checkpoint-40\nTo resume: x", "", False),
        ("the disk is full: out/checkpoint-4/optimizer.pt", "", False),
    ],
)
def test_only_checkpoint_without_a_record_is_damaged_if_the_run_went_on_after_it(tmp_path, outcome, log, is_damaged):
    path = make_checkpoint(tmp_path, 4, record=False)
    (tmp_path / "run.json").write_text(json.dumps({checkpoints.ROWS_PER_STEP: 2, "outcome": outcome}))
    (tmp_path / "log.jsonl").write_text(log)
    choice = checkpoints.choose(tmp_path)
    assert choice.newest is None
    assert [item.path for item in choice.damaged] == [path] * is_damaged
    assert list(choice.unfinished) == [path] * (not is_damaged)


def test_damaged_checkpoint_is_set_aside_under_another_name_and_an_unfinished_one_is_removed(tmp_path):
    make_checkpoint(tmp_path, 2)
    (make_checkpoint(tmp_path, 4) / "scheduler.pt").unlink()
    (tmp_path / "checkpoint-6").mkdir()
    checkpoints.set_aside(checkpoints.choose(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "damaged-checkpoint-4"]


def test_checkpoint_of_weights_only_is_told_from_a_damaged_one(tmp_path):
    assert checkpoints.is_weights_only(make_checkpoint(tmp_path, 2, weights_only=True))
    whole = make_checkpoint(tmp_path, 4)
    assert not checkpoints.is_weights_only(whole)
    (whole / "optimizer.pt").unlink()
    assert not checkpoints.is_weights_only(whole)


def test_folder_without_checkpoints_has_no_choice(tmp_path):
    assert checkpoints.choose(tmp_path) == checkpoints.Choice(None, (), ())
    assert checkpoints.choose(tmp_path / "missing").newest is None
