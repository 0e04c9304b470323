"""The embedded model and rows: scripts rebuild them, the quickstart trains on them, and a wheel contains them."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SHIPPED
from safetensors.torch import load_file

from trl_sft.recipe import paths

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import build_embedded  # noqa: E402
import controls  # noqa: E402


def test_script_rebuilds_the_toy_data_and_model(tmp_path):
    subprocess.run([sys.executable, ROOT / "tests" / "build_toy.py", tmp_path], check=True, capture_output=True)
    for name in ("phrases/train.jsonl", "phrases/test.jsonl", "tiny/chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (paths.EMBEDDED / name).read_bytes(), name
    new, committed = (load_file(folder / "tiny" / "model.safetensors") for folder in (tmp_path, paths.EMBEDDED))
    assert new.keys() == committed.keys()
    assert all(torch.equal(new[name], committed[name]) for name in new)


def test_script_rebuilds_the_embedded_rows_texts_and_tokenizer(tmp_path):
    """`make prove` rebuilds the weights too."""
    build_embedded.write_rows(tmp_path)
    for part in ("train", "test"):
        name = f"skills/{part}.jsonl"
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()
    recipe = build_embedded.begin(tmp_path / "work")
    record = json.loads((SHIPPED / "tiny" / "pretraining.json").read_text())
    text = "\n".join(build_embedded.texts()).encode()
    assert hashlib.sha256(text).hexdigest() == record["text_sha256"]
    assert recipe.read_text() == (ROOT / "scripts" / "pretrain_tiny.yaml").read_text()
    tokenizers = [
        json.loads((f / "tokenizer.json").read_text()) for f in (tmp_path / "work/untrained", SHIPPED / "tiny")
    ]
    assert tokenizers[0]["model"] == tokenizers[1]["model"]


def test_model_is_small_and_its_tokenizer_covers_both_languages():
    from transformers import AutoTokenizer

    weights = SHIPPED / "tiny" / "model.safetensors"
    assert weights.stat().st_size <= 4 * 2**20
    assert 1_000_000 <= sum(tensor.numel() for tensor in load_file(weights).values()) <= 2_000_000
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "tiny")
    for text in ("The upper case of abc is ABC.", "把猫翻译成英文。", "é 語 😀"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("翻译成英文")["input_ids"]) <= 5


def test_held_out_questions_occur_neither_in_training_rows_nor_in_pretraining_texts():
    train, test = controls.read("train"), controls.read("test")
    assert len(train) >= 2000
    assert len(test) >= 200
    assert {row["language"] for row in test} == {"en", "zh"}
    assert len({row["task"] for row in test}) >= 6
    training_questions = {row["question"] for row in train}
    assert not training_questions & {row["question"] for row in test}
    pretraining = "\n".join(build_embedded.texts())
    assert not [row["question"] for row in (*train, *test) if row["question"] in pretraining]
    pairs = {(row["task"], row["answer"]) for row in train if row["task"] in ("upper", "reverse", "double")}
    assert not [row for row in test if (row["task"], row["answer"]) in pairs], "the answer occurs in a training row"


def test_answer_of_the_nearest_training_row_is_right_for_at_most_15_percent():
    train, test = controls.read("train"), controls.read("test")
    assert controls.scores(test, controls.nearest(train, test))["all"] <= 0.15


def test_notebook_trains_the_quickstart_to_at_least_90_percent_exact_match(tmp_path):
    """Executed as a user would: at most 10% of the held-out prompts before, at least 90% after, no task under 80%."""
    import shutil

    import nbformat
    import run_notebooks

    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    path = ROOT / "notebooks" / "01_quickstart.ipynb"
    notebook = run_notebooks.run(path, tmp_path)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the loss curve"
    result = json.loads((tmp_path / "runs" / "quickstart" / "eval.json").read_text())
    assert result["prompts"] == 240
    assert result["before"]["exact_match"] <= 0.1
    assert result["after"]["exact_match"] >= 0.9
    assert min(task["after"]["exact_match"] for task in result["tasks"].values()) >= 0.8
    committed = nbformat.read(path, as_version=4)
    assert not [cell for cell in committed.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebook_is_committed_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 3
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"]] == []


@pytest.mark.long
def test_notebook_of_monitoring_shows_four_runs_with_their_own_findings(tmp_path):
    import run_notebooks

    notebook = run_notebooks.run(ROOT / "notebooks" / "02_monitoring.ipynb", tmp_path)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("polyline" in output.get("data", {}).get("text/html", "") for output in outputs) == 5, "the curves"
    expected = {
        "healthy": ([], "better"),
        "overfitting": (["overfitting"], "overfitted"),
        "diverging": (["diverging"], "broken"),
        "stuck": (["no_improvement"], "little_changed"),
    }
    for name, (codes, verdict) in expected.items():
        record = json.loads((tmp_path / "runs" / f"monitoring_{name}" / "run.json").read_text(encoding="utf-8"))
        assert ([finding["code"] for finding in record["findings"]], record["verdict"]["code"]) == (codes, verdict)


@pytest.mark.long
def test_notebook_of_evaluation_names_exactly_the_rows_that_broke_a_skill(tmp_path):
    """Half a minute of processor time; 32 answers without their brace stand in the lines from 385 on."""
    import run_notebooks

    notebook = run_notebooks.run(ROOT / "notebooks" / "03_did_it_work.ipynb", tmp_path)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the curve"
    result = json.loads((tmp_path / "runs" / "worked" / "eval.json").read_text(encoding="utf-8"))["evaluation"]
    assert result["tasks"]["next"]["tuned"] == 1
    assert result["tasks"]["upper"]["tuned"] == 0
    lines = (tmp_path / "runs" / "worked" / "bisect.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["line"] for line in lines] == list(range(385, 417))
    assert (tmp_path / "worked_judge.html").is_file()


@pytest.mark.long
def test_notebook_of_building_data_catches_the_planted_faults_and_trains(tmp_path):
    import run_notebooks

    run_notebooks.run(ROOT / "notebooks" / "04_build_data.ipynb", tmp_path)
    build = json.loads((tmp_path / "data" / "notebook" / "build.json").read_text(encoding="utf-8"))
    rejected = {gate["gate"] for gate in build["gates"] if gate["rejected"]}
    assert rejected >= {"empty", "refusal", "artefact", "complete", "personal"}
    assert build["generator"]["this_process"]["made"] == 0, "the second build makes no call"
    assert build["rows"]["taken"] >= 36
    assert (tmp_path / "runs" / "notebook_build" / "run.json").is_file()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_script_reproduces_the_pretraining_losses(tmp_path):
    """A quarter of an hour: the same losses to 2%, on this machine's arithmetic."""
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import build_embedded; "
        "build_embedded.build(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))"
    )
    subprocess.run([sys.executable, "-c", code, ROOT / "scripts", tmp_path / "out", tmp_path / "work"], check=True)
    new, committed = (json.loads((f / "tiny" / "pretraining.json").read_text()) for f in (tmp_path / "out", SHIPPED))
    assert new["text_sha256"] == committed["text_sha256"]
    assert new["losses"].keys() == committed["losses"].keys()
    last = max(new["losses"], key=int)
    assert new["losses"][last] == pytest.approx(committed["losses"][last], rel=0.02)
    same = (tmp_path / "out/tiny/model.safetensors").read_bytes() == (SHIPPED / "tiny/model.safetensors").read_bytes()
    losses = f"{new['losses'][last]} (committed: {committed['losses'][last]})"
    print(f"last loss {losses}; weights {'' if same else 'not '}bit-equal")


@pytest.mark.long
def test_wheel_trains_on_its_embedded_model_and_rows(tmp_path):
    """Outside the checkout, from a wheel in a fresh environment that borrows this one's packages."""
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(wheel, check=True)
    wheel_file = next(tmp_path.glob("*.whl"))
    print(f"wheel: {wheel_file.stat().st_size / 2**20:.2f} MiB")
    names = zipfile.ZipFile(wheel_file).namelist()
    for name in (
        "py.typed",
        "embedded/tiny/model.safetensors",
        "embedded/skills/train.jsonl",
        "templates/chatml.jinja",
    ):
        assert f"trl_sft/{name}" in names
    with zipfile.ZipFile(wheel_file) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "r.yaml").write_text(
        "model: {name_or_path: trl_sft:tiny}\ndata: {train: trl_sft:skills}\n"
        "train: {max_steps: 1, save_strategy: 'no'}\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from trl_sft.cli import main; sys.exit(main())"
    process = subprocess.run(
        [sys.executable, "-c", code, "r.yaml"], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert str(tmp_path / "site") in process.stdout
