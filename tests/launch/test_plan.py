"""What a launch would run: processes, hosts, options of torchrun, and what a host cannot run."""

import json
import shlex
import sys

import pytest
from conftest import RECIPE

from trl_sft import cli, load_recipe
from trl_sft.errors import LaunchError, RecipeError
from trl_sft.launch import plan as plans
from trl_sft.launch import ray_plan
from trl_sft.launch.plan import HostOptions
from trl_sft.model import device
from trl_sft.recipe import engines


@pytest.fixture
def make(here, monkeypatch):
    """Return a function that makes the plan of RECIPE with more lines, on a host with a number of cards."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(text="", *, cards=0, deepspeed=True, **options):
        monkeypatch.setattr(plans, "count_cards", lambda: cards)
        monkeypatch.setattr(plans, "has_package", lambda _: deepspeed)
        (here / "recipe.yaml").write_text(RECIPE + text)
        return plans.make_plan(load_recipe("recipe.yaml"), HostOptions(**options))

    return call


def test_one_host_takes_a_process_for_each_card_and_needs_no_address(make):
    plan = make(cards=8)
    assert plan.words == ["--nnodes=1", "--nproc-per-node=8", "--standalone", "-m", "trl_sft", "recipe.yaml"]
    assert make("launch: {nproc_per_node: 2}\n", cards=8).processes == 2
    assert make("launch: {nproc_per_node: 2}\n", cards=8, processes=4).processes == 4


def test_hosts_meet_at_host_0(make):
    plan = make("launch: {nproc_per_node: 8}\n", cards=8, hosts=2, host_rank=1, host="10.0.0.1")
    assert plan.options == (
        *("--nnodes=2", "--nproc-per-node=8", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29500"),
    )
    assert plan.total == 16
    assert "this is host 1" in plan.summarize()


def test_options_of_torchrun_are_handed_on(make):
    text = "launch: {nproc_per_node: 2, nnodes: 2, rdzv_backend: c10d, rdzv_endpoint: 'a:1', max_restarts: 3}\n"
    options = make(text).options
    assert options[2:] == ("--rdzv-backend=c10d", "--rdzv-endpoint=a:1", "--max-restarts=3")


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        ("", {}, "this host has no card, so the number of processes is not known"),
        ("launch: {nproc_per_node: 4}\n", {"cards": 2}, "4 processes on a host with 2 cards"),
        ("launch: {nproc_per_node: 2, engine: fsdp}\n", {}, "FSDP needs a card for each process"),
        ("launch: {nproc_per_node: 1, engine: zero2}\n", {"cards": 1}, "is for several processes, and the run has one"),
        ("launch: {engine: zero2}\n", {"cards": 2, "deepspeed": False}, "pip install 'trl-sft[deepspeed]'"),
        ("launch: {nnodes: 2}\n", {"cards": 2}, "nothing says where they meet"),
        ("launch: {nnodes: '1:4'}\n", {"cards": 2}, "Set `nnodes: 4`"),
        ("", {"cards": 2, "hosts": 2, "host": "a", "host_rank": 2}, "this is host 2 of 2"),
        ("", {"cards": 2, "host_rank": 1}, "Add --hosts NUMBER, or remove the number of the host."),
        ("", {"cards": 2, "host": "a"}, "a has no effect: the run takes one host"),
        ("launch: {master_port: 29600}\n", {"cards": 2}, "Remove launch.master_port, or add --hosts NUMBER."),
        ("launch: {rdzv_endpoint: a}\n", {"cards": 2, "hosts": 2, "host": "b"}, "the hosts meet as `launch.rdzv_"),
        ("launch: {standalone: true}\n", {"cards": 2, "hosts": 2, "host": "b"}, "`standalone` is for one host"),
        ("", {"cards": 2, "hosts": 2, "host": "b", "port": 70000}, "70000 is no port"),
        ("run: {global_batch_size: 6}\n", {"cards": 2}, "6 is not a multiple of 4 = 2 per device x 2 processes"),
        ("run: {global_batch_size: 12}\n", {"cards": 2, "hosts": 2, "host": "a"}, "12 is not a multiple of 8"),
        ("launch: {engine: zero2, config: {zero_optimization: {stage: 3}}}\n", {"cards": 2}, "stage` is 3"),
        ("launch: {engine: zero2, config: {deepspeed_config: {zero_stage: 2}}}\n", {"cards": 2}, "file of accelerate"),
        ("launch: {engine: fsdp, config: {zero_optimization: {stage: 3}}}\n", {"cards": 2}, "key of DeepSpeed"),
        (
            "launch: {engine: zero3, config: {zero_optimization: {stage: 3, "
            "stage3_gather_16bit_weights_on_model_save: false}}}\n",
            {"cards": 2},
            "would end without a model",
        ),
    ],
)
def test_what_a_host_cannot_run_is_refused_before_a_process_starts(make, text, options, problem):
    with pytest.raises((LaunchError, RecipeError)) as error:
        make(text, **options)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("WORLD_SIZE", "2", "under the other launcher, or unset WORLD_SIZE."),
        ("SLURM_STEP_TASKS_PER_NODE", "8(x2)", "Add --ntasks-per-node=1 to srun"),
    ],
)
def test_launch_inside_another_launch_is_refused(here, capsys, monkeypatch, name, value, fix):
    (here / "recipe.yaml").write_text(RECIPE)
    monkeypatch.setenv(name, value)
    assert cli.main(["launch", "recipe.yaml", "--processes", "2"]) == 2
    assert fix in capsys.readouterr().err
    assert not (here / "out").exists()


def test_streamed_rows_are_refused_with_several_processes(make, here):
    make(processes=2)
    run = load_recipe("recipe.yaml", ["data.train={path: rows.jsonl, streaming: true}"])
    with pytest.raises(LaunchError, match="streamed to one process alone, and 2 train"):
        plans.make_plan(run, HostOptions(processes=2))
    assert plans.make_plan(run, HostOptions(processes=1)).total == 1


def test_streamed_rows_are_refused_in_a_process_that_another_launcher_started(here, monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    (here / "recipe.yaml").write_text(RECIPE)
    run = load_recipe("recipe.yaml", ["data.train={path: rows.jsonl, streaming: true}"])
    with pytest.raises(LaunchError, match="streamed to one process alone, and 2 train"):
        device.check_machine(run)
    monkeypatch.setenv("WORLD_SIZE", "1")
    device.check_machine(run)


def test_configuration_of_an_engine_is_handed_on_as_it_is(built_launch):
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_gather_16bit_weights_on_model_save": True}
    deepspeed = {"zero_optimization": zero, "anything": 1}
    assert built_launch({"engine": "zero3", "config": deepspeed}) == {"deepspeed": deepspeed}
    fsdp = {"fsdp_version": 2, "fsdp_offload_params": True}
    assert built_launch({"engine": "fsdp", "config": {"distributed_type": "FSDP", "fsdp_config": fsdp}}) == {
        "fsdp": True,
        "fsdp_config": {"version": 2} | fsdp,
    }
    without = {"zero_optimization": {"stage": 3}}  # such a run would end without a model
    assert built_launch({"engine": "zero3", "config": without})["deepspeed"]["zero_optimization"] == {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    assert built_launch({"engine": "zero3"})["deepspeed"]["zero_optimization"][
        "stage3_gather_16bit_weights_on_model_save"
    ]
    assert built_launch({"engine": "zero1"})["deepspeed"]["zero_optimization"] == {"stage": 1}
    assert built_launch({"engine": "auto"}) == {}


@pytest.fixture
def built_launch(here):
    def call(launch):
        (here / "recipe.yaml").write_text(f"{RECIPE}launch: {json.dumps(launch)}\n")
        return engines.build_arguments(load_recipe("recipe.yaml"))

    return call


def test_dry_run_prints_the_command_that_would_run(here, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (here / "recipe.yaml").write_text(RECIPE)
    assert cli.main(["launch", "recipe.yaml", "train.max_steps=1", "--processes", "2", "--dry-run"]) == 0
    summary, threads, command = capsys.readouterr().out.splitlines()
    assert summary == "# 2 processes, engine ddp"
    assert threads.startswith("OMP_NUM_THREADS=")
    words = shlex.split(command)
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert words[3:] == [
        *("--nnodes=1", "--nproc-per-node=2", "--standalone", "-m", "trl_sft", "recipe.yaml", "train.max_steps=1"),
    ]
    assert not (here / "out").exists()


def test_batch_file_starts_the_same_command_on_each_host(here, capsys):
    (here / "recipe.yaml").write_text(RECIPE)
    words = ["launch", "recipe.yaml", "--processes", "2", "--hosts", "2", "--slurm", "job.sh"]
    assert cli.main(words) == 0
    text = (here / "job.sh").read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=2" in text
    assert "launch recipe.yaml --processes 2 --hosts 2 --host-rank" in text
    assert "Next: sbatch job.sh" in capsys.readouterr().out


@pytest.fixture
def make_ray(make, monkeypatch):
    """Return a function that makes the plan of a run under Ray, whether it is installed or not."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(config="", *, has_ray=True, more="", **options):
        monkeypatch.setattr(ray_plan, "has_ray", lambda: has_ray)
        config = f", config: {config}" if config else ""
        return make(f"launch: {{engine: ray, nproc_per_node: 2{config}{more}}}\n", **options)

    return call


def test_ray_gets_a_cluster_of_its_own_without_dashboard_and_statistics(make_ray):
    plan = make_ray()
    assert plan.ray.scaling_config == {"num_workers": 2, "use_gpu": False}
    assert plan.ray.init["address"] == "local"
    assert plan.ray.init["include_dashboard"] is False
    assert plan.ray.init["object_store_memory"] == 100 * 2**20
    assert plan.environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert plan.words == ["-m", "trl_sft", "recipe.yaml"]
    assert make_ray(cards=2).ray.scaling_config["use_gpu"] is True
    assert make_ray(hosts=2).ray.scaling_config["num_workers"] == 4  # the command runs once


def test_ray_cluster_at_an_address_gets_no_local_resources(make_ray, monkeypatch, here):
    plan = make_ray("{init: {address: 'head:6379'}, scaling_config: {placement_strategy: SPREAD}}", processes=8)
    assert set(plan.ray.init) == {"address", "log_to_driver", "logging_level"}
    assert plan.ray.scaling_config == {"num_workers": 8, "use_gpu": True, "placement_strategy": "SPREAD"}
    assert plan.ray.run_config == {"storage_path": str(here), "name": ".out.ray"}  # on the disk that hosts share
    assert "OMP_NUM_THREADS" not in plan.environment  # Ray gives each worker its share
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    (here / "recipe.yaml").write_text(f"{RECIPE}launch: {{engine: ray, nproc_per_node: 2}}\n")
    assert plans.make_plan(load_recipe("recipe.yaml"), HostOptions()).ray.init["address"] == "auto"


@pytest.mark.parametrize(
    ("config", "options", "problem"),
    [
        ("", {"has_ray": False}, "pip install 'trl-sft[ray]'"),
        ("", {"cards": 1}, "2 processes on a host with 1 card"),
        ("", {"processes": 1}, "`ray` is for several processes, and the run has one"),
        ("", {"more": ", rdzv_backend: c10d"}, "`rdzv_backend` is an option of torchrun"),
        ("", {"host_rank": 0, "port": 1}, "Remove --host-rank."),
        ("{scaling: {}}", {}, "Did you mean `scaling_config`?"),
        ("{init: local}", {}, '`init` is "local" (text), and has to be a mapping'),
        ("{scaling_config: {num_workers: 4}}", {}, "add --processes NUMBER"),
        ("{run_config: {failure_config: {max_failures: 3}}}", {}, "the same command resumes after a failure"),
        ("{zero_optimization: {stage: 2}}", {}, "this is the configuration of FSDP or DeepSpeed"),
    ],
)
def test_what_ray_cannot_run_is_refused_before_a_cluster_starts(make_ray, config, options, problem):
    with pytest.raises((LaunchError, RecipeError)) as error:
        make_ray(config, **options)
    assert problem in str(error.value)


def test_keys_of_ray_have_its_names_and_types(make_ray):
    pytest.importorskip("ray")
    assert make_ray("{scaling_config: {resources_per_worker: {CPU: 2}}}").ray.init["num_cpus"] >= 4
    with pytest.raises(RecipeError) as error:
        make_ray("{init: {adress: auto}, scaling_config: {placement_strategy: 3, resources_per_worker: 2}}")
    text = str(error.value)
    assert "recipe.yaml:9 launch.config.init.adress" in text
    assert "Did you mean `address`?" in text
    assert "`scaling_config.placement_strategy` is 3 (whole number), and has to be text" in text
    assert "has to be a mapping, or null" in text


def test_dry_run_of_ray_prints_its_calls_and_the_command_of_a_worker(here, capsys, monkeypatch):
    monkeypatch.setattr(ray_plan, "has_ray", lambda: True)
    (here / "recipe.yaml").write_text(RECIPE)
    words = ["launch", "recipe.yaml", "launch.engine=ray", "train.use_cpu=true", "--processes", "2", "--dry-run"]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# 2 processes, engine ray"
    assert lines[1].startswith("# ray.init(address='local', ")
    assert lines[2] == "# scaling_config = ScalingConfig(num_workers=2, use_gpu=False)"
    assert "RAY_USAGE_STATS_ENABLED=0 \\" in lines
    command = [sys.executable, "-m", "trl_sft", "recipe.yaml", "launch.engine=ray", "train.use_cpu=true"]
    assert shlex.split(lines[-1]) == command
