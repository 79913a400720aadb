"""Work-arounds for Lightning that can be tested without a run; test_module and test_parallel hold the others."""

from __future__ import annotations

import errno
import logging
import math
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as L
import pytest
import torch
from jsonargparse import ArgumentParser

from lit_gpt.train.lightning_fixes import (
    EpochProgressBar,
    SaveWholeConfig,
    begin_next_epoch,
    clip_module_gradients,
    silence_lightning,
)


def test_a_full_disk_leaves_the_config_of_a_resumed_run_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's callback left an empty config.yaml: it opens the file before it has the text."""
    parser = ArgumentParser()
    parser.add_argument("--steps", type=int)
    trainer = mock.Mock(log_dir=str(tmp_path), is_global_zero=True)
    trainer.strategy.broadcast = lambda value: value
    SaveWholeConfig(parser, parser.parse_args(["--steps", "1"])).setup(trainer, mock.Mock(), "fit")
    assert (tmp_path / "config.yaml").read_text() == "steps: 1\n"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    for owner, name in (("os", "fsync"), ("jsonargparse.ArgumentParser", "dump")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(f"{owner}.{name}", full)
            SaveWholeConfig(parser, parser.parse_args(["--steps", "2"])).setup(trainer, mock.Mock(), "fit")
        assert (tmp_path / "config.yaml").read_text() == "steps: 1\n"


def test_advertisements_are_dropped_and_all_else_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    silence_lightning()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO, logger.name):
        logger.info("Tip: install litlogger")
        logger.info("Tip: install litmodels")
        logger.info("TPU available: False, using: 0 TPU cores")
        logger.info("GPU available: False")
    seeds = logging.getLogger("lightning.fabric.utilities.seed")
    with caplog.at_level(logging.INFO, seeds.name):
        seeds.info("Seed set to 1337")
    assert caplog.messages == ["GPU available: False"]


@pytest.mark.parametrize(
    ("clip_val", "algorithm", "gradient", "norm"),
    [
        (None, None, [3.0, 4.0], 5.0),
        (1.0, "norm", [0.6, 0.8], 5.0),
        (3.5, "value", [3.0, 3.5], math.hypot(3.0, 3.5)),
    ],
)
def test_gradients_are_clipped_by_norm_or_value_and_the_norm_is_known(
    clip_val: float | None, algorithm: str | None, gradient: list[float], norm: float
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    found = clip_module_gradients(iter([parameter]), clip_val, algorithm)
    assert parameter.grad.tolist() == pytest.approx(gradient, rel=1e-5)
    assert found.item() == pytest.approx(norm)


@pytest.mark.parametrize(("completed", "is_last", "expected"), [(1, True, 0), (0, True, 6), (1, False, 6)])
def test_only_a_run_that_ended_with_its_epoch_begins_the_next(completed: int, is_last: bool, expected: int) -> None:
    state: dict[str, Any] = {
        "epoch_progress": {"current": {"ready": 1, "completed": completed}},
        "epoch_loop.batch_progress": {"current": {"ready": 6, "completed": 6}, "is_last_batch": is_last},
    }
    begin_next_epoch(state)
    assert state["epoch_loop.batch_progress"]["current"] == {"ready": expected, "completed": expected}


@pytest.mark.parametrize(("limits", "expected"), [({"max_steps": 3}, "Epoch 2"), ({"max_epochs": 4}, "Epoch 2/3")])
def test_the_bar_has_a_number_of_epochs_only_where_there_is_one(limits: dict[str, int], expected: str) -> None:
    bar = EpochProgressBar()
    bar._trainer = L.Trainer(**limits, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert bar._get_train_description(2).rstrip() == expected
