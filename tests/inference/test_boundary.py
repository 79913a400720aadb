"""What the kernels do with tensors that are not what they read: they convert, leave them to PyTorch or refuse them."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from lit_gpt.inference.decode_kernel import FusedDecode
from lit_gpt.inference.kernel_linear import KernelBf16Linear, KernelInt4Linear, KernelInt8Linear, KernelLinear
from lit_gpt.inference.prepare import prepare_for_inference
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import CacheStep, KVCache

pytestmark = pytest.mark.kernels

CONFIG = GPTConfig(vocab_size=50, block_size=32, n_layer=2, n_head=4, n_embd=32)
kinds = pytest.mark.parametrize("kind", [KernelLinear, KernelBf16Linear, KernelInt8Linear, KernelInt4Linear])


def prepared(config: GPTConfig = CONFIG, precision: str = "fp32") -> GPT:
    torch.manual_seed(0)
    return prepare_for_inference(GPT(config), precision)


def decode(model: GPT, cache_dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of twelve steps in two slots."""
    cache, results = KVCache(model.config, 2, 32, cache_dtype), []
    for position in range(12):
        idx = torch.tensor([[position], [3 * position]])
        results.append(model(idx, cache=cache.step([0, 1], 1)).logits.double())
        cache.extend([0, 1], 1)
    return torch.stack(results)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_linear_layer_converts_another_dtype(kind: type, dtype: torch.dtype) -> None:
    layer, x = kind(nn.Linear(96, 48)), torch.randn(3, 96).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x.float()).to(dtype))


@kinds
def test_a_linear_layer_reads_strided_inputs_as_they_are_meant(kind: type) -> None:
    layer, x = kind(nn.Linear(32, 48)), torch.randn(32, 5)
    assert torch.equal(layer(x.t()), layer(x.t().contiguous()))
    row = torch.randn(1, 32)
    assert torch.equal(layer(row.expand(4, 32)), layer(row.repeat(4, 1)))


@kinds
def test_a_linear_layer_refuses_what_is_not_its_input(kind: type) -> None:
    layer, freed = kind(nn.Linear(32, 48)), torch.randn(2, 32)
    freed.untyped_storage().resize_(0)
    for x in (torch.randn(2, 12), torch.randn(2, 48), freed):
        with pytest.raises(ValueError, match="a linear layer of 32 inputs got"):
            layer(x)
    for x in (torch.zeros(2, 32, device="meta"), torch.zeros(2, 32, dtype=torch.long), torch.zeros(2, 32) * 1j):
        with pytest.raises(TypeError, match="needs a tensor of floating-point numbers"):
            layer(x)


@kinds
def test_a_linear_layer_without_memory_is_refused(kind: type) -> None:
    freed = nn.Linear(32, 48)
    freed.weight.untyped_storage().resize_(0)
    for linear in (freed, nn.Linear(32, 48, device="meta")):
        with pytest.raises(ValueError, match="the kernels need the weight as contiguous"):
            kind(linear)


def test_fp32_asks_for_no_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = KernelLinear(nn.Linear(24, 48))
    monkeypatch.setattr(layer, "_scratch_bytes", None)
    assert layer(torch.randn(2, 24)).shape == (2, 48)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.inference_mode()
def test_a_model_cast_after_it_was_prepared_decodes_right(precision: str, dtype: torch.dtype) -> None:
    """As Lightning's bf16-true does: the norms' old memory is freed, and used again."""
    expected = decode(prepared(precision=precision))
    model = prepared(precision=precision)
    decode(model)
    model.to(dtype)
    gc.collect()
    rubbish = [torch.full((32,), torch.nan) for _ in range(1000)]
    got = decode(model)
    assert len(rubbish) == 1000 and (got - expected).norm() <= 0.05 * expected.norm()


@torch.inference_mode()
def test_a_model_cast_and_cast_back_uses_its_new_norms() -> None:
    model = prepared().double().float()
    for block in model.h:
        block.ln_1.weight.fill_(0.5)  # in the memory that they have now
    torch.manual_seed(0)
    plain = GPT(CONFIG).eval()
    for block in plain.h:
        block.ln_1.weight.fill_(0.5)
    torch.testing.assert_close(decode(model), decode(plain), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_decoding_under_autocast_is_right() -> None:
    model = prepared()
    expected = decode(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = decode(model)
        assert model(torch.zeros(2, 5, dtype=torch.long)).logits.isfinite().all()
    assert (got - expected).norm() <= 0.02 * expected.norm()


@torch.inference_mode()
def test_norm_weights_with_strides_are_read_as_they_are_meant() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for block in model.h:
        block.ln_1.weight.data = torch.stack([torch.linspace(0.5, 1.5, 32), torch.full((32,), torch.nan)], 1)[:, 0]
        assert not block.ln_1.weight.is_contiguous()
    expected = decode(model.eval())
    fast = prepare_for_inference(model, "fp32")
    assert isinstance(fast.decode_kernel, FusedDecode)
    torch.testing.assert_close(decode(fast), expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_cache_with_strides_is_left_to_pytorch() -> None:
    model = prepared()
    cache = KVCache(CONFIG, 2, 32)
    cache.k = cache.k.transpose(2, 3).contiguous().transpose(2, 3)
    idx = torch.zeros(2, 1, dtype=torch.long)
    step = cache.step([0, 1], 1)
    assert model.decode_kernel is not None and not model.decode_kernel.supports(step)
    got = model(idx, cache=step).logits
    torch.testing.assert_close(got, model(idx, cache=KVCache(CONFIG, 2, 32).step([0, 1], 1)).logits)
    with pytest.raises(ValueError, match="the decoding kernels cannot use"):
        model.decode_kernel(torch.zeros(2, 1, 32), step)


def steps() -> dict[str, tuple[Tensor, CacheStep]]:
    """Inputs and caches that are not the model's, by what is wrong with them."""
    good = KVCache(CONFIG, 3, 16)
    freed, other = KVCache(CONFIG, 3, 16), KVCache(GPTConfig(50, block_size=16, n_layer=1, n_head=2, n_embd=32), 3, 16)
    unlike, mixed, moved = KVCache(CONFIG, 3, 16), KVCache(CONFIG, 3, 16), good.step([0, 1], 1)
    first, second, third = freed.step([0, 1], 1), unlike.step([0, 1], 1), good.step([0, 1], 1)
    first.stores = freed.k.clone(), freed.v
    first.stores[0].untyped_storage().resize_(64)
    unlike.v = unlike.v[:, :2].contiguous()
    second.stores = unlike.k, unlike.v
    mixed.v = mixed.v.bfloat16()
    moved.slots = [0, 3]
    third.starts = [0, 16]
    fourth = good.step([0, 1], 1)
    fourth.slots = [-1, 0]
    fifth = good.step([0, 1], 2)
    fifth.starts = [0, 15]
    x = torch.zeros(2, 1, 32)
    return {
        "freed cache": (x, first),
        "values of another shape": (x, second),
        "values of another dtype": (x, mixed.step([0, 1], 1)),
        "another model's cache": (x, other.step([0, 1], 1)),
        "slot past the last": (x, moved),
        "negative slot": (x, fourth),
        "position past the capacity": (x, third),
        "last position past the capacity": (torch.zeros(2, 2, 32), fifth),
        "fewer rows than slots": (x[:1], good.step([0, 1], 1)),
        "fewer tokens than the step's": (x, good.step([0, 1], 2)),
        "more tokens than the step's": (torch.zeros(2, 3, 32), good.step([0, 1], 2)),
        "other width": (torch.zeros(2, 1, 16), good.step([0, 1], 1)),
        "no memory": (torch.zeros(2, 1, 32, device="meta"), good.step([0, 1], 1)),
    }


@pytest.mark.parametrize("wrong", steps())
@torch.inference_mode()
def test_the_fused_step_refuses_what_would_be_outside_of_its_memory(wrong: str) -> None:
    kernel = prepared().decode_kernel
    assert kernel is not None
    x, step = steps()[wrong]
    with pytest.raises(ValueError, match="the decoding kernels cannot use"):
        kernel(x, step)


def test_a_layer_of_another_shape_or_kind_is_not_fused() -> None:
    model = prepared()
    model.h[0].mlp.c_fc = KernelLinear(nn.Linear(32, 64))
    with pytest.raises(ValueError, match="c_fc has the shape"):
        FusedDecode(model)
    model.h[0].mlp.c_fc = nn.Linear(32, 128)
    assert not FusedDecode.fusible(model)
    model = prepared()
    model.h[1] = nn.Identity()
    assert not FusedDecode.fusible(model)
