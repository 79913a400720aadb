"""Optimizers against PyTorch's own."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.train.optim import (
    CompositeOptimizer,
    OptimizerConfig,
    OptimizerName,
    are_finite,
    clip_gradients,
    make_optimizer,
    parameter_groups,
    skip_step_where,
)


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def twins(config: GPTConfig) -> tuple[GPT, GPT]:
    a, b = GPT(config), GPT(config)
    b.load_state_dict(a.state_dict())
    return a, b


def test_groups_hold_each_parameter_once_and_decay_matrices_only(tiny_config: GPTConfig) -> None:
    model = GPT(tiny_config)
    for name in ("adamw", "muon"):
        groups = parameter_groups(model, OptimizerConfig(name=name, weight_decay=0.3, muon_weight_decay=0.2))
        seen = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(seen) == sorted(id(parameter) for parameter in model.parameters())
        for group in groups:
            wanted = {"muon": 0.2, "matrices": 0.3, "vectors": 0.0}[group["name"]]
            assert group["weight_decay"] == wanted
            assert all((parameter.ndim < 2) == (group["name"] == "vectors") for parameter in group["params"])
    muon = next(group for group in groups if group["name"] == "muon")["params"]
    inner = [p for block in model.h for p in block.parameters() if p.ndim == 2]
    assert {id(p) for p in muon} == {id(p) for p in inner}


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_is_torchs(tiny_config: GPTConfig, fused: bool) -> None:
    ours, theirs = twins(tiny_config)
    config = OptimizerConfig(lr=1e-2, weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer = make_optimizer(ours, config, fused)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    common = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "foreach": False}
    reference = [
        torch.optim.AdamW(matrices, weight_decay=0.2, **common),
        torch.optim.AdamW(vectors, weight_decay=0.0, **common),
    ]
    for step in range(4):
        gradients(ours, step)
        gradients(theirs, step)
        optimizer.step()
        for part in reference:
            part.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def muon_references(model: GPT, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    inner = {id(p) for block in model.h for p in block.parameters() if p.ndim == 2}
    others = [p for p in model.parameters() if id(p) not in inner]
    betas = (config.beta1, config.beta2)
    return [
        torch.optim.Muon(
            [p for p in model.parameters() if id(p) in inner], lr=config.muon_lr, momentum=config.muon_momentum,
            weight_decay=config.muon_weight_decay,
        ),
        torch.optim.AdamW([p for p in others if p.ndim >= 2], lr=config.lr, weight_decay=0.1, betas=betas),
        torch.optim.AdamW([p for p in others if p.ndim < 2], lr=config.lr, weight_decay=0.0, betas=betas),
    ]  # fmt: skip


def test_muon_with_adamw_is_torchs_two_and_survives_a_reload(tiny_config: GPTConfig) -> None:
    ours, theirs = twins(tiny_config)
    config = OptimizerConfig(name="muon", lr=1e-2, muon_lr=0.05, muon_weight_decay=0.1)
    optimizer, reference = make_optimizer(ours, config), muon_references(theirs, config)
    for step in range(6):
        if step == 3:  # a new optimizer goes on from the state of the old one
            state = torch.load(save(optimizer.state_dict()), weights_only=True)
            optimizer = make_optimizer(ours, config)
            optimizer.load_state_dict(state)
        gradients(ours, step)
        gradients(theirs, step)
        for part in reference:
            part.step()
        optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        # PyTorch's Muon computes in bf16: an element of an update, at most 1, differs by some hundredths.
        tolerance = 6 * 0.05 * 0.05 if ".h." in f".{name}" and a.ndim == 2 else 1e-6
        torch.testing.assert_close(a, b, rtol=1e-5, atol=tolerance, msg=name)


@pytest.mark.parametrize("beta2", [0.0, 0.9])
def test_muon_beta2_evens_out_the_rows_of_the_first_update(tiny_config: GPTConfig, beta2: float) -> None:
    """After one step from nothing all rows of a tall matrix (columns of a wide one) have moved equally far, or not."""
    model, before = twins(tiny_config)
    gradients(model, 0)
    make_optimizer(model, OptimizerConfig(name="muon", muon_beta2=beta2)).step()
    for (name, after), start in zip(model.named_parameters(), before.parameters()):
        if ".h." in f".{name}" and after.ndim == 2:
            moved = (after - start).norm(dim=1 if after.size(0) >= after.size(1) else 0)
            assert bool((moved.max() / moved.min() < 1.001).item()) == (beta2 > 0), name


def save(state: object) -> object:
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_composite_runs_its_closure_once_and_follows_a_scheduler(tiny_config: GPTConfig) -> None:
    model = GPT(tiny_config)
    optimizer = make_optimizer(model, OptimizerConfig(name="muon"))
    assert isinstance(optimizer, CompositeOptimizer)
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        calls.append(1)
        gradients(model, 0)
        return 3.5

    before = [p.detach().clone() for p in model.parameters()]
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    with torch.no_grad():
        assert optimizer.step(closure) == 3.5
    assert calls == [1]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))  # every group's rate is zero


@pytest.mark.parametrize(
    ("make", "needle"),
    [
        (lambda: OptimizerConfig(name="adam"), 'did you mean "adamw"'),  # type: ignore[arg-type]
        (lambda: OptimizerConfig(lr=-1e-3), "lr=-0.001"),
        (lambda: OptimizerConfig(lr=math.nan), "lr=nan"),
        (lambda: OptimizerConfig(beta2=1.0), "beta2=1.0"),
        (lambda: OptimizerConfig(muon_beta2=1.0), "muon_beta2=1.0"),
    ],
)
def test_bad_values_are_named(make: object, needle: str) -> None:
    with pytest.raises(UserError) as error:
        make()  # type: ignore[operator]
    assert needle in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", get_args(OptimizerName))
@pytest.mark.parametrize("skipped", [0, 2])
def test_a_skipped_step_changes_neither_weights_nor_state(name: OptimizerName, skipped: int) -> None:
    """Also the first of all, whose state is made in it."""

    def train(bad: int | None, guarded: bool) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(3)
        model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16))
        optimizer = make_optimizer(model, OptimizerConfig(name=name, muon_weight_decay=0.1))
        idx = torch.arange(8).view(1, 8)
        for step in range(4 if bad is None else 5):
            optimizer.zero_grad()
            nll = model(idx, (idx + 1) % 11).loss_sum
            nll.backward()
            if step == bad:
                next(iter(model.parameters())).grad[0, 0] = math.nan  # type: ignore[index]
                for parameter in model.h.parameters():
                    parameter.grad.fill_(math.inf)  # type: ignore[union-attr]
            if guarded:
                skip_step_where(~clip_gradients(model.parameters(), 1.0).isfinite(), optimizer)
            else:
                clip_gradients(model.parameters(), 1.0)
            optimizer.step()
        state = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
        return [*model.state_dict().values()], state

    expected = train(None, guarded=False)
    for found in (train(None, guarded=True), train(skipped, guarded=True)):
        for tensors, wanted in zip(found, expected):
            assert len(tensors) == len(wanted)
            assert all(torch.equal(a, b) for a, b in zip(tensors, wanted))


@pytest.mark.parametrize(("value", "finite"), [(3e38, True), (math.inf, False), (-math.inf, False), (math.nan, False)])
def test_finite_numbers_are_told_from_others(value: float, finite: bool) -> None:
    tensors = [torch.ones(3), torch.full((2, 2), 3e38)]
    tensors[1][1, 0] = value
    assert bool(are_finite(tensors)) is finite
