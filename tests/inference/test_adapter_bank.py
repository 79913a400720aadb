"""Several adapters over one base: each row as with its adapter alone, and the kernels where no row has one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import tiny_gpt
from torch import Tensor

from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.inference.adapter_bank import NEVER, AdapterBank, AdapterLinear
from lit_gpt.inference.decode_kernel import FusedDecode
from lit_gpt.inference.prepare import prepare_adapters, prepare_for_inference
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache
from lit_gpt.model.lora import AdapterWeights, Factor, LoRAConfig, LoRALinear, NamedAdapters, add_factors, add_lora

MODERN: dict[str, Any] = {"n_kv_head": 2, "position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True}
KINDS = [LoRAConfig(rank=3, alpha=6.0), LoRAConfig(rank=2, targets="c_attn.q,c_attn.v,mlp.c_proj"), LoRAConfig(rank=5)]


def adapter(model: GPT, lora: LoRAConfig, seed: int) -> AdapterWeights:
    """Random terms for a copy of `model`."""
    copy = tiny_gpt(dtype=torch.float32, **_shape(model))
    torch.manual_seed(seed)
    add_lora(copy, model.config, lora)
    found = {}
    for name, module in copy.named_modules():
        if isinstance(module, LoRALinear):
            terms = module.factors()
            found[name] = tuple(Factor(t.a.detach(), 0.3 * torch.randn(t.b.shape), t.scale, t.start) for t in terms)
    return AdapterWeights(found)


def _shape(model: GPT) -> dict[str, Any]:
    plain = tiny_gpt().config.to_dict()
    return {name: value for name, value in model.config.to_dict().items() if plain[name] != value}


def with_adapters(shape: dict[str, Any], precision: str = "fp32") -> tuple[GPT, AdapterBank, NamedAdapters]:
    model = tiny_gpt(dtype=torch.float32, **shape)
    named = NamedAdapters({str(i): adapter(model, lora, i) for i, lora in enumerate(KINDS)}, model.config)
    prepare_for_inference(model, precision)
    return model, prepare_adapters(model, named), named


def merged(shape: dict[str, Any], weights: AdapterWeights | None) -> GPT:
    model = tiny_gpt(dtype=torch.float32, **shape)
    for name, factors in ({} if weights is None else weights.factors).items():
        add_factors(model.get_submodule(name).weight.data, factors)  # type: ignore[arg-type,union-attr]
    return prepare_for_inference(model, "fp32")


def ids(rows: int = 4, length: int = 7) -> Tensor:
    return torch.randint(257, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
@pytest.mark.parametrize("shape", [{}, MODERN], ids=["GPT-2", "modern"])
def test_each_row_is_as_its_adapter_merged(shape: dict[str, Any]) -> None:
    model, bank, named = with_adapters(shape)
    x, rows = ids(), [2, 0, 1, 3]
    bank.select(rows)
    logits = model(x).logits
    for row, number in enumerate(rows):
        weights = None if number == 0 else list(named.weights.values())[number - 1]
        alone = merged(shape, weights)(x[row : row + 1]).logits
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=0, atol=1e-3)
    others = logits[0] - merged(shape, None)(x[:1]).logits[0]
    assert others.abs().max() > 0.1


@torch.inference_mode()
@pytest.mark.kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_row_has_the_same_bits_alone_and_in_company(precision: str) -> None:
    model, bank, _ = with_adapters(MODERN, precision)
    x, rows = ids(6, 1), [2, 0, 1, 3, 2, 0]
    bank.select(rows)
    together = model(x, cache=KVCache(model.config, 6, 32).step(range(6), 1)).logits
    for row, number in enumerate(rows):
        if number == 0:  # alone it takes the fused path, whose sums are in another order
            continue
        bank.select([number])
        alone = model(x[row : row + 1], cache=KVCache(model.config, 6, 32).step([0], 1)).logits
        assert torch.equal(together[row], alone[0]), row


@torch.inference_mode()
@pytest.mark.kernels
def test_the_fused_step_is_for_batches_without_adapters() -> None:
    model, bank, _ = with_adapters({})
    assert isinstance(model.decode_kernel, FusedDecode)
    cache = KVCache(model.config, 2, 32, model.cache_dtype)
    calls = []
    original = type(model.decode_kernel).__call__
    model.decode_kernel.__class__ = type(
        "Counted", (FusedDecode,), {"__call__": lambda self, *a: (calls.append(1), original(self, *a))[1]}
    )
    for rows, fused in [([0, 0], 1), ([0, 1], 0), ([0, 0], 1)]:
        calls.clear()
        bank.select(rows)
        model(ids(2, 1), cache=cache.step([0, 1], 1))
        assert len(calls) == fused
    model.to(torch.float32)  # its addresses are read again, through the layers of the adapters
    bank.select([0, 0])
    model(ids(2, 1), cache=cache.step([0, 1], 1))


@torch.inference_mode()
def test_a_batch_without_adapters_is_the_base_to_the_bit() -> None:
    model, bank, _ = with_adapters({})
    base, x = merged({}, None), ids()
    assert torch.equal(model(x).logits, base(x).logits)
    bank.select([1, 0, 0, 0])
    model(x)
    bank.select([0, 0, 0, 0])
    assert torch.equal(model(x).logits, base(x).logits)
    assert sum(isinstance(module, AdapterLinear) for module in model.modules()) == 8


@torch.inference_mode()
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_have_the_rows_of_their_adapter(tied: bool) -> None:
    shape = {"tie_embeddings": tied}
    model = tiny_gpt(dtype=torch.float32, **shape)
    torch.manual_seed(8)
    names = ["wte"] if tied else ["wte", "lm_head"]
    tables = [{name: torch.randn(2, 32) for name in names} for _ in range(2)]
    weights = [AdapterWeights(adapter(model, KINDS[0], 1).factors, rows, 257) for rows in tables]
    weights.append(adapter(model, KINDS[1], 2))
    grown = replace(model.config, vocab_size=259)
    prepare_for_inference(model, "fp32")
    bank = prepare_adapters(model, NamedAdapters({str(i): one for i, one in enumerate(weights)}, grown))
    x = ids()
    x[:2, 3], x[:2, 5] = 257, 258
    rows = [1, 2, 3, 0]
    bank.select(rows)
    logits = model(x).logits
    assert logits.shape[-1] == 259
    for row, number in enumerate(rows):
        alone = tiny_gpt(dtype=torch.float32, **shape)
        own = weights[number - 1] if number else AdapterWeights({})
        for name, factors in own.factors.items():
            add_factors(alone.get_submodule(name).weight.data, factors)  # type: ignore[arg-type,union-attr]
        whole = tiny_gpt(dtype=torch.float32, vocab_size=259, **shape)
        state = alone.state_dict()
        for name in ("wte", "lm_head"):
            extra = own.token_rows.get(name, own.token_rows.get("wte", torch.zeros(2, 32)))
            state[f"{name}.weight"] = torch.cat([state[f"{name}.weight"], extra])
        whole.load_state_dict(state)
        expected = prepare_for_inference(whole, "fp32")(x[row : row + 1]).logits[0]
        known = 259 if own.token_rows else 257
        torch.testing.assert_close(logits[row, :, :known], expected[:, :known], rtol=0, atol=1e-3)
        assert (logits[row, :, known:] == NEVER).all()


def test_streams_of_several_adapters_are_those_of_each_alone() -> None:
    settings = GenerationConfig(max_new_tokens=6, temperature=0.0, ignore_eos=True)
    prompts = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [9, 8]]
    numbers = [1, 2, 0, 3]
    model, bank, named = with_adapters(MODERN)
    engine = Engine(model, model.config, max_slots=4, adapters=bank)
    requests = [engine.submit(p, settings, adapter=n) for p, n in zip(prompts, numbers)]
    found: dict[int, list[int]] = {request: [] for request in requests}
    for output in engine.drain():
        found[output.request] += [token.id for token in output.tokens]
    for request, prompt, number in zip(requests, prompts, numbers):
        weights = None if number == 0 else list(named.weights.values())[number - 1]
        alone = Engine(merged(MODERN, weights), model.config, max_slots=1)
        alone.submit(prompt, settings)
        assert found[request] == [token.id for output in alone.drain() for token in output.tokens], number
    assert len({tuple(ids) for ids in list(found.values())[:3]}) == 3  # the same prompt, three models
