"""Fixtures of all tests: an empty Hugging Face cache, no access to the hub, a toy model, and small data files."""

import gc
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

# Before datasets and huggingface_hub are imported: they read these once.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="trl_sft-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import pytest

from trl_sft import cli, redaction
from trl_sft.recipe import paths

# In the tests `trl_sft:tiny` is a smaller, untrained model and `trl_sft:phrases` its rows (tests/build_toy.py): a run
# takes the same steps in about a tenth of the time. test_embedded.py tests the model and the rows of the package.
SHIPPED = paths.EMBEDDED
paths.EMBEDDED = Path(__file__).parent / "toy"

QUESTIONS = [{"question": f"What is {n} plus {n}?", "answer": str(n + n)} for n in range(40)]


def pytest_addoption(parser):
    parser.addoption("--update", action="store_true", help="rewrite the snapshots")


_FROZEN = {"modules": 0}  # how many were imported when the garbage collector was last told to pass over all objects
gc.disable()  # until all tests are collected
os.fsync = lambda file: None  # no test cuts the power; a disk that fails is tested in other processes (file_faults.py)


def pytest_collection_finish():
    """Let the garbage collector pass over the tests and all that they import."""
    gc.freeze()
    gc.enable()
    _FROZEN["modules"] = len(sys.modules)


def pytest_runtest_teardown():
    """Exempt the objects of imported packages from the garbage collector, as the command line does.

    accelerate collects at the end of each run, which would search a million objects of packages for 0.3 s.
    """
    if len(sys.modules) > _FROZEN["modules"] + 100:
        gc.collect()
        gc.freeze()
        _FROZEN["modules"] = len(sys.modules)


@pytest.fixture(autouse=True)
def no_known_secrets():
    """Forget the secrets of other tests: a process of a user reads one recipe."""
    redaction._known.clear()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Change to a temporary folder that contains rows.jsonl with forty rows; return its path."""
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "rows.jsonl", QUESTIONS)
    return tmp_path


@pytest.fixture
def micro_batches(monkeypatch):
    """Record the micro batches of the next run in this process; return the list of (optimizer step from 0, rows)."""
    from trl_sft.training import stages as stages_module

    batches = []

    class RecordingTrainer(stages_module.SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            batches.append((self.state.global_step, len(inputs["input_ids"])))
            return super().training_step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(stages_module, "SFTTrainer", RecordingTrainer)
    return batches


@pytest.fixture
def stop_after(monkeypatch):
    """Return a function that lets the next runs stop with a checkpoint after a step; None = they do not stop."""
    from trl_sft.training import callbacks  # takes seconds

    real = callbacks.Guard.on_step_end
    stop_step = [None]

    def interrupt(self, args, state, control, **live):
        if state.global_step == stop_step[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, args, state, control, **live)

    monkeypatch.setattr(callbacks.Guard, "on_step_end", interrupt)
    return lambda step: stop_step.__setitem__(0, step)


def jsonl(path, rows):
    """Write rows to a file as JSON lines; return its path."""
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


RECIPE = """\
model: {name_or_path: trl_sft:tiny}
data: {train: rows.jsonl}
train:
  output_dir: out
  max_steps: 2
  per_device_train_batch_size: 2
  save_strategy: 'no'
  logging_steps: 1
"""


@pytest.fixture
def go(here, capsys):
    """Return a function that runs the command line in this process and returns exit code, stdout and stderr.

    `go(text, "train.max_steps=3", command=["check"])` writes `text` to recipe.yaml and runs
    `trl_sft check recipe.yaml train.max_steps=3`; without `command` it trains. `text=None` keeps the file as it is.
    """

    def call(text=RECIPE, *overrides, command=()):
        if text is not None:
            (here / "recipe.yaml").write_text(text, encoding="utf-8")
        capsys.readouterr()
        code = cli.main([*command, "recipe.yaml", *overrides])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def matches(request):
    """Return a function `matches(name, text)`: text equals tests/snapshots/NAME.txt, which `--update` writes."""

    def compare(name, text):
        path = Path(__file__).parent / "snapshots" / f"{name}.txt"
        if request.config.getoption("--update"):
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"no snapshot {path.name}: run pytest --update, and read what it wrote"
        assert text == path.read_text(encoding="utf-8")

    return compare
