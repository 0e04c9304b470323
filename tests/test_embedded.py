"""What the package embeds can be rebuilt from the script, and stands in a wheel."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_sft import paths

ROOT = Path(__file__).parents[1]


def test_script_rebuilds_rows_tokenizer_and_weights(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "build_embedded.py", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("phrases/train.jsonl", "phrases/test.jsonl", "tiny/chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (paths.EMBEDDED / name).read_bytes(), name
    vocabularies = [json.loads((f / "tiny/tokenizer.json").read_text())["model"] for f in (tmp_path, paths.EMBEDDED)]
    assert vocabularies[0] == vocabularies[1]
    new, kept = (load_file(folder / "tiny" / "model.safetensors") for folder in (tmp_path, paths.EMBEDDED))
    assert new.keys() == kept.keys()
    assert all(torch.equal(new[name], kept[name]) for name in new)


def test_held_out_phrases_stand_in_no_training_row():
    train, test = (
        [json.loads(line) for line in (paths.EMBEDDED / "phrases" / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "test")
    )
    assert len(train) == 2200
    assert len(test) == 200
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    assert not {row["answer"] for row in train} & {row["answer"] for row in test}


@pytest.mark.long
def test_wheel_alone_trains_on_what_it_embeds(tmp_path):
    """Outside the checkout, from a wheel in a fresh environment that borrows this one's packages."""
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(wheel, check=True)
    found = next(tmp_path.glob("*.whl"))
    print(f"wheel: {found.stat().st_size / 2**20:.2f} MiB")
    names = zipfile.ZipFile(found).namelist()
    assert "trl_sft/py.typed" in names
    assert "trl_sft/embedded/tiny/model.safetensors" in names
    with zipfile.ZipFile(found) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "r.yaml").write_text(
        "model: {name_or_path: trl_sft:tiny}\ndata: {train: trl_sft:phrases}\n"
        "train: {max_steps: 1, save_strategy: 'no'}\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from trl_sft.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "r.yaml"], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
