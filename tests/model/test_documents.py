"""Several documents in one row: each gives what it gives alone, in every kind of model and on every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_gpt
from torch import Tensor

from lit_gpt.batch import IGNORE_INDEX, Batch
from lit_gpt.model.documents import DocumentMasks
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache

SHAPES: dict[str, dict[str, Any]] = {
    "learned": {"position": "learned"},
    "sinusoidal": {"position": "sinusoidal"},
    "rotary, grouped": {"position": "rope", "n_kv_head": 2, "norm": "rmsnorm", "mlp": "swiglu"},
    "windows": {"position": "rope", "sliding_window": 3},
    "windows and whole": {
        "position": "rope",
        "n_kv_head": 1,
        "sliding_window": 4,
        "global_layers": [1],
        "rope_local_theta": 100.0,
        "qk_norm": True,
    },
}


def numbers(lengths: list[int]) -> Tensor:
    """(1, T) the number of each token's document."""
    return torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])[None]


def losses_alone(model: GPT, rows: Tensor, lengths: list[int]) -> Tensor:
    """The summed loss of each document by itself."""
    sums = [model(part[:, :-1], part[:, 1:]).loss_sum for part in rows.split(lengths, dim=1)]
    return torch.stack(sums)


def targets_inside(rows: Tensor, documents: Tensor) -> Tensor:
    """The next token of the same document, or none."""
    targets = torch.full_like(rows, IGNORE_INDEX)
    same = documents[:, 1:] == documents[:, :-1]
    targets[:, :-1] = torch.where(same, rows[:, 1:], IGNORE_INDEX)
    return targets


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@settings(max_examples=10)
@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_a_row_of_documents_gives_each_one_s_loss(shape: dict[str, Any], lengths: list[int], seed: int) -> None:
    model = tiny_gpt(block_size=48, **shape)
    torch.manual_seed(seed)
    rows, documents = torch.randint(257, (1, sum(lengths))), numbers(lengths)
    with torch.no_grad():
        together = model(rows, targets_inside(rows, documents), documents=documents)
        alone = losses_alone(model, rows, lengths).sum()
        logits = model(rows, documents=documents).logits
        parts = [model(part).logits for part in rows.split(lengths, dim=1)]
    assert int(together.n_targets) == sum(length - 1 for length in lengths)
    torch.testing.assert_close(together.loss_sum, alone, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(logits, torch.cat(parts, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_each_document_alone(checkpointed: bool) -> None:
    lengths, shape = [5, 2, 9], SHAPES["windows and whole"]
    rows, documents = torch.randint(257, (1, 16)), numbers([5, 2, 9])
    gradients = []
    for together in (True, False):
        model = tiny_gpt(**shape).train()
        model.activation_checkpointing = checkpointed and together
        if together:
            loss = model(rows, targets_inside(rows, documents), documents=documents).loss_sum
        else:
            loss = losses_alone(model, rows, lengths).sum()
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", ["learned", "rotary, grouped", "windows"])
def test_the_plain_products_for_bf16_on_a_cpu_keep_to_documents(shape: str) -> None:
    model = tiny_gpt(std=0.1, dtype=torch.float32, **SHAPES[shape]).train()
    documents = numbers([6, 10])
    rows = torch.randint(257, (1, 16))
    other = rows.clone()
    other[:, :6] = torch.randint(257, (1, 6))  # the second document must not see the first

    def run(idx: Tensor, given: Tensor | None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(idx, documents=given).logits[:, 6:].float()

    assert torch.equal(run(rows, documents), run(other, documents))
    assert shape == "windows" or not torch.equal(run(rows, None), run(other, None))
    with torch.no_grad():
        exact = model(rows, documents=documents).logits[:, 6:]
    assert (run(rows, documents) - exact).norm() / exact.norm() < 0.03


def test_without_documents_the_row_is_one_text() -> None:
    model, rows = tiny_gpt(), torch.randint(257, (2, 12))
    with torch.no_grad():
        whole = model(rows).logits
        assert torch.equal(whole, model(rows, documents=None).logits)
        torch.testing.assert_close(whole, model(rows, documents=torch.zeros(2, 12, dtype=torch.int64)).logits)
        parted = model(rows, documents=numbers([4, 8]).repeat(2, 1)).logits
    torch.testing.assert_close(whole[:, :4], parted[:, :4])
    assert not torch.allclose(whole[:, 4:], parted[:, 4:])


def test_masks_and_positions_of_a_small_example() -> None:
    masks = DocumentMasks(torch.tensor([[7, 7, 7, 2, 2], [0, 0, 0, 0, 0]]))
    assert masks.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    whole, windowed = masks.visible(None), masks.visible(2)
    assert whole.shape == windowed.shape == (2, 1, 5, 5)
    assert whole[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert windowed[0, 0].int().tolist()[2] == [0, 1, 1, 0, 0]
    assert torch.equal(whole[1, 0], torch.ones(5, 5).tril().bool())
    assert masks.visible(5) is whole  # a window that hides nothing


def test_documents_come_without_a_cache() -> None:
    model = tiny_gpt()
    cache = KVCache(model.config, 1, 8)
    with pytest.raises(ValueError, match="no cache"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache=cache.step([0], 2), documents=numbers([1, 1]))


def test_the_likeliest_ids_at_chosen_positions() -> None:
    model, rows = tiny_gpt(), torch.randint(257, (2, 8))
    chosen = torch.zeros(2, 8, dtype=torch.bool)
    chosen[0, 3] = chosen[1, 0] = chosen[1, 7] = True
    with torch.no_grad():
        output = model(rows, rows, predict_at=chosen)
        assert output.predicted.tolist() == model(rows).logits[chosen].argmax(-1).tolist()
        assert model(rows, rows).predicted is None


def test_a_pair_is_a_batch_too() -> None:
    pair = (torch.zeros(1, 2), torch.ones(1, 2))
    assert Batch(*pair).documents is None
    assert Batch(*Batch(*pair)) == Batch(*pair)
