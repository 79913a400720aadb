"""The cross-entropy of each target by itself, against PyTorch's on whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import tiny_gpt
from torch import Tensor

from lit_gpt.batch import IGNORE_INDEX
from lit_gpt.model.gpt import GPT

SHAPES: list[dict[str, Any]] = [{}, {"head_bias": True, "tie_embeddings": False}, {"logit_softcap": 3.0}]


def inputs(rows: int = 3, length: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    idx, targets = torch.randint(257, (2, rows, length), generator=generator)
    targets[0, 5:9] = targets[2, -6:] = IGNORE_INDEX
    return idx, targets, torch.randn(rows, length, generator=generator, dtype=torch.float64)


def expected_losses(model: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    logits = model(idx).logits
    assert logits is not None
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk_bytes", [1 << 30, 8 * 257 * 7], ids=["one chunk", "chunks of seven rows"])
def test_losses_of_targets_and_any_weighted_sum_of_their_gradients(
    shape: dict[str, Any], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_gpt.model.gpt.CHUNK_BYTES", chunk_bytes)
    model = tiny_gpt(**shape)
    idx, targets, factors = inputs()
    expected = expected_losses(model, idx, targets).view_as(targets)
    wanted = torch.autograd.grad((expected * factors).sum(), list(model.parameters()))

    losses = model(idx, targets, each_target=True).losses
    torch.testing.assert_close(losses, expected)
    assert torch.equal(losses == 0, targets == IGNORE_INDEX)
    found = torch.autograd.grad((losses * factors).sum(), list(model.parameters()))
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        torch.testing.assert_close(model(idx, targets, each_target=True).losses, expected)


def test_their_sum_is_the_loss() -> None:
    model = tiny_gpt()
    idx, targets, _ = inputs()
    output = model(idx, targets)
    torch.testing.assert_close(model(idx, targets, each_target=True).losses.sum(), output.loss_sum)


def test_frozen_head_gets_no_gradient() -> None:
    model = tiny_gpt(tie_embeddings=False, head_bias=True)
    model.lm_head.requires_grad_(False)
    idx, targets, _ = inputs()
    model(idx, targets, each_target=True).losses.sum().backward()
    assert model.lm_head.weight.grad is None
    assert model.wte.weight.grad is not None
