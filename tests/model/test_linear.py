"""Linear layers in fp32 by oneDNN against PyTorch in float64, and when they are used."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_gpt
from torch import Tensor, nn

from lit_gpt.model import linear
from lit_gpt.model.linear import BlockLinear, prefers_onednn, product

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


def use_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN makes all products that it can, whatever the CPU."""
    monkeypatch.setattr(linear, "prefers_onednn", lambda: True)
    monkeypatch.setattr(linear, "_LEAST", 1)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    use_onednn(monkeypatch)


def close(got: Tensor | None, expected: Tensor | None) -> None:
    assert got is not None and expected is not None
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-4)


@needs_onednn
@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_products_and_their_gradients(
    shape: list[int], n_in: int, n_out: int, bias: bool, strided: bool, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_onednn(monkeypatch)
        check_gradients(shape, n_in, n_out, bias, strided, seed)


def check_gradients(shape: list[int], n_in: int, n_out: int, bias: bool, strided: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = BlockLinear(n_in, n_out, bias=bias)
    x = torch.randn(n_in, *shape[::-1]).permute(*range(len(shape), -1, -1)) if strided else torch.randn(*shape, n_in)
    x.requires_grad_()
    exact, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    dy = torch.randn(n_out).expand(*shape, n_out) if strided else torch.randn(*shape, n_out)
    y, y64 = layer(x), exact(x64)
    y.backward(dy)
    y64.backward(dy.double())
    close(y, y64)
    close(x.grad, x64.grad)
    close(layer.weight.grad, exact.weight.grad)
    if bias:
        close(layer.bias.grad, exact.bias.grad)


@needs_onednn
def test_a_gpt_and_its_head_learn_the_same(onednn: None) -> None:
    model = tiny_gpt(head_bias=True).float()
    exact = copy.deepcopy(model).double()
    idx = torch.randint(257, (3, 20))
    for one in (model, exact):
        one(idx, idx).loss_sum.backward()
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        close(one.grad, other.grad)


@needs_onednn
def test_nothing_is_computed_for_what_is_frozen(onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = product(x, weight, bias)
        made.append(y.shape)
        return y

    monkeypatch.setattr(linear, "product", counted)
    layer, x = BlockLinear(8, 6).requires_grad_(False), torch.randn(4, 8, requires_grad=True)
    layer(x).sum().backward()
    assert made == [(4, 6), (4, 8)]
    made.clear()
    layer.weight.requires_grad_()
    layer(x.detach()).sum().backward()
    assert made == [(4, 6), (6, 8)]


@needs_onednn
def test_what_stays_with_pytorch(onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("oneDNN was called")

    layer, x = BlockLinear(8, 6), torch.randn(4, 8)
    monkeypatch.setattr(linear, "_LEAST", 4 * 8 * 6 + 1)
    monkeypatch.setattr(linear._LinearProduct, "apply", refuse)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))  # too small
    monkeypatch.setattr(linear, "_LEAST", 4 * 8 * 6)
    with pytest.raises(AssertionError, match="oneDNN was called"):
        layer(x)
    assert layer(x[:0]).shape == (0, 6)
    assert layer.double()(x.double()).dtype == torch.float64
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.to("meta")(x.to("meta")).is_meta
    one = BlockLinear(1, 6)  # of a single input oneDNN's products have been wrong
    assert one(torch.randn(64, 1)).shape == (64, 6)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert BlockLinear(8, 6)(x).shape == (4, 6)


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        (None, "AVX512", False),
        (None, "DEFAULT", False),
    ],
)
def test_the_rule(vendor: str | None, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert prefers_onednn.__wrapped__() is expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert prefers_onednn.__wrapped__() is False


def test_the_vendor_is_read_from_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: dict[str, str | None] = {"processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t: 2\n": "AuthenticAMD", "": None}
    for text, vendor in texts.items():
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text, **__: text)
        assert linear._cpu_vendor() == vendor

    def missing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert linear._cpu_vendor() is None


def test_every_layer_of_the_blocks_is_one_of_these() -> None:
    blocks = tiny_gpt().h
    found = [layer for layer in blocks.modules() if isinstance(layer, nn.Linear)]
    assert len(found) >= 8 and all(type(layer) is BlockLinear for layer in found)
