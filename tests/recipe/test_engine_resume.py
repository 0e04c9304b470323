"""A checkpoint of another engine, or of another number of processes under ZeRO, is refused by name."""

from pathlib import Path

import pytest

from trl_sft.recipe import build, engine_resume

RECIPE = "model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl}\n"
FILES = {  # as transformers 5.23 with accelerate 1.15 and DeepSpeed 0.19.8 saves them with two processes
    "ddp": ("model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"),
    "fsdp": ("pytorch_model_fsdp.bin", "optimizer.bin", "rng_state_0.pth", "rng_state_1.pth"),
    "fsdp in shards": ("pytorch_model_fsdp_0/a", "optimizer_0/a", "rng_state_0.pth", "rng_state_1.pth"),
    "zero2": ("model.safetensors", "optimizer.pt", "global_step2/a", "rng_state_0.pth", "rng_state_1.pth"),
}


@pytest.mark.parametrize("saved", FILES)
@pytest.mark.parametrize("engine", ["auto", "ddp", "fsdp", "zero2", "zero3"])
def test_checkpoint_is_read_by_its_own_kind_of_engine_alone(here, monkeypatch, saved, engine):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in FILES[saved]:
        path = Path("out/checkpoint-2", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    Path("recipe.yaml").write_text(RECIPE + f"launch: {{engine: {engine}}}\n")
    fault = engine_resume.check(build.load_run("recipe.yaml"), Path("out/checkpoint-2"))
    kinds = {"auto": "ddp", "ddp": "ddp", "fsdp": "fsdp", "zero2": "zero2", "zero3": "zero2"}
    if saved.partition(" ")[0] == kinds[engine]:
        assert fault is None
    else:
        assert fault.code == "resume.other_engine"
        assert "cannot read its optimizer" in fault.problem
        assert "Set `launch.engine` to" in fault.fix


@pytest.mark.parametrize(("processes", "is_refused"), [(2, False), (4, True)])
def test_checkpoint_of_zero_needs_as_many_processes_as_saved_it(here, monkeypatch, processes, is_refused):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for name in FILES["zero2"]:
        path = Path("out/checkpoint-2", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    Path("recipe.yaml").write_text(RECIPE + "launch: {engine: zero2}\n")
    fault = engine_resume.check(build.load_run("recipe.yaml"), Path("out/checkpoint-2"))
    assert bool(fault) == is_refused
    assert not fault or "has the optimizer of 2 processes, and 4 train" in fault.problem
