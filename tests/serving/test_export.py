"""`export`: formats are written, proved and appear in one step, or not at all."""

import datetime
import json
import shlex
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import gguf
import jsonschema
import pytest
from test_merge import build_base, build_run
from transformers import AutoTokenizer

from trl_sft import cli
from trl_sft.data.formats import CHAT, PAIRS
from trl_sft.recipe import paths
from trl_sft.serving import proof
from trl_sft.serving.export import export_source, exporter, gguf_export, gguf_file, portable_template, vllm_export
from trl_sft.serving.proof import run_prompts, trained_reference

TINY = paths.EMBEDDED / "tiny"
DOCS = Path(__file__).parents[2] / "docs" / "reference"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a finished run with an adapter, whose base model is beside it."""
    folder = tmp_path_factory.mktemp("export")
    return build_run(folder / "My run", build_base(folder / "base", tied=True), scale=0.03, target_modules="all-linear")


@pytest.fixture
def export(tmp_path, capsys, monkeypatch):
    """Return a function that runs `export` in this process: exit code, the text, the output folder."""
    monkeypatch.setattr(trained_reference, "MOST_ANSWER_TOKENS", 4)
    monkeypatch.setattr(run_prompts, "MOST_TRAINING", 4)

    def call(run, formats, *options, output="out"):
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = cli.main(["export", str(run), "--to", formats, "-o", str(tmp_path / output), *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err, tmp_path / output

    return call


def read(output):
    return json.loads((output / "export.json").read_text(encoding="utf-8"))


def test_adapter_is_written_in_every_format_and_proved(run, export):
    code, text, output = export(run, "merged,gguf,ollama,vllm")
    assert code == 0, text
    record = read(output)
    assert sorted(path.name for path in output.iterdir()) == ["export.json", "gguf", "merged", "ollama", "vllm"]
    assert list(record["formats"]) == ["merged", "gguf", "ollama", "vllm"]
    assert record["proof"]["passed"]
    assert [proved["format"] for proved in record["proof"]["exports"]] == list(record["formats"])
    for entry in record["formats"].values():
        folder = output / entry["path"].split("/")[0]
        assert {name: file["bytes"] for name, file in entry["files"].items()} == {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
    modelfile = (output / "ollama" / "Modelfile").read_text(encoding="utf-8")
    assert "FROM ../gguf/My-run-f16.gguf\n" in modelfile
    assert 'PARAMETER stop "<|im_end|>"\n' in modelfile
    assert (output / "ollama" / "../gguf/My-run-f16.gguf").is_file()
    commands = [line.removeprefix("Next: ") for line in text.splitlines() if line.startswith("Next: ")]
    assert len(commands) == 4
    assert commands[1] == f"llama-server -m {output}/gguf/My-run-f16.gguf --jinja"
    assert commands[2].startswith("ollama create my-run -f ")
    words = shlex.split(commands[3])
    assert words[:3] == ["vllm", "serve", str(run.parent / "base")]
    assert words[words.index("--lora-modules") + 1] == f"My-run={output}/vllm"
    assert words[words.index("--max-lora-rank") + 1] == "8"  # of rank 4: the next that vLLM has


def test_gguf_alone_leaves_no_merged_weights_and_holds_more_digits_than_the_base(run, export):
    code, text, output = export(run, "gguf", "--gguf-type", "f32")
    assert code == 0, text
    assert sorted(path.name for path in output.iterdir()) == ["export.json", "gguf"]
    record = read(output)
    assert record["merge"]["delta"]["changed_tensors"] > 0
    assert record["formats"]["gguf"]["tensors"] == {"F32": 20}
    fields = gguf.GGUFReader(output / record["formats"]["gguf"]["path"]).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["general.base_model.0.name"].contents() == "base"


def test_whole_model_is_copied_in_another_dtype_and_its_answer_is_json(run, export):
    code, text, output = export(run.parent / "base", "merged,vllm", "--dtype", "bfloat16", "--json")
    assert code == 0, text
    answer = json.JSONDecoder().raw_decode(text)[0]
    page = (DOCS / "json.md").read_text(encoding="utf-8")
    schema = json.loads(page.split("```json\n")[-1].split("```")[0])
    jsonschema.validate(answer, schema)
    assert answer["formats"]["vllm"]["path"] == "merged"  # one copy serves both
    assert json.loads((output / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert answer["merge"] is None


@pytest.mark.parametrize(
    ("prompt_ids", "text_ids", "adds"),
    [([1, 5], [1, 9], True), ([1, 5], [9], False), ([5], [1, 9], False), ([5], [9], False)],
)
def test_bos_is_added_where_the_tokenizer_and_the_prompts_have_it(prompt_ids, text_ids, adds):
    source = export_source.ExportSource(SimpleNamespace(), None)
    tokenizer = type("Toy", (), {"bos_token_id": 1, "__call__": lambda *_: {"input_ids": text_ids}})()
    vars(source).update(tokenizer=tokenizer, renderer=SimpleNamespace(render=lambda _: SimpleNamespace(ids=prompt_ids)))
    assert source.adds_bos() is adds


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"use_dora": True}, "`use_dora: True`"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save: ['lm_head']`"),
        ({"rank_pattern": {"q_proj": 2}}, "`rank_pattern: {'q_proj': 2}`"),
        ({"trainable_token_indices": [5, 6]}, "`trainable_token_indices: [5, 6]`"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "model.embed_tokens.base_layer.weight and 2 more tensors"),
        ({"target_modules": ["lm_head"]}, "lm_head.base_layer.weight and 2 more tensors"),
        ({"r": 600}, "`r: 600` (at most 512)"),
        ({"use_rslora": True}, ""),
    ],
)
def test_what_vllm_refuses_of_an_adapter_is_listed(lora, words, tmp_path, run):
    base = run.parent / "untied"
    if not base.is_dir():
        build_base(base)
    adapter = build_run(tmp_path / "run", base, **{"target_modules": ["q_proj"]} | lora)
    refused = vllm_export.list_refused(adapter)
    assert words in ", ".join(refused)
    assert bool(refused) is bool(words)


def test_adapter_that_vllm_refuses_goes_by_merging(tmp_path, run, export):
    adapter = build_run(tmp_path / "dora", run.parent / "base", scale=0.03, target_modules=["q_proj"], use_dora=True)
    code, text, output = export(adapter, "vllm")
    assert code == 0, text
    assert "the merged model, because vLLM does not take the adapter: `use_dora: True`" in text
    assert sorted(path.name for path in output.iterdir()) == ["export.json", "vllm"]
    assert f"Next: vllm serve {output}/vllm\n" in text
    assert (output / "vllm" / "model.safetensors").is_file()


BAD = {
    "no such format": ("gguf,onx", (), "`onx` is no format of an export"),
    "no format": (",", (), "is no format of an export"),
    "not quantized": ("gguf", ("--base", "dequantized"), "was not quantized in training"),
    "no checkpoint": ("gguf", ("--at", "3"), "has no checkpoints"),
}


@pytest.mark.parametrize("case", BAD)
def test_arguments_that_cannot_be_carried_out_write_nothing(case, run, export):
    formats, options, words = BAD[case]
    code, text, output = export(run, formats, *options)
    assert (code, output.exists()) == (2, False)
    assert words in text


def change_record(run, **values):
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


FOLDERS = {
    "unfinished": (lambda run: change_record(run, outcome="running"), "the run is not finished"),
    "no run": (lambda run: (run / "adapter_model.safetensors").unlink(), "holds no model"),
    "base gone": (lambda run: shutil.rmtree(run.parent / "base"), "is gone"),
    "another base": (lambda run: build_base(run.parent / "base", hidden_size=64), "is another one"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_run_that_cannot_be_exported_is_refused_before_anything_is_written(case, tmp_path, run, export):
    change, words = FOLDERS[case]
    shutil.copytree(run.parent / "base", tmp_path / "base")
    copy = shutil.copytree(run, tmp_path / "run")
    for path in (copy / "adapter_config.json", copy / "run.json", copy / "resolved.yaml"):
        path.write_text(path.read_text(encoding="utf-8").replace(str(run.parent), str(tmp_path)), encoding="utf-8")
    change(copy)
    code, text, output = export(copy, "gguf")
    assert (code, output.exists()) == (2, False), text
    assert words in text


def test_folder_that_holds_something_and_a_disk_too_small_are_refused(run, export, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    code, text, output = export(run, "gguf")
    assert (code, [path.name for path in output.iterdir()]) == (2, ["file"])
    assert "holds something already" in text
    usage = SimpleNamespace(free=2**20)
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda _: usage)
    code, text, output = export(run, "gguf", output="other")
    assert (code, output.exists()) == (2, False)
    assert "the export needs 16" in text


def test_interrupted_export_leaves_nothing_and_runs_again(run, export, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_file.gguf.GGUFWriter, "write_tensor_data", interrupt)
        code, text, _ = export(run, "gguf")
    assert code == 130
    assert "nothing is left behind" in text
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    assert export(run, "gguf")[0] == 0


def test_export_that_is_not_the_trained_model_is_exit_code_2_and_nothing_is_left(run, export, tmp_path, monkeypatch):
    built = gguf_export.portable_template.build
    monkeypatch.setattr(gguf_export.portable_template, "build", lambda *words: built(*words) + "{{ 'x' }}")
    code, text, output = export(run, "gguf")
    assert (code, output.exists()) == (2, False)
    assert "rendered otherwise" in text
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_missing_package_is_named_with_the_command_that_installs_it(run, export, monkeypatch):
    monkeypatch.setattr(proof, "is_installed", lambda name: name != "xllamacpp")
    code, text, output = export(run, "ollama")
    assert (code, output.exists()) == (2, False)
    assert "trl-sft[gguf]" in text


def build_portable(template, row_type=CHAT, day=None, render=None, **kwargs):
    """Return the portable template of a run."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    renderer = SimpleNamespace(row_type=row_type, encoder=SimpleNamespace(tokenizer=tokenizer), render=render)
    source = SimpleNamespace(folder="run", template_date=day, inference={"chat_template_kwargs": kwargs})
    return portable_template.build(source, renderer), tokenizer


def render_chat(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def test_template_has_the_keywords_and_the_date_of_the_run_and_no_tag_of_transformers():
    own = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{%- generation %} {{ m.content }} {%- endgeneration %}"
        "{% endfor %}{{ 'T' if think else 'N' }}{{ 'none' if x is none }}{{ y.a[1] }}"
    )
    template, tokenizer = build_portable(own, day="2024-05-17", think=False, x=None, y={"a": [1, "ü\n"]})
    assert "generation" not in template
    assert datetime.date.today().isoformat() not in template
    assert render_chat(tokenizer, template) == "17 May 2024 HiNnoneü\n"


def test_wording_becomes_a_template_around_the_last_turn():
    def render(text):
        return SimpleNamespace(ids=tokenizer(f"### Q: {text}\n### A:")["input_ids"])

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    template, tokenizer = build_portable("", row_type=PAIRS, render=render)
    assert render_chat(tokenizer, template) == "### Q: Hi\n### A:"


def test_command_of_vllm_names_the_revision_of_the_base_model(tmp_path):
    entry = {"kind": vllm_export.ADAPTER, "max_lora_rank": 16, "revision": "v 2"}
    words = shlex.split(vllm_export.write_command(entry, tmp_path / "a b", name="mine", base="org/model"))
    assert words[:5] == ["vllm", "serve", "org/model", "--revision", "v 2"]
    assert (
        words[words.index("--tokenizer") + 1] == words[words.index("--generation-config") + 1] == str(tmp_path / "a b")
    )
