"""Averaging of weights: the formula by brute force, what is saved when, and runs that go on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from training import Batches, module, trainer

from lit_gpt.checkpoint.format import load_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.train.callbacks.averaging import PolynomialAveraging
from lit_gpt.train.callbacks.checkpoints import LastCheckpoint
from lit_gpt.train.module import LitGPT

Weights = dict[str, torch.Tensor]


class Recorder(Callback):
    """Keeps the weights after each step, and those that each validation has."""

    def __init__(self, stop_in_validation: int | None = None) -> None:
        self.after: list[Weights] = []
        self.validated: list[Weights] = []
        self.stop_in_validation = stop_in_validation

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        self.after.append({name: each.clone() for name, each in pl_module.state_dict().items()})

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        self.validated.append({name: each.clone() for name, each in pl_module.state_dict().items()})
        if len(self.validated) == self.stop_in_validation:
            raise KeyboardInterrupt


def fit(folder: Path, steps: int, recorder: Recorder, power: float = 2.0, every: int = 3, **options: Any) -> LitGPT:
    run = trainer(
        folder,
        max_steps=steps,
        max_epochs=-1,
        enable_checkpointing=True,
        callbacks=[recorder, PolynomialAveraging(power), LastCheckpoint()],
        check_val_every_n_epoch=None,
        val_check_interval=every,
    )
    model = module()
    run.fit(model, Batches(24, 4), Batches(4, 4), **options)
    return model


def saved(folder: Path) -> dict[str, Any]:
    return load_checkpoint(next(folder.rglob("last.ckpt")))


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_average_is_that_of_the_formula(tmp_path: Path, power: int) -> None:
    """Weights of step t: 1, t, and t (t + 1), the rising power that t² stands for (Shamir and Zhang, 4)."""
    recorder = Recorder()
    model = fit(tmp_path, 7, recorder, power)
    counts = [{0: 1, 1: t, 2: t * (t + 1)}[int(power)] for t in range(1, 8)]
    final, checkpoint = model.state_dict(), saved(tmp_path)
    for name, value in final.items():
        wanted = sum(count * each[name].double() for count, each in zip(counts, recorder.after)) / sum(counts)
        assert torch.allclose(value.double(), wanted, rtol=1e-4, atol=1e-6), name
    assert same(checkpoint["state_dict"], final), "what is saved is what generates"
    assert same(checkpoint["current_model_state"], recorder.after[-1]), "and what goes on is the latest"
    seen = recorder.validated[0]["model.lm_head.weight"].double()
    three = zip(counts, recorder.after[:3])
    assert torch.allclose(seen, sum(c * each["model.lm_head.weight"].double() for c, each in three) / sum(counts[:3]))


def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    fit(tmp_path / "whole", 12, Recorder(), every=6)  # an epoch
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path / "first", 12, Recorder(stop_in_validation=1), every=6)
    assert saved(tmp_path / "first")["global_step"] == 6
    fit(tmp_path / "second", 12, Recorder(), every=6, ckpt_path=str(next((tmp_path / "first").rglob("last.ckpt"))))
    whole, second = saved(tmp_path / "whole"), saved(tmp_path / "second")
    assert same(whole["state_dict"], second["state_dict"])
    assert same(whole["current_model_state"], second["current_model_state"])


def test_a_run_that_is_stopped_in_a_validation_keeps_both(tmp_path: Path) -> None:
    recorder = Recorder(stop_in_validation=2)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, 9, recorder)
    checkpoint = saved(tmp_path)
    assert same(checkpoint["current_model_state"], recorder.after[-1])
    assert same(checkpoint["state_dict"], recorder.validated[-1])


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(UserError, match="power=-1 of the averaging"):
        PolynomialAveraging(-1)
    averaging = PolynomialAveraging()
    sharded: Any = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(UserError, match=r"FSDPStrategy does not keep: use --trainer.strategy ddp"):
        averaging.setup(sharded, module(), "fit")
    adapted: Any = SimpleNamespace(adapter=object())
    with pytest.raises(UserError, match="not of an adapter's"):
        averaging.setup(trainer(Path()), adapted, "fit")
