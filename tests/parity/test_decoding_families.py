"""The fused decoding of blocks that the C++ kernels know, and PyTorch's of those that they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny_gpt

from lit_gpt.inference import native
from lit_gpt.inference.prepare import prepare_for_inference
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache

BLOCK = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "n_kv_head": 2}
UNKNOWN: list[dict[str, Any]] = [
    {"block_norm": "post"},
    {"block_norm": "both"},
    {"parallel_residual": True},
    {"norm_unit_offset": True},
    {"rotary_dim": 4},
    {"qk_norm_full": True},
    {"attn_scale": 0.2},
    {"sliding_window": 6, "rope_local_theta": 100.0},
    {"mlp": "geglu_tanh"},
]


def prepared(**shape: Any) -> GPT:
    return prepare_for_inference(tiny_gpt(dtype=torch.float32, **{**BLOCK, **shape}), "fp32")


@torch.no_grad()
def decoded(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """Logits of every position, read one by one."""
    cache = KVCache(model.config, 1, idx.size(1), model.cache_dtype)
    logits = []
    for position in range(idx.size(1)):
        logits.append(model(idx[:, position : position + 1], cache=cache.step([0], 1)).logits)
        cache.extend([0], 1)
    return torch.cat(logits, 1)


@pytest.mark.kernels
@pytest.mark.parametrize("shape", UNKNOWN, ids=str)
def test_blocks_that_the_kernels_do_not_know_are_left_to_pytorch(shape: dict[str, Any]) -> None:
    if native.load() is None:
        pytest.skip(f"kernels: {native.status()}")
    assert prepared().decode_kernel is not None
    assert prepared(**shape).decode_kernel is None


@pytest.mark.parametrize("shape", [{}, {"sliding_window": 6}, {"scale_embeddings": True}, *UNKNOWN], ids=str)
def test_decoding_of_every_block_equals_a_whole_pass(shape: dict[str, Any]) -> None:
    idx = torch.randint(257, (1, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = tiny_gpt(dtype=torch.float32, **{**BLOCK, **shape}).double()(idx).logits
    torch.testing.assert_close(decoded(prepared(**shape), idx).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
def test_the_kernels_decode_until_a_sequence_is_longer_than_the_window() -> None:
    if native.load() is None:
        pytest.skip(f"kernels: {native.status()}")
    model = prepared(sliding_window=6)
    assert model.decode_kernel is not None
    cache = KVCache(model.config, 1, 20, model.cache_dtype)
    supported = []
    for _ in range(10):
        step = cache.step([0], 1)
        supported.append(model.decode_kernel.supports(step))
        model(torch.tensor([[3]]), cache=step)
        cache.extend([0], 1)
    assert supported == [True] * 6 + [False] * 4
    assert [model.decode_kernel.supports(KVCache(model.config, 1, 20).step([0], n)) for n in (6, 7)] == [True, False]
