"""LoRA's layers: the term that they add, what is trained of them, what they are saved as; and the frozen head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import tiny_config, tiny_gpt
from torch import Tensor

from lit_gpt.batch import IGNORE_INDEX
from lit_gpt.errors import UserError
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.lora import (
    LoRAConfig,
    LoRALinear,
    adapter_state,
    add_lora,
    dense_factors,
    merge_lora,
    weights_of_state,
)
from lit_gpt.model.loss import head_loss
from lit_gpt.model.recompute import recomputed
from lit_gpt.model.token_rows import freeze_token_rows, train_token_rows

MODERN: dict[str, Any] = {
    "n_kv_head": 2,
    "position": "rope",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "qk_norm": True,
    "qkv_bias": False,
    "proj_bias": False,
    "mlp_bias": False,
}


def adapted(lora: LoRAConfig, std: float = 0.3, **shape: Any) -> GPT:
    """A random model with random terms."""
    model = tiny_gpt(**shape)
    torch.manual_seed(1)
    add_lora(model, model.config, lora)
    for name, parameter in model.named_parameters():
        if name.endswith(".b") and std:
            torch.nn.init.normal_(parameter, std=std)
    return model.train()


def ids(model: GPT, rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(2))


def test_training_begins_at_the_base() -> None:
    base = tiny_gpt()
    model = adapted(LoRAConfig(rank=4), std=0.0)
    x = ids(base)
    torch.testing.assert_close(model(x).logits, base(x).logits, rtol=0, atol=1e-12)
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    assert len(layers) == 4 * 2 and all(factor.a.abs().max() > 0 for layer in layers for factor in layer.factors())
    limit = 1 / math.sqrt(32)  # what kaiming_uniform_ with a = √5, which PEFT takes, draws up to
    drawn = torch.cat([factor.a.flatten() for layer in layers[:1] for factor in layer.factors()])
    assert 0.9 * limit < drawn.abs().max() <= limit


@pytest.mark.parametrize("shape", [{}, MODERN], ids=["GPT-2", "modern"])
@pytest.mark.parametrize("targets", ["all", "c_attn.q,c_attn.v", "c_attn.k,mlp.c_proj", "h.1.mlp.c_fc,attn.c_proj"])
def test_merged_equals_unmerged(targets: str, shape: dict[str, Any]) -> None:
    model = adapted(LoRAConfig(rank=3, alpha=5.0, targets=targets), **shape).eval()
    base, x = tiny_gpt(**shape), ids(model)
    unmerged = model(x).logits
    assert not torch.allclose(unmerged, base(x).logits, atol=0.1)
    merge_lora(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    torch.testing.assert_close(model(x).logits, unmerged, rtol=0, atol=1e-10)


def test_a_part_of_the_fused_projection_changes_only_its_rows() -> None:
    model, base = adapted(LoRAConfig(rank=2, targets="c_attn.k,c_attn.v"), **MODERN), tiny_gpt(**MODERN)
    merge_lora(model)
    change = (model.h[0].attn.c_attn.weight - base.h[0].attn.c_attn.weight).abs().amax(1)  # type: ignore[union-attr]
    assert (change[:32] == 0).all() and (change[32:] > 0).all()  # queries: 4 heads of 8
    keys = (model.h[0].attn.c_attn.weight - base.h[0].attn.c_attn.weight)[32:48]  # type: ignore[union-attr]
    assert torch.linalg.matrix_rank(keys.double()) == 2


def test_terms_of_several_parts_are_a_block_diagonal() -> None:
    layer = adapted(LoRAConfig(rank=2, alpha=3.0, targets="c_attn.q,c_attn.v")).h[0].attn.c_attn  # type: ignore[union-attr]
    assert isinstance(layer, LoRALinear)
    a, b = dense_factors(layer.factors(), 96)
    assert a.shape == (4, 32) and b.shape == (96, 4)
    assert (b[:32, 2:] == 0).all() and (b[32:64] == 0).all() and (b[64:, :2] == 0).all()
    x = torch.randn(5, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.base(x) + x @ a.t() @ b.t())


@pytest.mark.parametrize(("stabilised", "factor"), [(False, 12 / 9), (True, 12 / 3)])
def test_scale(stabilised: bool, factor: float) -> None:
    assert LoRAConfig(rank=9, alpha=12.0, rank_stabilized=stabilised).scale == pytest.approx(factor)


def test_gradients_are_those_of_the_whole_model() -> None:
    """B's and A's gradients by hand, from that of a whole weight."""
    lora = LoRAConfig(rank=3, alpha=7.0, targets="mlp.c_proj")
    model, x = adapted(lora), ids(tiny_gpt())
    whole = adapted(lora)
    merge_lora(whole)
    whole.requires_grad_(True)
    for one in (model, whole):
        one(x[:, :-1], x[:, 1:]).loss_sum.backward()
    layer, weight = model.h[0].mlp.c_proj, whole.h[0].mlp.c_proj.weight  # type: ignore[union-attr]
    assert isinstance(layer, LoRALinear)
    (factor,) = layer.factors()
    torch.testing.assert_close(factor.b.grad, lora.scale * weight.grad @ factor.a.t())  # type: ignore[union-attr]
    torch.testing.assert_close(factor.a.grad, lora.scale * factor.b.t() @ weight.grad)  # type: ignore[union-attr]
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(adapter_state(model)) == {f"h.{i}.mlp.c_proj.parts.all.{k}" for i in (0, 1) for k in "ab"}


@pytest.mark.parametrize("shape", [{}, MODERN], ids=["GPT-2", "modern"])
def test_recomputed_activations_give_the_same_gradients_and_are_not_kept(shape: dict[str, Any]) -> None:
    def run(recomputes: bool) -> tuple[list[Tensor], int]:
        model = adapted(LoRAConfig(rank=2), **shape)
        for block in model.h:
            assert isinstance(block, Block)
            block.mlp.recomputes = recomputes
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = ids(model)
        # Tensors that are to be computed again never come to the outer hooks
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(x[:, :-1], x[:, 1:]).loss_sum
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None], sum(kept.values())

    (plain, much), (again, little) = run(False), run(True)
    assert len(plain) == len(again) and all(torch.equal(a, b) for a, b in zip(plain, again))
    assert little < much


def test_recomputed_leaves_other_tensors_alone() -> None:
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    y = x.exp()
    with recomputed(y, lambda: x.detach().exp()):
        z = (y * y).sum() + (x * x).sum()
    z.backward()
    torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).exp() + 2 * x.detach())


def test_dropout_is_of_the_terms_and_of_training_only() -> None:
    model = adapted(LoRAConfig(rank=4, dropout=0.5))
    x = ids(model)
    assert not torch.equal(model(x).logits, model(x).logits)
    model.eval()
    plain = adapted(LoRAConfig(rank=4)).eval()
    assert torch.equal(model(x).logits, plain(x).logits)


def test_a_state_is_read_back_as_it_was() -> None:
    lora = LoRAConfig(rank=2, alpha=3.0, targets="c_attn.q,c_attn.v,c_fc")
    model = adapted(lora)
    weights = weights_of_state(adapter_state(model), model.config, lora, 0, "x")
    assert set(weights.factors) == {f"h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")}
    for name, factors in weights.factors.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LoRALinear)
        assert [f.start for f in factors] == [f.start for f in layer.factors()]
        for ours, theirs in zip(factors, layer.factors()):
            assert torch.equal(ours.a, theirs.a) and torch.equal(ours.b, theirs.b) and ours.scale == theirs.scale


@pytest.mark.parametrize(
    "change",
    [
        {"h.0.attn.c_attn.parts.x.a": torch.zeros(2, 32)},
        {"h.0.attn.c_attn.weight": torch.zeros(2, 32)},
        {"h.0.attn.c_attn.parts.q.a": torch.zeros(3, 32)},
        {"h.0.attn.c_attn.parts.q.b": torch.zeros(31, 2)},
        {"h.0.attn.c_attn.parts.q.b": torch.zeros(2)},
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Tensor]) -> None:
    lora = LoRAConfig(rank=2, targets="c_attn.q")
    model = adapted(lora)
    with pytest.raises(UserError, match=r"file\.ckpt"):
        weights_of_state({**adapter_state(model), **change}, model.config, lora, 0, "file.ckpt")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rank": 8, "targets": "c_atn"},
            r'"c_atn" matches no linear layer .* attn.c_attn, attn.c_attn.q, .*mlp.c_proj',
        ),
        ({"rank": 8, "targets": "c_gate"}, r'"c_gate" matches no linear layer'),
        ({"rank": 8, "targets": "lm_head"}, r'"lm_head" matches no linear layer'),
        ({"rank": 8, "targets": "c_attn,c_attn.q"}, r"h.0.attn.c_attn whole and its part q"),
        ({"rank": 8, "targets": " , "}, r"names no layer"),
        ({"rank": 33}, r"rank=33 is above the width of h.0.attn.c_attn, 32: choose at most 32"),
        ({"rank": -1}, r"lora.rank=-1 must be a whole number of at least 0"),
        ({"rank": 8, "alpha": 0.0}, r"lora.alpha=0.0 must be above 0"),
        ({"rank": 8, "alpha": math.nan}, r"lora.alpha=nan must be a finite number"),
        ({"rank": 8, "dropout": 1.0}, r"lora.dropout=1.0 is not a probability below 1"),
        ({"targets": "c_fc"}, r"lora.targets has no effect without lora.rank"),
        ({"alpha": 8.0}, r"lora.alpha has no effect without lora.rank"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(tiny_gpt(), tiny_config(), LoRAConfig(**values))


# The frozen head and the rows of new tokens ------------------------------------------------------------------------


def test_a_frozen_head_gets_no_gradient_and_gives_the_same_one() -> None:
    torch.manual_seed(0)
    weight, targets = torch.randn(11, 8, dtype=torch.float64), torch.randint(9, (23,))
    targets[3] = IGNORE_INDEX
    grads = []
    for frozen in (False, True):
        x = torch.linspace(-1, 1, 23 * 8, dtype=torch.float64).view(23, 8).requires_grad_()
        w = weight.clone().requires_grad_(not frozen)
        loss = head_loss(x, targets, w, None, 5, 9)
        loss.backward()
        grads.append(x.grad)
        assert (w.grad is None) == frozen
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("each_target", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_get_the_gradient_that_the_whole_table_would(tied: bool, each_target: bool) -> None:
    whole, model = (tiny_gpt(tie_embeddings=tied, padded_vocab_size=260) for _ in range(2))
    model.requires_grad_(False)
    train_token_rows(model, 250, 7, tied)
    x = ids(model)
    x[:, 3], x[:, 5] = 252, 256
    for one in (whole, model):
        output = one(x[:, :-1], x[:, 1:], each_target=each_target)
        (output.losses.sum() if each_target else output.loss_sum).backward()
    names = ["wte"] if tied else ["wte", "lm_head"]
    assert set(adapter_state(model)) == {f"{name}.rows" for name in names}
    for name in names:
        trained, full = model.get_submodule(name), whole.get_submodule(name)
        torch.testing.assert_close(trained.rows.grad, full.weight.grad[250:257])  # type: ignore[union-attr,index]
        assert trained.weight.grad is None


def test_what_rows_learn_is_in_the_weight_also_after_a_cast() -> None:
    model = tiny_gpt()
    model.requires_grad_(False)
    train_token_rows(model, 250, 7, True)
    for dtype in (torch.float64, torch.float32):
        model = model.to(dtype)
        with torch.no_grad():
            model.wte.rows += 1  # type: ignore[operator,union-attr]
        assert torch.equal(model.wte.weight[250:257], model.wte.rows)  # type: ignore[arg-type,union-attr]
        assert model.lm_head.rows is model.wte.rows and model.lm_head.weight is model.wte.weight
    x = ids(model)
    logits = model.eval()(x).logits
    freeze_token_rows(model)
    assert type(model.wte) is torch.nn.Embedding and type(model.lm_head) is torch.nn.Linear
    assert torch.equal(model(x).logits, logits)
    torch.testing.assert_close(logits, F.linear(model(x, return_hidden=True).hidden, model.wte.weight))
