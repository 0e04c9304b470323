"""A run that is killed at any operation on files, and started again, ends as a run that was never stopped."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import time

import pytest
from conftest import QUESTIONS, jsonl
from file_faults import Server, copy

from trl_sft import run_folder

RECIPE = """\
model: {name_or_path: trl_sft:tiny}
data: {train: rows.jsonl, eval_fraction: 0.2}
train:
  output_dir: out
  max_steps: 3
  per_device_train_batch_size: 2
  save_strategy: steps
  save_steps: 2
  save_total_limit: 1
  logging_steps: 1
evaluate: {max_rows: 2}
"""
KINDS = {"full": (), "lora": ("lora={r: 4, target_modules: all-linear, lora_dropout: 0.1}",)}
OVERWRITE = ("run.overwrite=true", "train.seed=7")
STRIDE = int(os.environ.get("TRL_SFT_KILL_STRIDE", "1"))  # of the operations at which a long test stops
_TIMES = re.compile(r"runtime|per_second|seconds|changed_share|throughput")


@pytest.fixture
def server(tmp_path_factory):
    """Return the server that runs commands in forks; each test has its own, so that a failure stays in one test."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def without_times(value):
    """Return JSON without what differs between equal runs."""
    if isinstance(value, dict):
        return {name: without_times(entry) for name, entry in value.items() if not _TIMES.search(name)}
    if isinstance(value, list):
        return [without_times(entry) for entry in value]
    return value


def read_state(folder):
    """Return the contents of a run folder that equal runs have in common, by name; folders end with a slash."""
    state = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder)) + ("/" if path.is_dir() else "")
        if path.is_dir() or path.suffix == ".html":  # a page shows times
            state[name] = ""
        elif path.name == "trl_sft.json":  # hashes of files that hold times, and of itself
            state[name] = without_times(json.loads(path.read_text())) | {"files": None, "xxh128": None}
        elif path.suffix == ".json":
            state[name] = without_times(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            state[name] = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name == "README.md":
            state[name] = re.sub(r"(?<= steps and ).*(?= on a CPU)", "", path.read_text())
        else:
            state[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return state


def find_differences(state, expected):
    """Return the names whose contents differ, with `+` what is too much and `-` what is missing; keys of JSON too."""
    names = [f"+{name}" for name in state.keys() - expected.keys()]
    names += [f"-{name}" for name in expected.keys() - state.keys()]
    for name in sorted(state.keys() & expected.keys()):
        if isinstance(state[name], dict) and isinstance(expected[name], dict):
            names += [f"{name} {key}" for key in find_differences(state[name], expected[name])]
        elif state[name] != expected[name]:
            names.append(name)
    return sorted(names)


def digest(folder):
    """Return a digest of names and contents of a folder, without random parts of names."""
    digest = hashlib.sha256()
    names = {re.sub(r"\.tmp\w{6}", ".tmp", str(path.relative_to(folder))): path for path in folder.rglob("*")}
    for name in sorted(names):
        digest.update(name.encode() + b"\0")
        digest.update(names[name].read_bytes() if names[name].is_file() else b"/")
    return digest.digest()


class Phase:
    """What a process does when it is killed: a command, the folder it starts from, and the state that it leads to."""

    def __init__(self, server, base, words, *, name):
        finished = name == "overwrite"
        self.server, self.words, self.name = server, words, name
        self.start, self.here = base / "start", base / "here"
        shutil.rmtree(self.start, ignore_errors=True)
        self.start.mkdir(parents=True)
        jsonl(self.start / "rows.jsonl", QUESTIONS)
        (self.start / "recipe.yaml").write_text(RECIPE)
        self.go()  # the cache is filled before
        copy(self.here / "cache", self.start / "cache")
        self.earlier = {}
        if finished:
            self.words = (*words, *OVERWRITE)
        self.expected = read_state(self.go())
        if finished:
            self.words = words
            copy(self.go(), self.start / "out")
            self.earlier = read_state(self.start / "out")
            self.words = (*words, *OVERWRITE)
        if name == "resume":
            self.go()
            opened = [n for n, line in enumerate(self.operations, 1) if "checkpoint-3" in line]
            copy(self.go(at=opened[0]), self.start / "out")
        self.go()
        differences = find_differences(read_state(self.here / "out"), self.expected)
        assert not differences, differences
        self.proven = set()

    def go(self, **fault):
        """Run the command from the start; return its run folder."""
        copy(self.start, self.here)
        ending = self.server.run(self.here, "recipe.yaml", *self.words, **fault)
        assert ending.code == (-9 if fault else 0), ending.output
        self.operations = ending.operations
        return self.here / "out"

    def check_again(self):
        """Run the command again after the kill; return what differs from a run that was never stopped."""
        key = digest(self.here)
        if key in self.proven:
            return []
        self.proven.add(key)
        problems = self.check_earlier() if self.earlier else []
        is_done = run_folder.read_json(self.here / "out" / run_folder.RUN).get("outcome") == run_folder.DONE
        if not self.earlier and is_done:
            return self.check_finished()
        ending = self.server.run(self.here, "recipe.yaml", *self.words)
        if ending.code:
            return [*problems, f"exit code {ending.code}: {ending.output[-600:]}"]
        return problems + find_differences(read_state(self.here / "out"), self.expected)

    def check_finished(self):
        """Return what is wrong with a run that was finished before the process ended: it is whole and stays so."""
        ending = self.server.run(self.here, "recipe.yaml", *self.words)
        problems = [] if ending.code == 2 and "holds a finished run" in ending.output else [ending.output[-600:]]
        late = (".lock", "report.html", ".report.html.part")  # `trl_sft report` writes the page later
        differences = find_differences(read_state(self.here / "out"), self.expected)
        return problems + [name for name in differences if name.lstrip("+-") not in late]

    def check_earlier(self):
        """Return what is wrong with the place of the earlier run that the command without `overwrite` names."""
        again = copy(self.here, self.here.with_name("again"))
        shutil.move(self.here, self.here.with_name("killed"))
        shutil.move(again, self.here)  # paths are part of the files
        ending = self.server.run(self.here, "recipe.yaml", *self.words[: -len(OVERWRITE)])
        out = self.here / "out"
        problems = []
        if ending.code != 2:
            problems += [f"without overwrite: exit code {ending.code} {ending.output[-300:]}"]
        elif f"{out}/_earlier_run holds a run" in ending.output or f"is in {out}/_earlier_run\n" in ending.output:
            state = read_state(out / "_earlier_run")
            problems += [f"_earlier_run: {name}" for name in find_differences(state, self.earlier)]
        elif f"{out} holds a finished run" in ending.output:
            state = {name: value for name, value in read_state(out).items() if not name.startswith(("_", "."))}
            state["report.html"] = ""  # written once the run is finished
            either = [find_differences(state, whole) for whole in (self.earlier, self.expected)]
            problems += [f"neither whole: {either}"] if all(either) else []
        else:
            problems += [ending.output[-300:]]
        shutil.rmtree(self.here)
        shutil.move(self.here.with_name("killed"), self.here)
        return problems


PHASES = {"save": False, "resume": False, "overwrite": True}


def list_kills(operations):
    """Yield the number of each operation, and whether half of a write happens first."""
    for number, operation in enumerate(operations, 1):
        yield number, False
        if operation.startswith(("write", "copy")):
            yield number, True


def kill(phase, places):
    """Kill the process at each place and run the command again; return what differs, by operation."""
    phase.go()
    operations, failures = phase.operations, {}
    for number, half in places:
        phase.go(at=number, half=half)
        if problems := phase.check_again():
            failures[f"{number} {operations[number - 1]}{' half' * half}"] = problems
    return failures


def refuse(phase, places, error):
    """Let the disk refuse each operation and all that follow it; return what is wrong then or differs, by operation."""
    phase.go()
    operations, failures = phase.operations, {}
    for number in places:
        copy(phase.start, phase.here)
        ending = phase.server.run(phase.here, "recipe.yaml", *phase.words, at=number, error=error, stays=True)
        message = ending.output[-900:]
        problems = [] if ending.code in (0, 2) else [f"exit code {ending.code}"]
        if ending.code:
            problems += [f"lacks {word}" for word in (str(phase.here), "    -> ", "run") if word not in message]
            problems += [message] if problems or "Traceback" in ending.output else []
        if problems := problems + phase.check_again():
            failures[f"{number} {operations[number - 1]}"] = problems
    return failures


def find_operation(operations, words):
    """Return the number of the first operation that begins with the first word and ends with the second one."""
    verb, _, end = words.partition(" ")
    return next(n for n, line in enumerate(operations, 1) if line.startswith(verb) and line.endswith(end))


def test_run_that_replaces_another_one_survives_kills_and_a_full_disk(server, tmp_path):
    phase = Phase(server, tmp_path, (), name="overwrite")
    words = [
        "rename checkpoint-3",
        "open .run.json.part",
        "fsync checkpoint-3/optimizer.pt",
        "unlink _removed_run/run.json",
    ]
    places = [find_operation(phase.operations, word) for word in words]
    assert kill(phase, [(place, False) for place in places]) == {}
    assert refuse(phase, [find_operation(phase.operations, "write checkpoint-3/optimizer.pt")], errno.ENOSPC) == {}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["save", "resume", "overwrite"])
def test_run_killed_at_any_operation_and_started_again_equals_one_that_was_never_stopped(server, tmp_path, name, kind):
    phase = Phase(server, tmp_path, KINDS[kind], name=name)
    operations = len(phase.operations)
    places = list(list_kills(phase.operations))
    print(f"{kind} {name}: {operations} operations, a kill at every {STRIDE} of {len(places)} places")
    failures = kill(phase, places[::STRIDE])
    print(f"{kind} {name}: {len(phase.proven)} different states, {len(failures)} not equal")
    assert failures == {}


@pytest.mark.long
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("name", ["save", "overwrite"])
def test_disk_that_refuses_any_operation_is_named_and_the_run_goes_on_to_the_same_end(server, tmp_path, name, error):
    phase = Phase(server, tmp_path, (), name=name)
    places = range(1, len(phase.operations) + 1, STRIDE)
    failures = refuse(phase, places, error)
    print(f"{name}, {errno.errorcode[error]}: {len(places)} refusals, {len(phase.proven)} states")
    assert failures == {}


MIXED = """\
model: {name_or_path: trl_sft:tiny}
data:
  train:
    - {path: rows.jsonl, weight: 2, streaming: true}
    - {path: other.jsonl, weight: 1, streaming: true}
train:
  output_dir: out
  max_steps: 24
  per_device_train_batch_size: 2
  save_steps: 2
  logging_steps: 3
  packing: true
  max_length: 96
"""


@pytest.mark.long
def test_packed_mixed_and_streamed_run_killed_at_random_times_equals_one_that_was_never_stopped(server, tmp_path):
    start, here = tmp_path / "start", tmp_path / "here"
    start.mkdir()
    jsonl(start / "rows.jsonl", QUESTIONS)
    jsonl(start / "other.jsonl", [{"question": f"Say {n}.", "answer": "x " * (1 + n * 7 % 12)} for n in range(30)])
    (start / "recipe.yaml").write_text(MIXED)
    copy(start, here)
    began = time.monotonic()
    ending = server.run(here, "recipe.yaml")
    seconds = time.monotonic() - began
    assert ending.code == 0, ending.output
    expected = read_state(here / "out")
    numbers, kills = random.Random(20261126), 0
    while kills < 20:
        copy(start, here)
        ending = server.run(here, "recipe.yaml", seconds=numbers.uniform(0.2, 1) * seconds)
        while ending.code == -9:
            kills += 1
            ending = server.run(here, "recipe.yaml", seconds=numbers.uniform(0.2, 1.5) * seconds)
        # the kill may have come after the last operation that counts: then the run is finished, and equal too
        assert ending.code == 0 or "holds a finished run" in ending.output, ending.output
        differences = find_differences(read_state(here / "out"), expected)
        # of a stream the ledger counts the rows that the last process read
        assert [name for name in differences if not name.startswith("ledger.json train")] == []
