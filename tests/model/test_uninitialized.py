"""Models without initial weights: the same names, shapes and tables, and nothing drawn."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from models import tiny_config

from lit_gpt.model.gpt import GPT
from lit_gpt.model.uninitialized import NoInitialization, empty_gpt

SHAPES: list[dict[str, Any]] = [
    {},
    {"position": "sinusoidal", "tie_embeddings": False, "head_bias": True},
    {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "n_kv_head": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_empty_model_takes_the_weights_of_another(shape: dict[str, Any]) -> None:
    config = tiny_config(**shape)
    model, empty = GPT(config).eval(), empty_gpt(config).eval()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    idx = torch.randint(257, (2, 8))
    assert torch.equal(empty(idx).logits, model(idx).logits)  # tables of positions included


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_is_drawn(shape: dict[str, Any]) -> None:
    before = torch.random.get_rng_state()
    empty_gpt(tiny_config(**shape))
    with NoInitialization():
        model = GPT(tiny_config(**shape))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_another_thread_initialises_its_model() -> None:
    made: list[GPT] = []
    thread = threading.Thread(target=lambda: made.append(GPT(tiny_config())))
    with NoInitialization():
        thread.start()
        thread.join()
    assert made[0].wte.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert bool((made[0].ln_f.weight == 1).all())
