"""What others bring is not run and not believed: code, pickles, markup; tokens and passwords are written nowhere."""

import json
import pickle
import queue
import shutil
from pathlib import Path

import pytest
import torch
from conftest import QUESTIONS, RECIPE, jsonl
from safetensors.torch import load_file

from trl_sft.recipe import paths

LOCAL = RECIPE.replace("trl_sft:tiny", "./model")
CODE = "import pathlib\npathlib.Path({planted!r}).open('a').write(__name__ + ' ')\n"
CONFIG = CODE + "from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    model_type = 'own'\n"
MODEL = (
    CODE + "from transformers import LlamaForCausalLM\nfrom .configuration_own import Own\n"
    "class OwnModel(LlamaForCausalLM):\n    config_class = Own\n"
)
TOKENIZER = (
    CODE + "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
)
GENERATE = CODE + "def generate(model, **kwargs):\n    raise NotImplementedError\n"


class Planted:
    """Writes a file when it is read as a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def planted(here):
    """The file that planted code writes."""
    return here / "planted"


@pytest.fixture
def model(here, planted):
    """A folder with a model that brings code for everything that it may bring; known to transformers or not."""

    def make(known):
        folder = here / "model"
        shutil.copytree(paths.EMBEDDED / "tiny", folder)
        for name, text in (("configuration_own", CONFIG), ("modeling_own", MODEL), ("tokenization_own", TOKENIZER)):
            (folder / f"{name}.py").write_text(text.format(planted=str(planted)))
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(GENERATE.format(planted=str(planted)))
        auto = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.OwnModel"}
        change(folder / "config.json", auto_map=auto)
        change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]})
        if not known:
            change(folder / "config.json", model_type="own", architectures=["OwnModel"])
            change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer")
        return folder

    return make


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def pickled(here):
    """Make the weights of a model a pickle; return its folder."""
    folder = here / "model"
    shutil.copytree(paths.EMBEDDED / "tiny", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_code_of_a_known_model_is_not_run_without_the_key(model, planted, go):
    model(known=True)
    code, out, err = go(LOCAL)
    assert code == 0, err
    assert not planted.exists()
    assert "code  " not in out


def test_code_of_an_unknown_model_is_refused_without_the_key_and_says_which(model, planted, go):
    model(known=False)
    code, _, err = go(LOCAL)
    assert code == 2
    assert "trust_remote_code" in err
    assert not planted.exists()


@pytest.mark.parametrize("command", [(), ("check",)], ids=["train", "check"])
def test_code_that_is_trusted_is_named_before_it_runs(command, model, planted, go):
    folder = model(known=False)
    words = ("model.trust_remote_code=true",)
    code, out, err = go(LOCAL, *words, command=command)
    assert code == 0, err
    assert planted.exists()
    assert f"code      runs Python code of {folder} (model.trust_remote_code)" in out
    assert out.index("code   ") < out.index("model   ")


def test_weights_that_are_a_pickle_are_refused_until_the_recipe_takes_them(here, go):
    folder = pickled(here)
    code, _, err = go(LOCAL)
    assert code == 2
    assert "recipe.yaml:1 model.name_or_path" in err
    assert "its weights are a pickle (pytorch_model.bin), which may run code when it is read" in err
    assert "model.use_safetensors: false" in err
    code, out, err = go(LOCAL, "model.use_safetensors=false")
    assert code == 0, err
    assert f"weights   of {folder} may be read from pickle files" in out


def test_adapter_that_is_a_pickle_is_refused(here, go):
    assert go(RECIPE, "lora={r: 4}")[0] == 0
    folder = here / "out"
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    code, _, err = go(RECIPE.replace("trl_sft:tiny", "out"), "train.output_dir=more")
    assert code == 2
    assert "(adapter_model.bin)" in err


def test_pickle_that_the_recipe_takes_runs_nothing(here, planted, go):
    (pickled(here) / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(planted)))
    code, _, err = go(LOCAL, "model.use_safetensors=false")
    assert code == 2, err
    assert not planted.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickle_in_a_checkpoint_runs_nothing_on_resume(name, here, planted, go):
    words = ("train.save_strategy=steps", "train.save_steps=1", "train.max_steps=3", "run.max_hours=1e-9")
    assert go(RECIPE, *words)[0] == 75
    checkpoint = here / "out" / "checkpoint-1"
    torch.save({"state": Planted(planted)}, checkpoint / name)
    code, _, err = go(RECIPE, *words)
    assert not planted.exists()
    assert code == 2, err
    assert name in err


@pytest.mark.parametrize("path", ["rows.pkl", "folder"])
def test_rows_in_a_pickle_are_refused(path, here, planted, go):
    file = here / path / "rows.pkl" if path == "folder" else here / path
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(pickle.dumps(Planted(planted)))
    code, _, err = go(RECIPE.replace("rows.jsonl", path if path == "rows.pkl" else "./folder"))
    assert code == 2, err
    assert not planted.exists()


def test_function_of_the_recipe_is_named_with_its_file(here, go):
    (here / "own.py").write_text("def chat(row):\n    return row\n")
    code, out, _ = go(RECIPE.replace("rows.jsonl", "{path: rows.jsonl, format: 'own.py:chat'}"), command=("check",))
    assert code == 0
    assert f"code      runs {here / 'own.py'}: chat formats rows.jsonl" in out


def test_function_outside_the_recipes_folder_is_refused_unless_its_whole_path_is_written(here, go, monkeypatch):
    (here / "own.py").write_text("def chat(row):\n    return row\n")
    (here / "sub").mkdir()
    text = RECIPE.replace("rows.jsonl", "{path: ../rows.jsonl, format: '../own.py:chat'}")
    (here / "sub" / "recipe.yaml").write_text(text)
    monkeypatch.chdir(here / "sub")
    code, _, err = go(None, command=("check",))
    assert code == 2
    assert f"this file is outside {here / 'sub'}" in err
    (here / "sub" / "recipe.yaml").write_text(text.replace("../own.py", str(here / "own.py")))
    assert go(None, command=("check",))[0] == 0


def test_page_escapes_names_of_files_and_columns(here, go):
    bad = "<script>alert(1)</script>"
    name = "<script>1.jsonl"
    jsonl(here / name, [row | {bad: f"{bad}{n}"} for n, row in enumerate(QUESTIONS)])
    (here / "recipe.yaml").write_text(RECIPE.replace("rows.jsonl", f"{{path: '{name}', rename: {{question: input}}}}"))
    text = RECIPE.replace("rows.jsonl", f"'{name}'")
    code, _, err = go(text, "--html", "page.html", command=("preview",))
    assert code == 0, err
    page = (here / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;1.jsonl row 1 (line 1)" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page  # the column, which is not used


TOKENS = {
    "train.hub_token": "hf_hubtoken11",
    "model.token": "hf_modeltoken22",
    "tokenizer.token": "hf_tokenizertoken33",
    "data.train.token": "hf_datatoken44",
}
AROUND = {"HF_TOKEN": "hf_environment55", "WANDB_API_KEY": "wandbkey66", "COMET_API_KEY": "cometkey77"}


@pytest.mark.parametrize("stopped", [False, True], ids=["done", "stopped"])
def test_token_or_key_stands_in_no_byte_of_the_run_folder_and_on_no_screen(stopped, here, go, monkeypatch):
    for name, value in AROUND.items():
        monkeypatch.setenv(name, value)
    text = (
        RECIPE.replace("train: rows.jsonl", "train: {path: rows.jsonl}") + "  # wandbkey66, which somebody wrote down\n"
    )
    words = ["train.save_strategy=steps", "train.save_steps=1", "run.max_hours=1e-9"] if stopped else []
    code, out, err = go(text, *words, *(f"{name}={value}" for name, value in TOKENS.items()))
    assert code == (75 if stopped else 0), err
    files = [path for path in (here / "out").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert any(path.parent.name == "checkpoint-1" for path in files) == stopped
    for secret in (*TOKENS.values(), *AROUND.values()):
        assert [path.name for path in files if secret.encode() in path.read_bytes()] == []
        assert secret not in out + err
    if stopped:
        assert "train.hub_token=(left out)" in err


def test_token_works_while_it_is_hidden(here, go, monkeypatch):
    from trl_sft.training import stages as stages_module

    seen = {}
    real = stages_module.SFTTrainer.train

    def train(self, **words):
        seen["token"] = str(self.args.hub_token.encode(), "ascii"), pickle.loads(pickle.dumps(self.args.hub_token))
        return real(self, **words)

    monkeypatch.setattr(stages_module.SFTTrainer, "train", train)
    assert go(RECIPE, "train.hub_token=hf_hubtoken11")[0] == 0
    assert seen["token"] == ("hf_hubtoken11", "(left out)")


def test_password_of_an_address_is_not_shown_where_it_is_refused(here, go):
    code, out, err = go(RECIPE.replace("rows.jsonl", "https://me:hunter22@example.org/rows.jsonl"))
    assert code == 2
    assert "hunter22" not in out + err
    assert "https://(left out)@example.org/rows.jsonl" in err


def test_no_telemetry_is_sent(go, monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import _telemetry

    sent = queue.SimpleQueue()
    monkeypatch.setattr(_telemetry, "_TELEMETRY_QUEUE", sent)
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: None)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    _telemetry.send_telemetry("trial")
    assert sent.qsize() == 1
    assert go(RECIPE)[0] == 0
    assert sent.qsize() == 1
