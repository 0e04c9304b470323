"""The global batch size; what one process cannot do is reported with its line, apart from faults of the recipe."""

import json

import pytest
import yaml
from conftest import RECIPE, jsonl
from trl import SFTConfig

from trl_sft import load_recipe, train
from trl_sft.errors import LaunchError, RecipeError
from trl_sft.recipe import processes


@pytest.fixture
def built(here):
    """Return the checked RECIPE with more lines and overrides."""

    def call(text="", *words):
        (here / "recipe.yaml").write_text(RECIPE + text)
        return load_recipe("recipe.yaml", words)

    return call


def test_global_batch_size_is_the_rows_of_an_optimizer_step(built, here, micro_batches):
    result = train(built("run: {global_batch_size: 12}\n"))
    rows = [sum(n for step, n in micro_batches if step == number) for number in range(2)]
    assert rows == [12, 12]
    assert {n for _, n in micro_batches} == {2}
    resolved = yaml.safe_load((result.output_dir / "resolved.yaml").read_text())
    assert resolved["train"]["gradient_accumulation_steps"] == 6
    assert resolved["run"]["global_batch_size"] == 12


def test_global_batch_size_is_shown_with_its_factors(go):
    code, out, _ = go(RECIPE + "run: {global_batch_size: 4}\n", command=["check"])
    assert code == 0
    assert "gradient_accumulation_steps: 2, for run.global_batch_size 4 = 2 per device x 1 process x 2" in out


def test_global_batch_size_counts_all_processes(built):
    key = ("train", "gradient_accumulation_steps")
    run = built("run: {global_batch_size: 32}\n")
    assert [processes.compute_settings(run, n)[key].value for n in (1, 2, 16)] == [16, 8, 1]
    default_size = built("run: {global_batch_size: 32}\n", "train.per_device_train_batch_size=null")
    assert (
        processes.compute_settings(default_size)[key].value == 32 // SFTConfig(bf16=False).per_device_train_batch_size
    )
    assert processes.compute_settings(built()) == {}
    with pytest.raises(RecipeError, match=r"32 is not a multiple of 6 = 2 per device x 3 processes\n.*Write 30 or 36"):
        processes.compute_settings(run, 3)


@pytest.mark.parametrize(
    ("text", "where", "fix"),
    [
        ("run: {global_batch_size: 7}\n", "recipe.yaml:9 run.global_batch_size", "-> Write 6 or 8"),
        ("run: {global_batch_size: 1}\n", "recipe.yaml:9 run.global_batch_size", "-> Write 2, or"),
        (
            "  gradient_accumulation_steps: 3\nrun: {global_batch_size: 4}\n",
            "recipe.yaml:9 train.gradient_accumulation_steps",
            "-> Remove one of the two keys.",
        ),
        (
            "  auto_find_batch_size: true\nrun: {global_batch_size: 4}\n",
            "recipe.yaml:9 train.auto_find_batch_size",
            "-> Remove one of the two.",
        ),
    ],
)
def test_impossible_global_batch_size_is_refused_before_the_weights_load(go, here, text, where, fix):
    code, _, err = go(RECIPE + text)
    assert code == 2
    assert where in err
    assert fix in err
    assert not (here / "out").exists()


def test_accumulation_that_agrees_with_the_global_batch_size_is_accepted(built):
    run = built("  gradient_accumulation_steps: 2\nrun: {global_batch_size: 4}\n")
    assert processes.compute_settings(run) == {}
    assert train(run).steps == 2


def test_another_global_batch_size_changes_the_fingerprint(built):
    from trl_sft.recipe import resolved

    fingerprints = {resolved.compute_fingerprint(built(f"run: {{global_batch_size: {n}}}\n")) for n in (4, 8)}
    assert len(fingerprints) == 2
    assert resolved.compute_fingerprint(built("launch: {engine: ddp}\n")) == resolved.compute_fingerprint(built())


def test_keys_that_need_several_processes_are_faults_of_one_process_not_of_the_recipe(built, go, here):
    text = "launch:\n  engine: zero2\n  config: ds.json\n  nproc_per_node: 8\n  nnodes: 2\n  rdzv_backend: c10d\n"
    (here / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    run = built(text)  # the recipe itself is right
    assert run.launch["config"] == str((here / "ds.json").resolve())
    faults = processes.check(run)
    assert [fault.where for fault in faults] == [
        "recipe.yaml:10 launch.engine",
        "recipe.yaml:12 launch.nproc_per_node",
        "recipe.yaml:13 launch.nnodes",
    ]
    with pytest.raises(LaunchError, match="python -m trl_sft launch RECIPE"):
        train(run)
    for command in ([], ["check"]):
        code, _, err = go(RECIPE + text, command=command)
        assert code == 2
        assert "`zero2` needs DeepSpeed" in err
    assert not (here / "out").exists()


def test_preview_accepts_a_recipe_for_several_processes(go):
    code, out, _ = go(RECIPE + "launch: {engine: zero3, nproc_per_node: 8}\n", command=["preview"])
    assert code == 0
    assert "plus" in out


@pytest.mark.parametrize("engine", ["auto", "ddp"])
def test_one_process_trains_under_auto_and_ddp(built, here, engine):
    result = train(built(f"launch: {{engine: {engine}, nproc_per_node: 1, nnodes: '1:1'}}\n"))
    assert result.steps == 2
    resolved = yaml.safe_load((result.output_dir / "resolved.yaml").read_text())
    assert resolved["launch"]["engine"] == engine


def test_config_of_an_engine_is_a_mapping_or_an_existing_file(built, here):
    assert built("launch: {engine: fsdp, config: {reshard_after_forward: true}}\n").launch["config"] == {
        "reshard_after_forward": True
    }
    with pytest.raises(RecipeError, match=r"recipe.yaml:9 launch.config\n.*there is no such file"):
        built("launch: {engine: zero2, config: gone.json}\n")
    jsonl(here / "ds.yaml", [{}])
    assert built("launch: {engine: ray, config: ds.yaml}\n").launch["config"].endswith("ds.yaml")
