"""Shared by all tests: a cache of their own, no hub, and small files to try things on."""

import json
import os
import tempfile
from pathlib import Path

# Before datasets and huggingface_hub are imported: they read these once.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="trl_sft-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import pytest

from trl_sft import cli
from trl_sft.recipe import paths

# In the tests `trl_sft:tiny` is a smaller model without training, `trl_sft:phrases` its rows (tests/build_toy.py):
# what a run does is the same, and most of it takes a tenth of the time. test_embedded.py tries the real ones.
SHIPPED = paths.EMBEDDED
paths.EMBEDDED = Path(__file__).parent / "toy"

QUESTIONS = [{"question": f"What is {n} plus {n}?", "answer": str(n + n)} for n in range(40)]


def pytest_addoption(parser):
    parser.addoption("--update", action="store_true", help="write the snapshots anew")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder with forty rows in rows.jsonl."""
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "rows.jsonl", QUESTIONS)
    return tmp_path


@pytest.fixture
def micro_batches(monkeypatch):
    """The micro batches of a run that follows: (optimizer step from 0, rows) each."""
    from trl_sft.training import stages as stages_module

    seen = []

    class Counting(stages_module.SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append((self.state.global_step, len(inputs["input_ids"])))
            return super().training_step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(stages_module, "SFTTrainer", Counting)
    return seen


def jsonl(path, rows):
    """Write rows as JSON lines."""
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
    """Run a command line in this process: `go("a: b", "x.y=1")` -> exit code, output, errors."""

    def call(text=RECIPE, *words, command=()):
        if text is not None:
            (here / "recipe.yaml").write_text(text, encoding="utf-8")
        capsys.readouterr()
        code = cli.main([*command, "recipe.yaml", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def matches(request):
    """Compare a text with tests/snapshots/NAME.txt; `pytest --update` writes it."""

    def compare(name, text):
        path = Path(__file__).parent / "snapshots" / f"{name}.txt"
        if request.config.getoption("--update"):
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"no snapshot {path.name}: run pytest --update, and read what it wrote"
        assert text == path.read_text(encoding="utf-8")

    return compare
