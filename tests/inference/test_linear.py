"""The table of linear layers; fast and quantised ones against plain ones in float64, rows against their neighbours."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from environment import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_gpt.errors import UserError
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.inference import native
from lit_gpt.inference.kernel_linear import KernelBf16Linear, KernelInt4Linear, KernelInt8Linear, KernelLinear
from lit_gpt.inference.linear import LINEAR_LAYERS, Rule, available, fast_linear, linear_class
from lit_gpt.inference.onednn_linear import OneDNNInt8Linear, OneDNNLinear
from lit_gpt.inference.prepare import prepare_for_inference
from lit_gpt.inference.quantize import WeightOnlyInt4Linear, WeightOnlyInt8Linear, quantize_groups, quantize_rows
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache
from lit_gpt.train.precision import cpu_has_bf16

needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no VNNI")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")

ODD_SHAPES = [
    {},
    {"vocab_size": 51, "padded_vocab_size": 53, "n_embd": 40, "mlp": "swiglu", "norm": "rmsnorm", "position": "rope"},
    {"tie_embeddings": False, "head_bias": True, "qkv_bias": False, "n_kv_head": 1, "logit_softcap": 15.0},
]


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the kernels."""
    monkeypatch.setattr(native, "load", lambda: None)


@pytest.fixture(
    params=[pytest.param("kernels", marks=pytest.mark.kernels), pytest.param("PyTorch", marks=needs_onednn)]
)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which layers are used: those of our kernels, or PyTorch's where there are no kernels."""
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "load", lambda: None)
    return request.param


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


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_fp32_keeps_logits_and_greedy_text(shape: dict[str, object], by: str) -> None:
    plain = small(**shape)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    expected = greedy(plain, prompts)
    idx = torch.randint(50, (3, 16))
    reference = plain(idx).logits
    fast = prepare_for_inference(copy.deepcopy(plain), "fp32")
    kind = KernelLinear if by == "kernels" else OneDNNLinear
    assert isinstance(fast.h[0].attn.c_attn, kind)
    assert isinstance(fast.lm_head, kind)
    assert (fast.decode_kernel is not None) == (by == "kernels")
    assert (fast(idx).logits - reference).abs().max() <= 1e-5
    assert greedy(fast, prompts) == expected
    assert greedy(fast, prompts[:1]) == expected[:1]


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("int8", 0.05), ("int4", 0.3)])
def test_less_precision_stays_close(shape: dict[str, object], precision: str, tolerance: float, by: str) -> None:
    if precision == "bf16" and by == "PyTorch" and not cpu_has_bf16():
        pytest.skip("this CPU has no bf16")
    plain = small(**shape)
    idx = torch.randint(50, (3, 16))
    reference = plain(idx).logits
    got = prepare_for_inference(plain, precision)(idx).logits
    assert (got.float() - reference).norm() <= tolerance * reference.norm()


def test_auto_on_a_cpu_changes_no_text() -> None:
    plain = small()
    idx = torch.randint(50, (1, 16))
    reference = plain(idx).logits
    assert (prepare_for_inference(plain, "auto")(idx).logits - reference).abs().max() <= 1e-5


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match='unknown precision "int9": did you mean "int'):
        prepare_for_inference(small(), "int9")


def int8_layer(linear: nn.Linear, kind: str) -> nn.Module:
    """An int8 layer of our kernels or of PyTorch's."""
    if kind == "kernels" and native.load() is None:
        pytest.skip(f"kernels: {native.status()}")
    return KernelInt8Linear(linear) if kind == "kernels" else OneDNNInt8Linear(linear)


both = pytest.mark.parametrize("kind", ["kernels", "PyTorch"])

CONDITIONS = {"kernels", "oneDNN", "VNNI", "two inputs", "whole groups"}


@pytest.mark.parametrize("rule", LINEAR_LAYERS, ids=lambda rule: f"{rule.layer.__name__} on {rule.device}")
def test_each_row_of_the_table_is_reached_by_what_it_needs_and_by_nothing_less(rule: Rule) -> None:
    for weights in rule.weights or ("fp32", "bf16", "other"):
        device = rule.device or "cuda"
        assert linear_class(device, weights, set(rule.needs)) is rule.layer
        for lost in rule.needs:
            assert linear_class(device, weights, CONDITIONS - {lost, "kernels"}) is not rule.layer
        if rule.device is not None:
            assert linear_class("cuda", weights, CONDITIONS) is not rule.layer
    assert set(rule.needs) <= CONDITIONS


def test_the_rows_of_the_table_have_an_order() -> None:
    chosen = {
        (device, weights, there): linear_class(device, weights, CONDITIONS if there else set()).__name__
        for device in ("cpu", "cuda")
        for weights in ("int4", "int8", "fp32", "bf16", "other")
        for there in (True, False)
    }
    plain = {key: "WeightOnlyInt8Linear" if key[1] in ("int8", "int4") else "Linear" for key in chosen}
    fast = {"int4": "KernelInt4Linear", "int8": "KernelInt8Linear", "fp32": "KernelLinear", "bf16": "KernelBf16Linear"}
    grouped = {("cuda", "int4", True): "WeightOnlyInt4Linear"}
    assert chosen == {**plain, **{("cpu", weights, True): name for weights, name in fast.items()}, **grouped}


def test_the_conditions_are_those_of_this_machine(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert available(nn.Linear(1, 4)) == {"oneDNN", "VNNI"}
    assert available(nn.Linear(64, 4)) == {"oneDNN", "VNNI", "two inputs", "whole groups"}
    monkeypatch.setattr(native, "load", lambda: object())
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert available(nn.Linear(2, 4)) == {"oneDNN", "kernels", "two inputs"}


def test_layers_of_another_dtype_stay(no_kernels: None) -> None:
    linear = nn.Linear(4, 4).double()
    assert fast_linear(linear) is linear


@needs_vnni
@both
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 80), st.integers(2, 200), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_int8_is_the_exact_product_of_rounded_rows(
    level: str, kind: str, n_row: int, n_in: int, n_out: int, bias: bool, seed: int
) -> None:
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
    got = int8_layer(linear, kind)(x).double()
    assert bool(((got - expected).abs() <= 1e-6 * largest + 1e-6 + 1.5 * (x_scale * w_scale.amax() / 127)).all())
    exact = ((got - expected).abs() <= 1e-6 * largest + 1e-6).float().mean()
    assert exact > 0.6  # the rest: an input on the edge between two integers was rounded the other way


@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=9), st.integers(-60, 60))
def test_two_neighbours_in_int8_and_a_byte_without_a_sign_have_products_that_16_bits_hold(
    weights: list[int], exponent: int
) -> None:
    weight = torch.tensor([weights]) * 2.0**exponent
    rows, largest = quantize_rows(weight)
    neighbours = nn.functional.pad(rows.int().abs(), (0, len(weights) % 2)).view(-1, 2).sum(1)
    assert 255 * int(neighbours.max()) < 2**15
    assert ((rows * largest / 127 - weight).abs() <= largest / 127 * 0.5001).all()
    assert largest.item() <= 2.0001 * weight.abs().max().item()


@pytest.mark.kernels
def test_the_largest_products_in_int8_do_not_saturate(level: str) -> None:
    linear = nn.Linear(64, 4, bias=False)
    linear.weight.data = torch.tensor([[1.0, 1.0], [1.0, 0.0], [-1.0, -1.0], [0.0, -1.0]]).repeat(1, 32)
    x = torch.ones(5, 64)
    torch.testing.assert_close(KernelInt8Linear(linear)(x), linear(x).detach(), rtol=0.01, atol=0)


@pytest.mark.kernels
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 80), st.integers(1, 100), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_fp32_is_the_product(level: str, n_row: int, n_in: int, n_out: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(n_in, n_out, bias=bias)
    x = torch.randn(n_row, n_in)
    got = KernelLinear(linear)(x)
    torch.testing.assert_close(got.double(), linear.double()(x.double()), rtol=1e-5, atol=1e-5)


@needs_vnni
@both
@pytest.mark.parametrize("n_row", [2, 16, 33])
def test_a_large_neighbour_changes_no_bit_of_an_int8_row(n_row: int, kind: str) -> None:
    torch.manual_seed(0)
    layer = int8_layer(nn.Linear(64, 48), kind)
    x = torch.randn(n_row, 64)
    large = x.clone()
    large[1:] *= 1e4
    assert torch.equal(layer(x)[0], layer(large)[0])
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]), rtol=1e-5, atol=1e-5)  # alone, and in a batch


@pytest.mark.kernels
@pytest.mark.parametrize("kind", [KernelLinear, KernelBf16Linear, KernelInt8Linear, KernelInt4Linear])
@pytest.mark.parametrize("size", [(64, 48), (70, 33), (768, 100)], ids=str)
def test_alone_and_in_a_batch_a_row_is_the_same_to_the_last_bit(kind: type, size: tuple[int, int], level: str) -> None:
    if kind is KernelInt4Linear:
        size = (size[0] // 32 * 32, size[1])
    torch.manual_seed(0)
    layer = kind(nn.Linear(*size))
    x = torch.randn(67, size[0])
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


@needs_vnni
@both
def test_a_row_of_zeros_gives_the_bias(kind: str) -> None:
    linear = nn.Linear(64, 48)
    for n_row in (1, 3):
        x = torch.zeros(n_row, 64)
        torch.testing.assert_close(int8_layer(linear, kind)(x), linear(x))


@pytest.mark.kernels
@pytest.mark.parametrize("kind", [KernelLinear, KernelBf16Linear, KernelInt8Linear, KernelInt4Linear])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_stay_in_their_row(kind: type, bad: float, level: str) -> None:
    n_in = 96 if kind is KernelInt4Linear else 70
    layer = kind(nn.Linear(n_in, 48))
    x = torch.randn(3, n_in)
    x[1, 66] = bad
    finite = layer(x).isfinite().all(1)
    assert finite.tolist() == [True, False, True]


DECODED = [
    {},
    {"norm_bias": False, "mlp": "gelu"},
    {"mlp": "swiglu", "norm": "rmsnorm", "position": "rope", "n_embd": 40},
    {"mlp": "relu2", "norm": "rmsnorm", "position": "rope", "qk_norm": True, "qkv_bias": False, "n_kv_head": 2},
    {"mlp": "relu", "n_kv_head": 1, "head_dim": 24, "logit_softcap": 15.0, "proj_bias": False, "mlp_bias": False},
    {"position": "sinusoidal", "head_dim": 80, "intermediate_size": 50},
]


@pytest.mark.kernels
@pytest.mark.parametrize("shape", DECODED, ids=str)
@pytest.mark.parametrize(
    ("precision", "cache", "tolerance"),
    [
        ("fp32", torch.float32, 2e-6),
        ("fp32", torch.bfloat16, 0.02),
        ("bf16", torch.bfloat16, 0.05),
        ("int8", torch.bfloat16, 0.1),
    ],
    ids=str,
)
@torch.inference_mode()
def test_blocks_in_one_call_are_the_blocks(
    shape: dict[str, object], precision: str, cache: torch.dtype, tolerance: float, level: str
) -> None:
    """Slots of unequal length, scattered over the cache, against the plain model in float64."""
    plain = small(n_layer=3, **shape)
    idx, slots, lengths = torch.randint(50, (3, 30)), [3, 0, 4], [5, 9, 1]
    expected = copy.deepcopy(plain).double()(idx).logits
    fast = prepare_for_inference(plain, precision)
    assert fast.decode_kernel is not None
    store = KVCache(fast.config, 5, 32, cache)
    for slot, n, ids in zip(slots, lengths, idx):
        fast(ids[None, :n], cache=store.step([slot], n))
        store.extend([slot], n)
    for _ in range(9):  # past 16 positions: so many keys are fetched ahead
        positions = [store.lengths[slot] for slot in slots]
        got = fast(idx[range(3), positions][:, None], cache=store.step(slots, 1)).logits[:, 0]
        store.extend(slots, 1)
        wanted = expected[range(3), positions]
        assert (got - wanted).norm() <= tolerance * wanted.norm()


PIECES = ([23], [1] * 23, [4, 1, 6, 5, 7], [22, 1])
"""How many tokens of a text are read at once."""


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@torch.inference_mode()
def test_a_text_read_in_any_pieces_in_any_company_is_the_same_to_the_bit(precision: str, level: str) -> None:
    for shape in ({"head_dim": 40}, {"position": "rope", "n_kv_head": 2, "qk_norm": True, "mlp": "swiglu"}):
        model = prepare_for_inference(small(n_layer=2, **shape), precision)
        assert model.decode_kernel is not None
        idx, results = torch.randint(50, (3, 23)), []
        for slots in ([0, 1, 2], [1], [2, 1]):
            for pieces in PIECES:
                cache = KVCache(model.config, 3, 32, model.cache_dtype)
                logits = []
                for ids in idx[slots].split(pieces, 1):
                    logits.append(model(ids, cache=cache.step(slots, ids.size(1))).logits)
                    cache.extend(slots, ids.size(1))
                results.append((torch.cat(logits, 1)[slots.index(1)], cache.k[:, 1, :, :23], cache.v[:, 1, :, :23]))
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))


@pytest.mark.kernels
@torch.inference_mode()
def test_what_is_not_a_number_in_a_token_leaves_those_before_it_alone(level: str) -> None:
    model = prepare_for_inference(small(n_layer=2), "fp32")
    model.wte.weight[7] = torch.nan
    idx = torch.randint(7, (1, 13))
    expected = model(idx, cache=KVCache(model.config, 1, 32).step([0], 13)).logits[..., :7]  # the head is the embedding
    for at in range(13):
        poisoned = idx.clone()
        poisoned[0, at] = 7
        got = model(poisoned, cache=KVCache(model.config, 1, 32).step([0], 13)).logits[..., :7]
        assert torch.equal(got[:, :at], expected[:, :at]) and bool(got[:, at:].isnan().all())


@pytest.mark.kernels
@torch.inference_mode()
def test_a_cache_of_another_dtype_is_left_to_pytorch() -> None:
    model = prepare_for_inference(small(), "fp32")
    idx = torch.randint(50, (1, 9))
    expected = model(idx).logits[:, -1:]
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float16, 0.02)):
        cache = KVCache(model.config, 1, 32, dtype)
        model(idx[:, :8], cache=cache.step([0], 8))
        cache.extend([0], 8)
        got = model(idx[:, 8:], cache=cache.step([0], 1)).logits
        assert (got - expected).norm() <= tolerance * expected.norm()


@needs_vnni
def test_int8_text_alone_and_in_a_batch_is_the_same(by: str) -> None:
    model = prepare_for_inference(small(), "int8")
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5], [7, 7]]
    assert greedy(model, prompts) == [greedy(model, [prompt])[0] for prompt in prompts]


def test_weights_alone_in_int8_where_the_cpu_has_no_vnni(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    plain = small()
    idx = torch.randint(50, (3, 16))
    reference = plain(idx).logits
    model = prepare_for_inference(plain, "int8")
    assert isinstance(model.lm_head, WeightOnlyInt8Linear)
    assert model.lm_head.weight.dtype == torch.int8
    assert (model(idx).logits - reference).norm() <= 0.05 * reference.norm()


def test_without_onednn_the_plain_layers_stay(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert type(prepare_for_inference(small(), "fp32").lm_head) is nn.Linear
    assert type(fast_linear(nn.Linear(4, 4), "int8")) is WeightOnlyInt8Linear


def corpus() -> Tensor:
    return torch.tensor(list((FIXTURES / "text.txt").read_bytes()))


@pytest.fixture(scope="module")
def trained() -> tuple[GPT, Tensor]:
    """A small byte-level model that has learnt something, and what it has not seen."""
    torch.manual_seed(0)
    data = corpus()
    split = len(data) * 9 // 10
    model = GPT(GPTConfig(vocab_size=256, block_size=64, n_layer=2, n_head=2, n_embd=64, position="rope"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(60):
        starts = torch.randint(split - 65, (12,)).tolist()
        rows = torch.stack([data[start : start + 65] for start in starts])
        output = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        (output.loss_sum / output.n_targets).backward()
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 10) * (1 - step / 60)
        optimizer.step()
    return model.eval(), data[split:]


def decoded_loss(model: GPT, data: Tensor) -> float:
    """The same, token by token, from a cache as decoding has it."""
    n_row = (len(data) - 1) // 64
    idx, targets = (data[i : i + n_row * 64].view(n_row, 64) for i in (0, 1))
    cache, slots, total = KVCache(model.config, n_row, 64, model.cache_dtype), range(n_row), 0.0
    for position in range(64):
        logits = model(idx[:, position : position + 1], cache=cache.step(slots, 1)).logits[:, 0]
        total += torch.nn.functional.cross_entropy(logits.float(), targets[:, position], reduction="sum").item()
        cache.extend(slots, 1)
    return total / idx.numel()


def validation_loss(model: GPT, data: Tensor) -> float:
    rows = data[: (len(data) - 1) // 64 * 64 + 1]
    output = model(rows[:-1].view(-1, 64), rows[1:].view(-1, 64))
    return (output.loss_sum / output.n_targets).item()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("precision", "share"), [("int8", 1.005), ("bf16", 1.005), ("int4", 1.02)])
def test_low_precision_costs_little_validation_loss(
    trained: tuple[GPT, Tensor], precision: str, share: float, by: str
) -> None:
    model, data = trained
    full = validation_loss(model, data)
    assert full < 0.7 * math.log(256)  # it has learnt
    fast = prepare_for_inference(copy.deepcopy(model), precision)
    low, decoded = validation_loss(fast, data), decoded_loss(fast, data)
    print(f"{precision}: {low / full - 1:+.4%} of {full:.4f}, {decoded / full - 1:+.4%} from the cache")
    assert low <= share * full
    assert decoded <= share * full


def test_int4_is_what_the_rounded_groups_give() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 20)
    steps, scale = quantize_groups(linear.weight.detach())
    assert steps.dtype == torch.uint8 and steps.max() <= 15 and scale.dtype == torch.float16
    weight = ((steps.float() - 8).unflatten(1, (3, 32)) * scale.float()[:, :, None]).flatten(1)
    assert (weight - linear.weight).abs().max() <= linear.weight.abs().max() / 7
    x = torch.randn(5, 96)
    torch.testing.assert_close(WeightOnlyInt4Linear(linear)(x), nn.functional.linear(x, weight, linear.bias))


@pytest.mark.kernels
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 80), st.integers(1, 8), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_int4_is_the_exact_product_of_rounded_rows(
    level: str, n_row: int, n_group: int, n_out: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(32 * n_group, n_out, bias=bias)
    x = torch.randint(-127, 128, (n_row, 32 * n_group)).float()
    x[:, 0] = 127  # the unit of every row is 1: rows are not rounded
    steps, scale = quantize_groups(linear.weight.detach())
    weight = ((steps.double() - 8).unflatten(1, (n_group, 32)) * scale.double()[:, :, None]).flatten(1)
    expected = nn.functional.linear(x.double(), weight, None if linear.bias is None else linear.bias.double())
    torch.testing.assert_close(KernelInt4Linear(linear)(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_int4_leaves_rows_of_no_whole_groups_to_int8_and_says_so(capsys: pytest.CaptureFixture[str], by: str) -> None:
    model = prepare_for_inference(small(n_embd=32, intermediate_size=40), "int4")
    quantised = KernelInt4Linear if by == "kernels" else WeightOnlyInt4Linear
    assert type(model.lm_head) is quantised and type(model.h[0].mlp.c_fc) is quantised
    assert type(model.h[0].mlp.c_proj) in (KernelInt8Linear, OneDNNInt8Linear, WeightOnlyInt8Linear)
    said = "int4: 2 layers of 40 inputs are in int8 instead: 40 is no multiple of 32\n"
    assert capsys.readouterr().err == said


@pytest.mark.kernels
@pytest.mark.parametrize("kind", [KernelLinear, KernelBf16Linear, KernelInt8Linear, KernelInt4Linear])
@torch.inference_mode()
def test_every_level_computes_the_same_bits(kind: type) -> None:
    torch.manual_seed(0)
    layer, x, results = kind(nn.Linear(800, 77)), torch.randn(70, 800), {}
    for name in native.levels():
        native.use_level(name)
        results[name] = layer(x)
    if kind is KernelBf16Linear:
        results.pop("avx512_bf16", None)  # which rounds the inputs
    first = next(iter(results.values()))
    assert all(torch.equal(first, result) for result in results.values()), results.keys()
