"""What goes on around a run: the loss that is no number, samples, checkpoints, early stopping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import TINY, Batches, losses, module, trainer

from lit_gpt.checkpoint.format import read_header, read_weights
from lit_gpt.errors import UserError
from lit_gpt.generation.complete import complete
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import get_tokenizer
from lit_gpt.train.callbacks.defaults import default_callbacks
from lit_gpt.train.callbacks.non_finite import NonFiniteError
from lit_gpt.train.callbacks.samples import Samples
from lit_gpt.train.callbacks.throughput import Throughput, peak_flops
from lit_gpt.train.optim import OptimizerConfig
from lit_gpt.train.schedule import ScheduleConfig


class Poison(Callback):
    """Makes a weight infinite before the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            pl_module.model.ln_f.weight.data[0] = float("nan")


@pytest.mark.slow
@pytest.mark.parametrize("log_every_n_steps", [1, 100])
def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_good_checkpoint(
    tmp_path: Path, log_every_n_steps: int
) -> None:
    run = trainer(
        tmp_path, max_steps=30, val_check_interval=3, check_val_every_n_epoch=None, enable_checkpointing=True,
        callbacks=[Poison(7), *default_callbacks()], enable_progress_bar=True, log_every_n_steps=log_every_n_steps,
    )  # fmt: skip
    with pytest.raises(NonFiniteError) as error:
        run.fit(module(), Batches(40, 4), Batches(4, 4))
    last = next(tmp_path.rglob("last.ckpt"))
    assert "not finite at step 8, epoch 0, batch 7" in str(error.value)
    assert "last.ckpt" in str(error.value)
    assert "\n" not in str(error.value)
    assert read_header(last).step == 6
    assert all(weight.isfinite().all() for weight in read_weights(last).values())


class SpoilGradient(Callback):
    """Makes one element of the gradient infinite in some steps, which the loss does not show."""

    def __init__(self, steps: range) -> None:
        self.steps = steps

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step in self.steps:
            pl_module.model.ln_f.weight.grad[0] = float("inf")


class SpoilWeights(Callback):
    """Makes a weight infinite after a step, before the validation that follows it."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 6:
            pl_module.model.ln_f.weight.data[0] = float("inf")


def last_of(folder: Path) -> tuple[int, bool]:
    """The step of last.ckpt, and whether its weights are numbers."""
    last = next(folder.rglob("last.ckpt"))
    return read_header(last).step, all(bool(weight.isfinite().all()) for weight in read_weights(last).values())


def saving_trainer(folder: Path, *spoil: Callback, **options: Any) -> L.Trainer:
    callbacks = [*spoil, *default_callbacks()]
    keep = {"enable_checkpointing": True, "callbacks": callbacks, "enable_progress_bar": True}
    return trainer(folder, val_check_interval=3, check_val_every_n_epoch=None, **{**keep, **options})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_with_an_infinite_gradient_is_skipped_counted_and_logged(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One before a validation left NaN weights, which then replaced the last good checkpoint."""
    run = saving_trainer(tmp_path, SpoilGradient(range(5, 6)), max_steps=6, gradient_clip_val=1.0)
    lit = module(optimizer=OptimizerConfig(name=name))  # type: ignore[arg-type]
    run.fit(lit, Batches(40, 4), Batches(4, 4))
    assert last_of(tmp_path) == (6, True)
    assert losses(run, "train/skipped_steps") == {6: 1.0}
    assert "1 optimizer step skipped by step 6: the gradient was not finite" in capsys.readouterr().err


@pytest.mark.slow
def test_many_steps_in_a_row_with_an_infinite_gradient_end_the_run(tmp_path: Path) -> None:
    run = saving_trainer(tmp_path, SpoilGradient(range(4, 99)), max_steps=60, log_every_n_steps=100)
    with pytest.raises(NonFiniteError, match=r"^the gradient was not finite in 2\d steps in a row, by step 2\d; "):
        run.fit(module(), Batches(40, 4), Batches(4, 4))
    step, is_finite = last_of(tmp_path)
    assert is_finite
    assert step < 27


@pytest.mark.slow
def test_weights_that_are_no_numbers_replace_no_checkpoint(tmp_path: Path) -> None:
    run = saving_trainer(tmp_path, SpoilWeights(), max_steps=9)
    with pytest.raises(NonFiniteError, match="the weights are not finite after step 6; the last good checkpoint is"):
        run.fit(module(), Batches(40, 4), Batches(4, 4))
    assert last_of(tmp_path) == (3, True)


@pytest.mark.slow
def test_samples_are_the_engines_and_stand_in_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lit = module()
    lit.tokenizer = get_tokenizer("byte")
    lit.config = lit.config.__class__(**{**TINY.to_dict(), "vocab_size": lit.tokenizer.n_vocab})
    samples = Samples(prompts=["ab", "c"], max_new_tokens=12, temperature=1.0, top_k=None, seed=4, print_at_end=2)
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    run = trainer(tmp_path, max_steps=4, logger=logger, val_check_interval=2, callbacks=[samples])
    run.fit(lit, Batches(16, 4), Batches(4, 4))
    engine = Engine(lit.model.eval(), lit.config, lit.tokenizer, max_slots=2)
    generation_config = GenerationConfig(max_new_tokens=12, seed=4, num_samples=2)
    ((_, (first, second)),) = complete(engine, [lit.tokenizer.encode("ab")], generation_config)
    printed = capsys.readouterr().out
    assert f"--- sample 1 ---\nab{first.text}\n" in printed
    assert f"--- sample 2 ---\nab{second.text}\n" in printed
    assert printed.index("Try next:") > printed.index("--- sample 2 ---")
    assert " --start ab --num_samples 3\n" in printed
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.*")))).Reload()
    for index, prompt in enumerate(["ab", "c"]):
        entries = events.Tensors(f"samples/{index}/text_summary")
        assert [entry.step for entry in entries] == [2, 4]
        assert entries[0].tensor_proto.string_val[0].decode().startswith("    " + prompt)


def test_bad_sampling_settings_stop_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="temperature"):
        trainer(tmp_path, max_steps=1, callbacks=[Samples(temperature=-1.0)]).fit(module(), Batches(4, 4))


def test_early_stopping_is_lightnings(tmp_path: Path) -> None:
    stop = EarlyStopping("val/loss", patience=1)
    run = trainer(tmp_path, max_epochs=20, callbacks=[stop])
    frozen = module(optimizer=OptimizerConfig(lr=0.0), schedule=ScheduleConfig(name="constant", warmup=0))
    run.fit(frozen, Batches(8, 4), Batches(4, 4))
    assert run.current_epoch == 2


def test_fine_tuning_starts_from_the_weights_that_are_given(tmp_path: Path) -> None:
    torch.manual_seed(77)
    source = GPT(TINY)
    data = Batches(4, 4)
    lit = module()
    lit.initial_weights = source.state_dict()
    run = trainer(tmp_path, max_steps=1)
    run.fit(lit, data)
    output = source(*next(iter(data)))
    assert losses(run)[1] == pytest.approx((output.loss_sum / output.n_targets).item(), rel=1e-6)
    assert lit.initial_weights is None  # not held in memory for the rest of the run


def test_the_count_of_tokens_goes_on_after_a_resume() -> None:
    before = Throughput()
    before.tokens = 12_345
    after = Throughput()
    after.load_state_dict(before.state_dict())
    assert after.tokens == 12_345


@pytest.mark.parametrize(("seconds", "products"), [(0.001, 10), (0.02, 3), (4.0, 2)])
def test_the_peak_of_a_slow_device_is_measured_with_few_products(
    seconds: float, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten of fp16 took a CPU that does not compute in it twenty seconds, at the begin of every run."""
    readings = (seconds * number for number in range(99))
    monkeypatch.setattr("lit_gpt.train.callbacks.throughput.time.perf_counter", lambda: next(readings))
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1, 1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: -products)  # of no other measurement in this process
    assert peak_flops(torch.device("cpu"), "32-true") == pytest.approx(2 * 512**3 / seconds)
    assert next(readings) == pytest.approx(2 * products * seconds)
