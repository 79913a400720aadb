"""The frozen base of LoRA in fewer bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import tiny_gpt

from lit_gpt.errors import UserError
from lit_gpt.model.lora import LoRAConfig, add_lora
from lit_gpt.train.frozen_base import CompactLinear, compact_base, resolve_base_precision


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_product_and_its_gradient_are_those_of_the_widened_weight(precision: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 40)
    compact = CompactLinear(linear, precision)
    assert compact.weight.dtype == (torch.int8 if precision == "int8" else torch.bfloat16)
    x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 5, 40, dtype=dtype)
    (found,) = torch.autograd.grad(compact(x), x, grad)
    wide = compact.widened(dtype)
    assert torch.equal(compact(x), F.linear(x, wide, linear.bias.to(dtype)))
    (expected,) = torch.autograd.grad(F.linear(x, wide, linear.bias.to(dtype)), x, grad)
    assert torch.equal(found, expected)
    error = (wide - linear.weight.to(dtype)).abs().max() / linear.weight.abs().max()
    assert 0 < error < 1 / 100


def test_nothing_wide_is_kept_for_the_backward_pass() -> None:
    kept = []
    compact = CompactLinear(torch.nn.Linear(64, 64), "int8")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compact(torch.randn(2, 64, requires_grad=True))
    assert {tensor.dtype for tensor in kept if tensor.numel() > 64} == {torch.int8}


def test_autocast_computes_in_its_dtype() -> None:
    compact = CompactLinear(torch.nn.Linear(8, 8), "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        y = compact(torch.randn(2, 8, requires_grad=True))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()


def test_bf16_under_autocast_gives_the_bits_of_fp32() -> None:
    x = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for precision in ("fp32", "bf16"):
        model = tiny_gpt(dtype=torch.float32)
        compact_base(model, precision)
        torch.manual_seed(3)
        add_lora(model, model.config, LoRAConfig(rank=2))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.train()(x[:, :-1], x[:, 1:]).loss_sum
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((loss, grads))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def test_the_base_takes_less_memory_and_is_saved_nowhere() -> None:
    model = tiny_gpt(dtype=torch.float32)
    compact_base(model, "int8")
    add_lora(model, model.config, LoRAConfig(rank=2))
    layer = model.h[0].mlp.c_fc.base  # type: ignore[union-attr]
    assert isinstance(layer, CompactLinear) and layer.weight.dtype == torch.int8
    assert not any("c_fc.base" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("requested", "trainer", "expected"),
    [
        ("auto", "32-true", "fp32"),
        ("auto", "bf16-mixed", "bf16"),
        ("auto", "16-mixed", "fp32"),
        ("int8", "32-true", "int8"),
        ("fp32", "bf16-mixed", "fp32"),
    ],
)
def test_resolution(requested: str, trainer: str, expected: str) -> None:
    assert resolve_base_precision(requested, trainer) == expected


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match='unknown base_precision "int4"'):
        resolve_base_precision("int4", "32-true")
