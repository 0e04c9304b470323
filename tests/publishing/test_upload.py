"""Pushes of folders, against a stand-in for the hub that huggingface_hub uploads to and downloads from."""

import json
import re
import shutil

import hub_server
import pytest
import torch
from conftest import jsonl
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sft import cli, errors
from trl_sft.publishing import repository, selection, upload

RECIPE = """\
# the token was hf_Abc123Abc123Abc123Abc1
model: {name_or_path: trl_sft:tiny}
lora: {r: 4, target_modules: all-linear}
data: {train: private-rows.jsonl, eval_fraction: 0.2}
train: {output_dir: mine, max_steps: 2, per_device_train_batch_size: 2, save_strategy: 'no', learning_rate: 0.01}
evaluate: {max_rows: 2, generation: {max_new_tokens: 2}}
"""


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Train a LoRA run once for all tests; return its folder."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [{"question": f"My secret {n}?", "answer": f"Answer {n}"} for n in range(20)]
    jsonl(folder / "private-rows.jsonl", rows)
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["recipe.yaml"]) == 0
    return folder / "mine"


@pytest.fixture
def hub(monkeypatch):
    """Return the stand-in, which huggingface_hub of this process speaks to with the token of `me`."""
    with hub_server.connected(monkeypatch) as server:
        yield server


def push(folder, name, *, private=None, with_rows=False):
    """Push a folder, as the command does."""
    target = upload.find_target("--push", name, private=private)
    return upload.push(upload.read_content(folder, with_rows=with_rows), target)


def download(server, repo_id, folder, **options):
    """Return a fresh download of a repository."""
    return snapshot_download(repo_id, local_dir=folder, endpoint=server.endpoint, token="hf_Writer123456", **options)


def test_pushed_adapter_is_downloaded_and_answers_with_equal_logits(hub, finished_run, tmp_path):
    pushed = push(finished_run, "mine", private=True)
    repository_there = hub.repositories["me/mine"]
    assert (pushed.repo_id, pushed.private, repository_there.private) == ("me/mine", True, True)
    assert pushed.commit == repository_there.find("main")["oid"]
    assert "adapter_model.safetensors" in repository_there.files
    assert not any(name.startswith("model") for name in repository_there.files)
    folder = download(hub, "me/mine", tmp_path / "fresh")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("What is 1 plus 1?", return_tensors="pt").input_ids
    logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (folder, finished_run)]
    assert torch.equal(*logits)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(finished_run).chat_template


def test_push_holds_our_card_and_records_but_no_rows_pickles_secrets_or_local_paths(hub, finished_run):
    push(finished_run, "team/mine")
    files = hub.repositories["team/mine"].files
    records = {"README.md", "recipe.yaml", "run.json", "ledger.json", "eval.json", "log.jsonl"}
    model = {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(files) == {".gitattributes"} | records | model | tokenizer
    for name in records:
        text = files[name].decode()
        assert "My secret" not in text, name
        assert "hf_Abc123" not in text, name
        assert str(finished_run.parent) not in text, name
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert {result.metric_type for result in card.data.eval_results} >= {"loss", "exact_match"}
    assert 'pipeline("text-generation", "team/mine")' in card.text
    assert json.loads(files["run.json"])["data"].keys() == {"private-rows.jsonl"}


def test_rows_are_pushed_only_where_they_are_asked_for(hub, finished_run):
    push(finished_run, "mine", with_rows=True)
    files = hub.repositories["me/mine"].files
    assert {"samples.jsonl", "rows.jsonl", "rejects.jsonl", "report.html"} <= set(files)
    assert b"My secret" in files["rows.jsonl"]


def test_license_of_a_base_on_the_hub_is_on_the_card(hub, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["inference"]["base"] = "org/tiny"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    hub.repositories["org/tiny"].files["README.md"] = b"---\nlicense: cc-by-4.0\n---\n# tiny\n"
    push(tmp_path / "run", "mine")
    data = ModelCard(hub.repositories["me/mine"].files["README.md"].decode()).data
    assert (data.license, data.base_model, data.base_model_relation) == ("cc-by-4.0", "org/tiny", "adapter")


def test_second_push_replaces_files_and_removes_weights_that_would_be_loaded_beside_them(hub, finished_run):
    hub.repositories["me/mine"] = hub_server.Repository(private=True)
    old = {"model.safetensors": b"old", "model.safetensors.index.json": b"{}", "notes.md": b"mine", "README.md": b"old"}
    hub.repositories["me/mine"].files.update(old)
    pushed = push(finished_run, "me/mine")
    files = hub.repositories["me/mine"].files
    assert pushed.removed == ["model.safetensors", "model.safetensors.index.json"]
    assert pushed.private is True  # that of the repository, which exists
    assert files["notes.md"] == b"mine"
    assert files["README.md"] != b"old"
    assert "removed model.safetensors" in pushed.describe()


@pytest.mark.parametrize("private", [True, False])
def test_repository_of_another_visibility_is_refused_before_anything_is_uploaded(hub, finished_run, private):
    hub.repositories["me/mine"] = hub_server.Repository(private=not private)
    with pytest.raises(errors.LaunchError, match=r"me/mine exists and is (public|private); a push does not make it"):
        push(finished_run, "me/mine", private=private)
    assert hub.count("POST") == 0


def test_push_that_changes_nothing_makes_no_commit(hub, finished_run):
    first = push(finished_run, "me/mine")
    again = push(finished_run, "me/mine")
    assert again.commit == first.commit
    assert len(hub.repositories["me/mine"].titles) == 1


@pytest.mark.parametrize(
    ("pattern", "status"),
    [
        ("POST .*/commit/", 503),
        ("POST .*/commit/", 0),
        ("PUT /storage/", 500),
        ("POST .*/preupload/", 429),
        ("POST .*batch", 0),
    ],
)
def test_push_goes_on_after_the_server_failed_once(hub, finished_run, pattern, status):
    hub.fail(pattern, status, times=1)
    pushed = push(finished_run, "me/mine")
    assert pushed.commit == hub.repositories["me/mine"].find("main")["oid"]
    assert hub.count(pattern) >= 2


@pytest.mark.parametrize(
    ("pattern", "status", "code"),
    [
        ("POST .*/commit/", 503, "hub.push_refused"),
        ("PUT /storage/", 0, "hub.push_unreachable"),
        ("POST .*/commit/", 403, "hub.no_write_access"),
        ("POST .*/preupload/", 401, "hub.refused_token"),
        ("POST /api/repos/create", 403, "hub.no_write_access"),
        ("POST /api/repos/create", 402, "hub.push_refused"),
        ("GET /api/whoami-v2", 401, "hub.refused_token"),
        ("GET /api/whoami-v2", 0, "hub.push_unreachable"),
    ],
)
def test_push_that_fails_for_good_is_a_fault_with_what_to_do(hub, finished_run, pattern, status, code):
    hub.fail(pattern, status)
    with pytest.raises(errors.UserError) as caught:
        push(finished_run, "me/mine")
    fault = caught.value.faults[0]
    assert fault.code == code
    assert fault.where == "--push"
    assert fault.fix.endswith((".", "stored."))
    assert len(hub.repositories.get("me/mine", hub_server.Repository(private=True)).titles) == 0


def test_server_that_nobody_runs_is_a_fault_at_once(hub, finished_run, monkeypatch):
    monkeypatch.setattr(repository.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(errors.LaunchError, match=re.escape("http://127.0.0.1:1 cannot be reached")):
        push(finished_run, "me/mine")


def test_token_that_may_only_read_is_refused_before_anything_is_created(hub, finished_run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_Reader123456")
    with pytest.raises(errors.LaunchError, match="the token r may only read"):
        push(finished_run, "me/mine")
    assert hub.count("POST") == 0


@pytest.mark.parametrize(
    ("name", "problem", "fix"),
    [
        ("teem/mine", "the token belongs to me, who is no member of teem", "Write `team/mine`, or run"),
        ("readers/mine", "me may only read in the organization readers", "or run `hf auth login`"),
        ("other/mine", "the token belongs to me, who is no member of other", "Write `me/mine`, or run"),
    ],
)
def test_owner_that_the_token_may_not_write_for_is_refused_with_the_one_that_it_may(
    hub, finished_run, name, problem, fix
):
    with pytest.raises(errors.LaunchError) as caught:
        push(finished_run, name)
    assert problem in str(caught.value)
    assert fix in str(caught.value)
    assert hub.count("POST") == 0


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "run.json",
            '{"outcome": "done", "files": ["../x.safetensors", "training_args.bin"]}',
            "no weights of a model",
        ),
        ("run.json", '{"outcome": "running"}', "the run is not finished: running"),
        ("merge.json", '{"run": "gone"}', "no weights of a model"),
        ("gone/x", None, "there is no such folder"),
        ("notes.txt", "", "neither a run nor what `merge` or `export` wrote"),
    ],
)
def test_folder_without_a_finished_model_is_refused(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(errors.RecipeError, match=problem):
        upload.read_content((tmp_path / name).parent)


def test_command_pushes_a_run_later_and_answers_a_program(hub, finished_run, capsys):
    assert cli.main(["export", str(finished_run), "--push", "mine", "--private", "--json"]) == 0
    pushed = json.loads(capsys.readouterr().out)["pushed"]
    assert pushed["repository"] == "me/mine"
    assert pushed["private"] is True
    assert set(pushed["files"]) == set(hub.repositories["me/mine"].files) - {".gitattributes"}
    assert cli.main(["export", str(finished_run), "--push", "https://huggingface.co/me/mine"]) == 2
    assert "-> Write `me/mine`." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "required: --to, --push"),
        (("--to", "merged", "--private"), "--private needs --push OWNER/NAME"),
        (("--to", "merged", "--with-rows", "--push", "x"), "leave out --to"),
    ],
)
def test_flags_of_a_push_that_do_not_fit_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", "runs/x", *words])
    assert message in capsys.readouterr().err


def test_export_of_several_formats_is_pushed_side_by_side_with_a_card_that_loads_each(hub, finished_run, tmp_path):
    out = tmp_path / "out"
    for name in ("merged/model.safetensors", "merged/config.json", "gguf/mine-q8_0.gguf", "ollama/Modelfile"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("FROM ../gguf/mine-q8_0.gguf\nTEMPLATE x\n" if name.endswith("Modelfile") else "{}")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (out / "vllm").mkdir(exist_ok=True)
        (out / "vllm" / name).write_text("{}")
    reader = {"reader": "llama.cpp", "version": "1", "judges_prompts": True, "prompts": {"compared": 3, "equal": 3}}
    reader |= {"answers": 3, "equal_answers": 2, "first_differences": [{"prompt": "My secret 1?"}], "mean_kl": 1e-4}
    proof = {"exports": [{"format": "gguf", "type": "q8_0", "readers": [reader]}]}
    (out / "export.json").write_text(json.dumps({"run": str(finished_run), "formats": {}, "proof": proof}))
    (out / "merged" / ".part").write_text("x")
    hub.repositories["me/mine"] = hub_server.Repository(private=True)
    hub.repositories["me/mine"].files.update({"adapter_model.safetensors": b"old", "adapter_config.json": b"{}"})
    pushed = push(out, "me/mine")
    files = hub.repositories["me/mine"].files
    expected = {"model.safetensors", "config.json", "mine-q8_0.gguf", "Modelfile", "export.json", "README.md"}
    vllm = {"vllm/adapter_model.safetensors", "vllm/adapter_config.json"}  # beside a merged model loaders would take it
    assert set(files) == {".gitattributes"} | expected | vllm
    assert "My secret" not in files["export.json"].decode()
    assert pushed.removed == ["adapter_config.json", "adapter_model.safetensors"]
    assert files["Modelfile"] == b"FROM ./mine-q8_0.gguf\nTEMPLATE x\n"
    assert json.loads(files["export.json"])["run"] == "mine"
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert "gguf" in card.data.tags
    assert "with LoRA fine-tuned by trl_sft" in card.text
    assert "; the adapter is merged." in card.text
    assert "| gguf q8_0 | llama.cpp 1 | 3 of 3 | 2 of 3 | 0.0001 |  |\n" in card.text
    assert "llama-cli -m mine-q8_0.gguf" in card.text
    assert "ollama create mine -f Modelfile" in card.text
    assert "AutoPeftModelForCausalLM" not in card.text
    shutil.rmtree(out / "merged")
    shutil.rmtree(out / "vllm")
    assert push(out, "me/mine").removed == []  # GGUF files alone replace nothing
    card = ModelCard(hub.repositories["me/mine"].files["README.md"].decode())
    assert card.data.library_name == "gguf"


def test_json_keeps_all_but_absolute_paths():
    value = {"/a/b/rows.jsonl": "x", "kept": ["/no think", "a/b", "C:\\me\\rows.csv", "/a/\nb", 1, None], "/": "//"}
    cleaned = json.loads(selection.clean_json(json.dumps(value)))
    assert cleaned == {"rows.jsonl": "x", "kept": ["no think", "a/b", "rows.csv", "/a/\nb", 1, None], "/": "//"}
