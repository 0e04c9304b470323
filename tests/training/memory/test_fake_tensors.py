"""Fake tensors have shapes and no storage, their bytes are counted, and PyTorch's private parts are as they were."""

import gc
import importlib.util

import pytest
import torch

from trl_sft.training.memory import cuda_kernels
from trl_sft.training.memory.fake_model import Batch, Borders, build_batch
from trl_sft.training.memory.fake_tensors import LiveBytes, count_bytes, fake_tensors, real_tensors

KIB = 2**10


def test_fake_tensor_has_no_storage_and_a_real_one_inside_the_block_has():
    with fake_tensors():
        fake = torch.empty(2**40, 8)  # 32 TiB
        with real_tensors():
            real = torch.ones(3)
    assert fake.shape == (2**40, 8)
    assert real.tolist() == [1, 1, 1]


def test_bytes_are_counted_once_for_each_storage_and_until_it_is_freed():
    with fake_tensors(), LiveBytes(labelled=0) as live:
        first = torch.empty(KIB, dtype=torch.uint8)
        view = first.view(2, -1)
        second = torch.empty(2 * KIB, dtype=torch.uint8)
        assert live.now == 3 * KIB
        assert count_bytes([first, view, second]) == 3 * KIB
        del second
        assert (live.now, live.peak) == (KIB, 3 * KIB)
        assert live.reset_peak() == live.peak == KIB
        del first, view
        gc.collect()
        assert live.now == 0


def test_mask_picks_as_many_positions_as_the_batch_has_labels():
    with fake_tensors(), LiveBytes(labelled=5):
        rows = torch.empty(4, 16, 8)
        assert rows[torch.ones(4, 16, dtype=torch.bool)].shape == (5, 8)
        assert torch.ones(7).nonzero().shape == (7, 1)  # at most all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_of_a_gpu_give_the_shape_of_attention(masked, dtype):
    with fake_tensors():
        query, key = torch.empty(2, 4, 6, 8, dtype=dtype), torch.empty(2, 2, 6, 8, dtype=dtype)
        mask = torch.ones(2, 1, 6, 6, dtype=torch.bool) if masked else None
        output, weights = cuda_kernels.attend(torch.nn.Module(), query, key, key, mask)
    assert (output.shape, output.dtype, weights) == ((2, 6, 4, 8), dtype, None)


def test_batch_has_the_shapes_of_trls_collator():
    padded = build_batch(Batch(2, 8, 10, padded=True))
    assert {name: tuple(tensor.shape) for name, tensor in padded.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (2, 8)
    )
    flat = build_batch(Batch(2, 8, 10, flat=True, documents=(3, 5, 7)))
    assert flat["input_ids"].shape == flat["position_ids"].shape == (1, 15)
    assert flat["cu_seq_lens_q"] == flat["cu_seq_lens_k"] == Borders([0, 3, 8, 15])
    assert flat["max_length_q"] == flat["max_length_k"] == 7


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is optional")
def test_bitsandbytes_builds_real_tables_inside_the_block_and_keeps_none(monkeypatch):
    from bitsandbytes import functional
    from bitsandbytes.optim import GlobalOptimManager

    monkeypatch.setitem(functional.name2qmap, "earlier", functional.create_dynamic_map(signed=False))
    manager = GlobalOptimManager.get_instance()
    tables, state = dict(functional.name2qmap), dict(vars(manager))
    function = functional.create_dynamic_map
    with fake_tensors():
        table = functional.create_dynamic_map(signed=True)
        functional.name2qmap["trial"] = table
    assert float(table[0]) < float(table[-1])  # it has values
    assert functional.create_dynamic_map is function
    assert functional.name2qmap.keys() == tables.keys()
    assert all(torch.equal(functional.name2qmap[name], table) for name, table in tables.items())
    assert vars(GlobalOptimManager.get_instance()) == state
