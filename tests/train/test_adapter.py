"""An adapter in training: what the optimizer sees, what a checkpoint holds, and going on from it to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from training import TINY, Batches, module, trainer

from lit_gpt.checkpoint.adapter import AdapterEntry
from lit_gpt.checkpoint.format import KEY, load_checkpoint, load_model, read_header
from lit_gpt.errors import UserError
from lit_gpt.model.gpt import GPT
from lit_gpt.model.lora import LoRAConfig, adapter_state
from lit_gpt.train.adapter import check_lora, merge
from lit_gpt.train.module import LitGPT
from lit_gpt.train.optim import OptimizerConfig, make_optimizer

LORA = LoRAConfig(rank=2, alpha=4.0, dropout=0.1)
ENTRY = AdapterEntry("base.ckpt", "ab" * 32, TINY.vocab_size, LORA)


def base_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return GPT(TINY).state_dict()


def lora_module(**options: Any) -> LitGPT:
    made = module(**{"lora": LORA, "optimizer": OptimizerConfig(lr=1e-2), **options})
    made.initial_weights = base_weights()
    assert made.adapter is not None
    made.adapter.entry = ENTRY
    return made


class SaveAfter(Callback):
    """Saves `middle.ckpt` after an optimizer step."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.path = step, folder / "middle.ckpt"

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fitted(folder: Path, steps: int, ckpt: Path | None = None, made: LitGPT | None = None, **options: Any) -> LitGPT:
    made = made or lora_module(**options)
    run = trainer(folder, max_steps=steps, accumulate_grad_batches=2, callbacks=[SaveAfter(4, folder)])
    run.fit(made, Batches(32, 4), ckpt_path=None if ckpt is None else str(ckpt))
    run.save_checkpoint(folder / "last.ckpt")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"base_precision": "int8", "optimizer": OptimizerConfig("muon")}])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = fitted(tmp_path / "whole", 8, **options)  # two epochs
    resumed = fitted(tmp_path / "second", 8, tmp_path / "whole" / "middle.ckpt", **options)
    states = [adapter_state(one.model) for one in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(name.endswith(".b") and tensor.abs().max() > 0 for name, tensor in states[0].items())


def test_a_checkpoint_holds_the_adapter_and_its_base_by_name(tmp_path: Path) -> None:
    made = fitted(tmp_path, 2)
    base = base_weights()
    for name, tensor in made.model.state_dict().items():
        if name in base:
            assert torch.equal(tensor, base[name]), name  # nothing of the base has moved
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    assert set(checkpoint["state_dict"]) == {f"model.{name}" for name in adapter_state(made.model)}
    assert checkpoint[KEY]["adapter"] == ENTRY.to_dict()
    assert read_header(tmp_path / "last.ckpt").adapter == ENTRY
    sizes = {t.numel() for s in checkpoint["optimizer_states"][0]["state"].values() for t in s.values()}
    assert max(sizes) <= 2 * 128  # of rank 2 and the widest layer
    with pytest.raises(UserError, match=r"last.ckpt is an adapter of base.ckpt"):
        load_model(tmp_path / "last.ckpt")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_see_the_adapter_only(name: str) -> None:
    made = lora_module()
    assert made.adapter is not None
    model = made.adapter.build(TINY, made.initial_weights, "32-true")
    optimizer = make_optimizer(model, OptimizerConfig(name))  # type: ignore[arg-type]
    seen = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert seen == trained and len(seen) == len(adapter_state(model)) == 2 * 4 * 2
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).loss_sum.backward()
    optimizer.step()


def test_merged_is_what_was_trained(tmp_path: Path) -> None:
    made = fitted(tmp_path, 3)
    model, x = made.model.eval(), torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model(x).logits
    merge(model)
    assert set(model.state_dict()) == set(base_weights())
    torch.testing.assert_close(model(x).logits, logits, rtol=0, atol=1e-5)


def test_rows_of_new_tokens_are_trained_and_saved(tmp_path: Path) -> None:
    made = lora_module()
    assert made.adapter is not None
    made.adapter.new_tokens = range(59, 61)
    fitted(tmp_path, 3, made=made)
    state = load_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    assert state["model.wte.rows"].shape == (2, 32) and "model.lm_head.rows" not in state
    base = base_weights()["wte.weight"]
    assert torch.equal(made.model.wte.weight[:59], base[:59])
    assert not torch.equal(state["model.wte.rows"], base[59:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[KEY].pop("adapter"), "is a whole model's"),
        (lambda c: c[KEY]["adapter"].update(base_sha256="cd" * 32), "trained on another base than base.ckpt"),
        (lambda c: c["state_dict"].popitem(), "does not fit model.lora: they differ in model.h.1.mlp.c_proj"),
    ],
)
def test_another_checkpoint_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    made = fitted(tmp_path, 1)
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    assert made.adapter is not None
    made.adapter.check(made.model, checkpoint)
    change(checkpoint)
    with pytest.raises(UserError, match=message):
        made.adapter.check(made.model, checkpoint)


def test_without_a_base_nothing_is_trained(tmp_path: Path) -> None:
    made = lora_module()
    made.initial_weights = None
    with pytest.raises(UserError, match=r"model.lora.rank=2 needs a base to adapt: name it with --init_from"):
        trainer(tmp_path, max_steps=1).fit(made, Batches(8, 4))


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(UserError, match=r"base_precision=int8 has no effect without lora.rank"):
        LitGPT(TINY, base_precision="int8")
    with pytest.raises(UserError, match=r"lora.rank=64 is above the width of h.0.attn.c_attn, 32"):
        check_lora(TINY, LoRAConfig(rank=64))


@pytest.mark.parametrize(
    "values",
    [
        {"base": 3},
        {"base": "a\nb"},
        {"base_sha256": "xyz"},
        {"first_token": -1},
        {"first_token": True},
        {"lora": None},
        {"lora": {"rank": 0}},
        {"lora": {"rank": 2, "rnk": 3}},
        {"lora": {"rank": "2"}},
        {"lora": {"rank": 2, "targets": 7}},
    ],
)
def test_a_damaged_entry_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^checkpoint x"):
        AdapterEntry.from_dict({**ENTRY.to_dict(), **values}, "checkpoint x")
