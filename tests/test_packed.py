"""Packed and quantised linear layers against plain ones in float64, and rows against their neighbours."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_gpt import packed
from lit_gpt.config import GPTConfig
from lit_gpt.decoding.engine import Engine
from lit_gpt.decoding.params import GenerationConfig
from lit_gpt.errors import UserError
from lit_gpt.model import GPT
from lit_gpt.packed import Int8Linear, PackedLinear, WeightInt8Linear, quantize_rows
from lit_gpt.precision import cpu_has_bf16, prepare_for_inference

ROOT = Path(__file__).resolve().parent.parent
needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no VNNI")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")

ODD_SHAPES = [
    {},
    {"vocab_size": 51, "padded_vocab_size": 53, "n_embd": 40, "mlp": "swiglu", "norm": "rmsnorm", "position": "rope"},
    {"tie_embeddings": False, "head_bias": True, "qkv_bias": False, "n_kv_head": 1, "logit_softcap": 15.0},
]


def small(**overrides: object) -> GPT:
    torch.manual_seed(0)
    values = {"vocab_size": 50, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32, **overrides}
    model = GPT(GPTConfig(**values)).eval()  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2 if "wte" not in name else 0.5)
    return model


def greedy(model: GPT, prompts: list[list[int]]) -> list[list[int]]:
    engine = Engine(model, model.config, max_slots=len(prompts))
    ids = {
        engine.submit(prompt, GenerationConfig(max_new_tokens=12, strategy="greedy")): i
        for i, prompt in enumerate(prompts)
    }
    texts: list[list[int]] = [[] for _ in prompts]
    for output in engine.drain():
        texts[ids[output.request]] += [token.id for token in output.tokens]
    return texts


@needs_onednn
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_fp32_keeps_logits_and_greedy_text(shape: dict[str, object]) -> None:
    plain = small(**shape)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    expected = greedy(plain, prompts)
    idx = torch.randint(50, (3, 16))
    reference = plain(idx)
    fast = prepare_for_inference(copy.deepcopy(plain), "fp32")
    assert isinstance(fast.h[0].attn.c_attn, PackedLinear)
    assert isinstance(fast.lm_head, PackedLinear)
    assert (fast(idx) - reference).abs().max() <= 1e-5
    assert greedy(fast, prompts) == expected
    assert greedy(fast, prompts[:1]) == expected[:1]


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("int8", 0.05)])
def test_less_precision_stays_close(shape: dict[str, object], precision: str, tolerance: float) -> None:
    if precision == "bf16" and not cpu_has_bf16():
        pytest.skip("this CPU has no bf16")
    plain = small(**shape)
    idx = torch.randint(50, (3, 16))
    reference = plain(idx)
    got = prepare_for_inference(plain, precision)(idx)
    assert (got.float() - reference).norm() <= tolerance * reference.norm()


def test_auto_on_a_cpu_changes_no_text() -> None:
    plain = small()
    idx = torch.randint(50, (1, 16))
    reference = plain(idx)
    assert (prepare_for_inference(plain, "auto")(idx) - reference).abs().max() <= 1e-5


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match='unknown precision "int4": did you mean "int8"'):
        prepare_for_inference(small(), "int4")


@needs_vnni
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(2, 70), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_int8_is_the_exact_product_of_rounded_rows(n_row: int, n_in: int, n_out: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(n_in, n_out, bias=bias)
    x = torch.randn(n_row, n_in) * torch.logspace(-3, 3, n_row)[:, None]
    weight, w_scale = quantize_rows(linear.weight.detach())
    x_scale = x.abs().amax(1, keepdim=True).double()
    rows = (x.double() * 127 / x_scale).float().round().double()
    expected = (rows @ weight.double().t()) * x_scale * w_scale.double().t() / 127**2
    largest = (128 * 127.0 * n_in) * x_scale * w_scale.double().amax() / 127**2
    if linear.bias is not None:
        expected += linear.bias.detach().double()
    got = Int8Linear(linear)(x).double()
    assert bool(((got - expected).abs() <= 1e-6 * largest + 1e-6 + 1.5 * (x_scale * w_scale.amax() / 127)).all())
    exact = ((got - expected).abs() <= 1e-6 * largest + 1e-6).float().mean()
    assert exact > 0.6  # the rest: an input on the edge between two integers was rounded the other way


@needs_vnni
@pytest.mark.parametrize("n_row", [2, 16, 33])
def test_a_loud_neighbour_changes_no_bit_of_an_int8_row(n_row: int) -> None:
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(64, 48))
    x = torch.randn(n_row, 64)
    loud = x.clone()
    loud[1:] *= 1e4
    assert torch.equal(layer(x)[0], layer(loud)[0])
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]), rtol=1e-5, atol=1e-5)  # alone, and in company


@needs_vnni
def test_a_row_of_zeros_gives_the_bias() -> None:
    linear = nn.Linear(64, 48)
    for n_row in (1, 3):
        x = torch.zeros(n_row, 64)
        torch.testing.assert_close(Int8Linear(linear)(x), linear(x))


@needs_vnni
def test_int8_text_alone_and_in_company_is_the_same() -> None:
    model = prepare_for_inference(small(), "int8")
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5], [7, 7]]
    assert greedy(model, prompts) == [greedy(model, [prompt])[0] for prompt in prompts]


def test_weights_alone_in_int8_where_the_cpu_has_no_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    plain = small()
    idx = torch.randint(50, (3, 16))
    reference = plain(idx)
    model = prepare_for_inference(plain, "int8")
    assert isinstance(model.lm_head, WeightInt8Linear)
    assert model.lm_head.weight.dtype == torch.int8
    assert (model(idx) - reference).norm() <= 0.05 * reference.norm()


def test_without_onednn_the_plain_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert type(prepare_for_inference(small(), "fp32").lm_head) is nn.Linear
    assert type(packed._packed(nn.Linear(4, 4), int8=True)) is WeightInt8Linear


def corpus() -> Tensor:
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "lit_gpt").glob("*.py")))
    return torch.tensor(list(text)[:150_000])


@pytest.fixture(scope="module")
def trained() -> tuple[GPT, Tensor]:
    """A small byte-level model that has learnt something, and what it has not seen."""
    torch.manual_seed(0)
    data = corpus()
    split = len(data) * 9 // 10
    model = GPT(GPTConfig(vocab_size=256, block_size=64, n_layer=2, n_head=2, n_embd=64, position="rope"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(120):
        starts = torch.randint(split - 65, (12,)).tolist()
        rows = torch.stack([data[start : start + 65] for start in starts])
        loss, count = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        (loss / count).backward()
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / 120)
        optimizer.step()
    return model.eval(), data[split:]


def validation_loss(model: GPT, data: Tensor) -> float:
    rows = data[: (len(data) - 1) // 64 * 64 + 1]
    loss, count = model(rows[:-1].view(-1, 64), rows[1:].view(-1, 64))
    return (loss / count).item()


@torch.no_grad()
@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_low_precision_costs_at_most_half_a_percent_of_validation_loss(
    trained: tuple[GPT, Tensor], precision: str
) -> None:
    model, data = trained
    full = validation_loss(model, data)
    assert full < 0.7 * math.log(256)  # it has learnt
    low = validation_loss(prepare_for_inference(copy.deepcopy(model), precision), data)
    print(f"{precision}: {low / full - 1:+.4%} of {full:.4f}")
    assert low <= 1.005 * full
