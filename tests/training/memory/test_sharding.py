"""Memory of one process: what each engine divides, against the arithmetic of its paper."""

import pytest
from conftest import RECIPE
from transformers import LlamaConfig
from trl import SFTConfig

from trl_sft import load_recipe
from trl_sft.training.memory import sharding
from trl_sft.training.memory.estimate import Estimate
from trl_sft.training.memory.fake_model import Batch

ELEMENTS = 8_030_261_248  # of Llama-3-8B
GIB = 2**30
TOKENS = 2**20
LLAMA = LlamaConfig(
    hidden_size=4096, num_hidden_layers=32, vocab_size=128256, num_attention_heads=32, num_key_value_heads=8
)


@pytest.fixture
def divide(here):
    """Return a function that divides a step of Llama-3-8B: float32 weights, AdamW, 4 GiB of activations."""

    def call(launch, processes, *overrides, mixed=True, size=4):
        (here / "recipe.yaml").write_text(f"{RECIPE}launch: {launch}\n")
        weights, state = size * ELEMENTS, 2 * size * ELEMENTS
        whole = Estimate(weights, weights, state, 4 * GIB, 0, 2 * weights + state + 4 * GIB)
        run = load_recipe("recipe.yaml", overrides)
        steps = run.train.get("gradient_accumulation_steps", 1)
        args = SFTConfig(output_dir="out", use_cpu=True, bf16=mixed, gradient_accumulation_steps=steps)
        return sharding.divide(whole, run, args, config=LLAMA, batch=Batch(1, TOKENS, 1), processes=processes)

    return call


# bytes of an element: weights, gradients, optimizer state; N = 8 processes (arXiv:1910.02054, figure 1)
@pytest.mark.parametrize(
    ("engine", "mixed", "weights", "gradients", "optimizer"),
    [
        ("ddp", True, 4, 4, 8),
        ("zero1", True, 2, 2, 12 / 8),
        ("zero2", True, 2, 2 / 8, 12 / 8),
        ("zero3", True, 2 / 8, 2 / 8, 12 / 8),
        ("zero1", False, 4, 4, 12 / 8),  # DeepSpeed clones float32 weights for the optimizer too
        ("zero2", False, 4, 4 / 8, 12 / 8),
        ("zero3", False, 4 / 8, 4 / 8, 12 / 8),
        ("fsdp", True, 4 / 8, 4 / 8, 8 / 8),
    ],
)
def test_engine_divides_what_its_paper_says(divide, engine, mixed, weights, gradients, optimizer):
    own = divide(f"{{engine: {engine}}}", 8, mixed=mixed)
    parts = [part / ELEMENTS for part in (own.weights, own.gradients, own.optimizer)]
    assert parts == pytest.approx([weights, gradients, optimizer], rel=1e-6)
    assert own.peak >= own.minimum + own.activations


def test_buckets_of_ddp_take_the_gradients_once_more(divide):
    one, two = divide("{engine: ddp}", 1), divide("{engine: ddp}", 2)
    assert two.peak - one.peak == one.gradients


HEAD, BUCKET = 128256 * 4096, 500_000_000  # elements
ZERO3_BUFFERS = 2 * (BUCKET + 2 * HEAD)  # a bucket, a whole gradient, and a copy of what is scattered


@pytest.mark.parametrize(
    ("engine", "config", "overrides", "elements"),
    [
        ("zero1", "{stage: 1}", [], BUCKET),
        ("zero1", "{stage: 1, overlap_comm: true}", [], 2 * BUCKET),
        ("zero2", "{stage: 2}", [], BUCKET + HEAD),
        ("zero2", "{stage: 2, reduce_bucket_size: 2.0e8}", [], 200_000_000 + HEAD),
        ("zero2", "{stage: 2, reduce_bucket_size: auto}", [], 4096**2 + HEAD),  # transformers: hidden size squared
        ("zero2", "{stage: 2}", ["train.gradient_accumulation_steps=2"], BUCKET + HEAD + ELEMENTS // 8),
    ],
)
def test_zero_takes_a_bucket_and_a_whole_gradient_in_the_backward_pass(divide, engine, config, overrides, elements):
    own = divide(f"{{engine: {engine}, config: {{zero_optimization: {config}}}}}", 8, *overrides)
    update = 8 * ELEMENTS / 8 - own.gradients  # share in 16 bits, flat copy, float32 copy
    assert own.buffers == pytest.approx(max(2 * elements, update), rel=1e-6)
    assert own.peak >= own.minimum + own.activations + 2 * elements


def test_float32_gradients_of_the_update_count_where_they_are_more_than_the_buckets(divide):
    config = "{zero_optimization: {stage: 2, reduce_bucket_size: 1000}}"
    own = divide(f"{{engine: zero2, config: {config}}}", 2)
    assert own.gradients + own.buffers == pytest.approx(8 * ELEMENTS / 2, rel=1e-6)
    assert divide(f"{{engine: zero2, config: {config}}}", 2, mixed=False).buffers == pytest.approx(4 * ELEMENTS / 2)
    offloaded = config.replace("stage: 2", "stage: 2, offload_optimizer: {device: cpu}")
    assert divide(f"{{engine: zero2, config: {offloaded}}}", 2).buffers == pytest.approx(2 * (HEAD + 1000))


def test_gathered_layers_and_head_come_on_top_of_divided_weights(divide):
    own = divide("{engine: zero3}", 8)
    gathered = own.peak - own.minimum - own.activations - ZERO3_BUFFERS
    head = 2 * 2 * 128256 * 4096
    assert head < gathered < head + 3 * (2 * ELEMENTS - head) / 32


def test_offload_leaves_the_optimizer_off_the_card(divide):
    config = "{zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}"
    assert divide(f"{{engine: zero2, config: {config}}}", 8).optimizer == 0
    assert divide("{engine: fsdp, config: {offload_params: true}}", 8).minimum == 0


def test_trained_weights_are_float32_under_fsdp_and_mixed_precision(divide):
    """accelerate's `fsdp2_prepare_model` makes them so."""
    own = divide("{engine: fsdp}", 8, "model.dtype=bfloat16", size=2)
    parts = [part / ELEMENTS for part in (own.weights, own.gradients, own.optimizer)]
    assert parts == pytest.approx([4 / 8, 4 / 8, 8 / 8], rel=1e-6)
    plain = divide("{engine: fsdp}", 8, "model.dtype=bfloat16", "train.bf16=false", size=2, mixed=False)
    assert plain.weights == pytest.approx(2 / 8 * ELEMENTS, rel=1e-6)


def test_replicas_keep_copies_of_the_divided_weights(divide):
    mapping = "train.parallelism_config={dp_replicate_size: 2, dp_shard_size: 4}"
    assert divide("{engine: fsdp}", 8, mapping).weights == divide("{engine: fsdp}", 4).weights


# bytes that the attention of one layer exchanges, for 2**20 tokens of 32 heads, 8 key heads of 128 numbers in 16 bits
EXCHANGED = {
    "{cp_size: 8}": 2 * TOKENS * 8 * 128 * 2,  # keys and values of the whole row
    "{cp_size: 8, cp_handler: {cp_comm_strategy: alltoall}}": 4 * TOKENS // 8 * 8 * 128 * 2,
    "{sp_size: 8}": 2 * TOKENS // 8 * (32 + 8) * 128 * 2,
    "{sp_size: 16}": 2 * TOKENS // 16 * (32 + 16) * 128 * 2,  # keys and values are repeated for 16 processes
}


@pytest.mark.parametrize("mapping", EXCHANGED)
def test_processes_that_share_a_row_exchange_what_attention_needs(divide, mapping):
    engine = "{engine: fsdp}" if "cp_size" in mapping else "{engine: zero3}"
    processes = 16 if "16" in mapping else 8
    shared = divide(engine, processes, f"train.parallelism_config={mapping}")
    assert shared.peak - divide(engine, processes).peak == EXCHANGED[mapping]


def test_processes_that_share_a_row_compute_a_part_of_its_tokens(here):
    (here / "recipe.yaml").write_text(RECIPE)
    run = load_recipe("recipe.yaml", ["train.parallelism_config={cp_size: 4, dp_shard_size: 2}"])
    batch = Batch(2, 1000, 300, padded=True)
    assert sharding.divide_batch(batch, run, 8) == Batch(2, 250, 300, padded=False)
    assert sharding.divide_batch(batch._replace(labelled=2000), run, 8).labelled == 500
    assert sharding.divide_batch(batch, run, 1) == batch


def test_tensor_parallelism_divides_the_layers_and_leaves_embedding_and_head(divide):
    own = divide("{}", 8, "model.distributed_config={tp_size: 8}", "train.save_strategy='no'")
    outside = 4 * 2 * 128256 * 4096
    assert own.weights == pytest.approx(outside + (4 * ELEMENTS - outside) / 8, rel=1e-6)
