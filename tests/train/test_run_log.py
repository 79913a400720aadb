"""The log that a training run writes of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from training import TINY, Batches, losses, module, trainer

from lit_gpt.checkpoint.run_log import RUN_LOG, RunLog, read_run_log
from lit_gpt.train.callbacks.defaults import default_callbacks
from lit_gpt.train.callbacks.throughput import Throughput

STEP_TOKENS = 4 * 16


class Fail(Callback):
    """Fails at a batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise ArithmeticError("on purpose")


def fit(folder: Path, *more: Callback, ckpt: Path | None = None, **options: Any) -> L.Trainer:
    keep = {"val_check_interval": 3, "check_val_every_n_epoch": None, "enable_checkpointing": True, "max_steps": 7}
    callbacks = [*more, *default_callbacks()]
    logger = CSVLogger(folder, version=0, flush_logs_every_n_steps=1)
    run = trainer(folder, **{**keep, "callbacks": callbacks, "enable_progress_bar": True, "logger": logger, **options})
    run.fit(module(), Batches(40, 4), Batches(4, 4), ckpt_path=ckpt)
    return run


def log_of(folder: Path) -> RunLog:
    log = read_run_log(next(folder.rglob(RUN_LOG)).parent)
    assert log is not None
    return log


@pytest.mark.slow
def test_each_validation_is_logged_with_what_had_been_spent_and_the_end(tmp_path: Path) -> None:
    run = fit(tmp_path)
    log, logged = log_of(tmp_path), losses(run, "val/loss")
    assert [values["step"] for values in log.validations] == [3, 6]
    flops = 3 * TINY.forward_flops_per_token(16)
    for values in log.validations:
        assert values["loss"] == pytest.approx(logged[values["step"]], rel=1e-5)
        assert values["tokens"] == values["step"] * STEP_TOKENS
        assert values["flops"] == pytest.approx(values["tokens"] * flops)
        assert values["peak_memory"] > 1 << 20
    assert log.end is not None and (log.end["step"], log.end["tokens"]) == (7, 7 * STEP_TOKENS)
    assert 0 < log.validations[0]["seconds"] <= log.validations[1]["seconds"] <= log.end["seconds"]
    assert log.start["step"] == 0
    assert log.start["parameters"] == sum(parameter.numel() for parameter in run.lightning_module.parameters())


@pytest.mark.slow
def test_a_run_that_failed_has_no_end_and_goes_on_counting_when_it_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError):
        fit(tmp_path, Fail(5))
    first = log_of(tmp_path)
    assert first.end is None and [values["step"] for values in first.validations] == [3]
    fit(tmp_path, ckpt=next(tmp_path.rglob("last.ckpt")), max_steps=14)
    log = log_of(tmp_path)
    assert log.validations[0]["step"] == 3 and log.validations[1]["step"] > 5
    assert log.validations[0] == first.validations[0]
    assert log.start["step"] == 5
    assert log.end is not None and log.end["tokens"] == 14 * STEP_TOKENS
    assert log.end["flops"] == pytest.approx(14 * STEP_TOKENS * 3 * TINY.forward_flops_per_token(16))
    assert log.validations[1]["seconds"] > first.validations[0]["seconds"], "the time of both parts"


@pytest.mark.slow
def test_a_run_without_a_logger_writes_no_log(tmp_path: Path) -> None:
    fit(tmp_path, logger=False, default_root_dir=tmp_path)
    assert not list(tmp_path.rglob(RUN_LOG))


def test_the_seconds_and_flops_of_a_checkpoint_from_before_are_unknown_and_not_too_few() -> None:
    throughput = Throughput()
    throughput.load_state_dict({"tokens": 5})
    assert throughput.tokens == 5
    assert throughput.flops != throughput.flops and throughput.seconds != throughput.seconds


@pytest.mark.slow
def test_a_resume_that_fails_before_its_first_batch_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    fit(tmp_path)
    path = next(tmp_path.rglob(RUN_LOG))
    before = path.read_bytes()
    with pytest.raises(ArithmeticError):
        fit(tmp_path, Fail(7), ckpt=next(tmp_path.rglob("last.ckpt")), max_steps=9)
    assert path.read_bytes() == before and log_of(tmp_path).end is not None
