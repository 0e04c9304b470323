"""Memory of one process: what each engine divides, against the arithmetic of its paper."""

import pytest
from conftest import RECIPE
from transformers import LlamaConfig
from trl import SFTConfig

from trl_sft import load_recipe
from trl_sft.training.memory import sharding
from trl_sft.training.memory.estimate import Estimate

ELEMENTS = 8_030_261_248  # of Llama-3-8B
GIB = 2**30
LLAMA = LlamaConfig(hidden_size=4096, num_hidden_layers=32, vocab_size=128256)


@pytest.fixture
def divide(here):
    """Return a function that divides a step of Llama-3-8B: float32 weights, AdamW, 4 GiB of activations."""

    def call(launch, processes, *, mixed=True):
        (here / "recipe.yaml").write_text(f"{RECIPE}launch: {launch}\n")
        weights, state = 4 * ELEMENTS, 8 * ELEMENTS
        whole = Estimate(weights, weights, state, 4 * GIB, 0, 2 * weights + state + 4 * GIB)
        args = SFTConfig(output_dir="out", use_cpu=True, bf16=mixed)
        return sharding.divide(whole, load_recipe("recipe.yaml"), args, config=LLAMA, processes=processes)

    return call


# bytes of an element: weights, gradients, optimizer state; N = 8 processes (arXiv:1910.02054, figure 1)
@pytest.mark.parametrize(
    ("engine", "mixed", "weights", "gradients", "optimizer"),
    [
        ("ddp", True, 4, 4, 8),
        ("zero1", True, 2, 2, 12 / 8),
        ("zero2", True, 2, 2 / 8, 12 / 8),
        ("zero3", True, 2 / 8, 2 / 8, 12 / 8),
        ("zero2", False, 4, 4 / 8, 8 / 8),
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


def test_gathered_layers_and_head_come_on_top_of_divided_weights(divide):
    own = divide("{engine: zero3}", 8)
    gathered = own.peak - own.minimum - own.activations
    head = 2 * 2 * 128256 * 4096
    assert head < gathered < head + 3 * (2 * ELEMENTS - head) / 32


def test_offload_leaves_the_optimizer_off_the_card(divide):
    config = "{zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}"
    assert divide(f"{{engine: zero2, config: {config}}}", 8).optimizer == 0
    assert divide("{engine: fsdp, config: {offload_params: true}}", 8).minimum == 0
