"""Training as Lightning runs it: resuming, accumulating, logging, and figures that count every token once."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import TINY, Batches, losses, module, trainer

from lit_gpt.checkpoint.format import load_model, read_header
from lit_gpt.errors import UserError
from lit_gpt.model.attention import _causal_attention
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import get_tokenizer
from lit_gpt.train.callbacks.checkpoints import LastCheckpoint
from lit_gpt.train.callbacks.defaults import default_callbacks
from lit_gpt.train.module import LitGPT
from lit_gpt.train.optim import OptimizerConfig
from lit_gpt.train.schedule import ScheduleConfig

DROPPING = dataclasses.replace(TINY, dropout=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "saved"), [("adamw", "after the run"), ("muon", "by the callback")])
def test_a_run_stopped_at_an_epochs_end_goes_on_as_if_it_had_not(tmp_path: Path, name: str, saved: str) -> None:
    options = {
        "config": DROPPING,
        "optimizer": OptimizerConfig(name=name, lr=1e-2),  # type: ignore[arg-type]
        "schedule": ScheduleConfig(warmup=2),
    }
    data, val, limits = Batches(24, 4), Batches(4, 4, seed=1), {"max_steps": 18, "gradient_clip_val": 0.5}
    whole, run = module(**options), trainer(tmp_path / "whole", **limits)
    run.fit(whole, data, val)
    keep = {"enable_checkpointing": True, "callbacks": [LastCheckpoint()]}
    run_1 = trainer(tmp_path / "first", **limits, **(keep if saved == "by the callback" else {}), max_epochs=1)
    run_1.fit(module(**options), data, val)
    assert run_1.global_step == 6
    if saved == "after the run":
        run_1.save_checkpoint(tmp_path / "last.ckpt")
    second, run_2 = module(seed=99, **options), trainer(tmp_path / "second", **limits)
    run_2.fit(second, data, val, ckpt_path=next(tmp_path.rglob("last.ckpt")))
    for column in ("train/loss", "lr/matrices", "val/loss"):
        assert losses(run, column) == {**losses(run_1, column), **losses(run_2, column)}
    for (key, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(a, b), key


@pytest.mark.slow
def test_dropout_is_a_function_of_the_position_in_the_run(tmp_path: Path) -> None:
    def first_losses(seed: int) -> dict[int, float]:
        run = trainer(tmp_path / str(seed), max_steps=3)
        lit = module(config=dataclasses.replace(TINY, dropout=0.5), optimizer=OptimizerConfig(lr=0.0))
        lit.seed = seed
        run.fit(lit, Batches(4, 4))  # the same batch three times, weights that do not move
        return losses(run)

    once = first_losses(1)
    assert len(set(once.values())) == 3  # each step drops other units
    torch.rand(10)  # whatever else draws random numbers
    assert first_losses(1) == once
    assert first_losses(2) != once


@pytest.mark.slow
def test_accumulated_micro_batches_make_the_step_of_one_large_batch(tmp_path: Path) -> None:
    options = {"optimizer": OptimizerConfig(lr=1e-2), "schedule": ScheduleConfig(warmup=0, name="constant")}
    one, run = module(**options), trainer(tmp_path / "one", max_steps=6, gradient_clip_val=0.3)
    run.fit(one, Batches(24, 4))
    parts = trainer(tmp_path / "parts", max_steps=6, gradient_clip_val=0.3, accumulate_grad_batches=4)
    parts.fit(module(**options), Batches(24, 1))
    for column in ("train/loss", "train/gradient_norm"):
        expected = losses(run, column)
        assert sorted(expected) == [1, 2, 3, 4, 5, 6]
        assert losses(parts, column) == pytest.approx(expected, rel=1e-5)


def test_gradient_norm_is_the_norm_before_clipping(tmp_path: Path) -> None:
    lit, data = module(), Batches(4, 4)
    run = trainer(tmp_path, max_steps=1, gradient_clip_val=1e-3)
    run.fit(lit, data)
    module()  # seeds, as the run's did
    reference = GPT(TINY)
    output = reference(*next(iter(data)))
    (output.loss_sum / output.n_targets).backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in reference.parameters()))  # type: ignore[union-attr]
    assert losses(run, "train/gradient_norm")[1] == pytest.approx(norm, rel=1e-5)


def test_validation_counts_every_token_once_in_fp32_and_bf16(tmp_path: Path) -> None:
    data = Batches(13, 4)  # the last batch has one row and three of padding
    lit = module()
    lit.tokenizer = get_tokenizer("byte")
    run = trainer(tmp_path)
    (figures,) = run.validate(lit, data, verbose=False)
    logits = lit.model(torch.cat(data.idx)).logits.double().log_softmax(-1).flatten(0, 1)
    targets = torch.cat(data.targets).flatten()
    counted = targets >= 0
    nll = -logits[counted].gather(1, targets[counted][:, None]).sum().item()
    assert int(counted.sum()) == 13 * 16
    assert figures["val/loss"] == pytest.approx(nll / (13 * 16), rel=1e-6)
    assert figures["val/perplexity"] == pytest.approx(math.exp(nll / (13 * 16)), rel=1e-5)
    assert figures["val/bits_per_byte"] == pytest.approx(nll / math.log(2) / (13 * 16), rel=1e-6)
    (tested,) = trainer(tmp_path).test(lit, data, verbose=False)
    assert tested["test/loss"] == figures["val/loss"]
    half = trainer(tmp_path, precision="bf16-true")
    (figures,) = half.validate(module(), data, verbose=False)
    assert figures["val/loss"] == pytest.approx(nll / (13 * 16), rel=2e-3)


@pytest.mark.slow
def test_a_checkpoint_is_enough_and_says_the_same_as_fit(tmp_path: Path) -> None:
    lit = module(optimizer=OptimizerConfig(name="muon"))
    lit.tokenizer = get_tokenizer("byte")
    run = trainer(
        tmp_path, max_steps=6, enable_checkpointing=True, callbacks=default_callbacks(), enable_progress_bar=True
    )
    run.fit(lit, Batches(24, 4), Batches(9, 4, seed=1))
    said = {name: float(run.callback_metrics[name]) for name in ("val/loss", "val/perplexity", "val/bits_per_byte")}
    path = next(tmp_path.rglob("best.ckpt"))
    again = LitGPT()
    restored = LitGPT(config=read_header(path).config)
    (figures,) = trainer(tmp_path).validate(restored, Batches(9, 4, seed=1), ckpt_path=path, verbose=False)
    assert figures == pytest.approx(said, rel=1e-6)
    header = read_header(path)
    assert header.hyper_parameters["optimizer"]["name"] == "muon"
    assert header.hyper_parameters["config"] == TINY.to_dict()
    assert header.precision == "32-true"
    assert again.tokenizer is None
    assert restored.tokenizer is not None
    model, tokenizer = load_model(path)
    assert tokenizer is not None
    assert tokenizer.decode([104, 105]) == "hi"
    idx = torch.arange(16)[None]
    torch.testing.assert_close(model(idx).logits, lit.model.eval()(idx).logits)


@pytest.mark.slow
def test_tags_and_steps_are_in_the_event_files_after_a_resume_too(tmp_path: Path) -> None:
    def run(steps: int, ckpt_path: Path | None) -> None:
        logger = TensorBoardLogger(tmp_path, name="runs", version=0, default_hp_metric=False)
        fit = trainer(
            tmp_path, max_steps=steps, logger=logger, log_every_n_steps=2, val_check_interval=3,
            check_val_every_n_epoch=None, enable_checkpointing=True, callbacks=default_callbacks(),
            enable_progress_bar=True,
        )  # fmt: skip
        fit.fit(module(optimizer=OptimizerConfig(name="muon")), Batches(40, 4), Batches(4, 4), ckpt_path=ckpt_path)

    run(9, None)
    run(16, next(tmp_path.rglob("last.ckpt")))
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for file in sorted(tmp_path.rglob("events.out.*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            steps.setdefault(tag, []).extend(event.step for event in events.Scalars(tag))
            values.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    trained = ["train/loss", "train/gradient_norm", "lr/muon", "lr/matrices", "lr/vectors", "speed/tokens"]
    trained += ["speed/tokens_per_second", "speed/mfu", "speed/data_wait", "speed/peak_memory_gib"]
    for tag in trained:
        assert steps[tag] == [2, 4, 6, 8, 10, 12, 14, 16], tag
    for tag in ("val/loss", "val/perplexity"):
        assert steps[tag] == [3, 6, 9, 12, 15], tag
    assert values["speed/tokens"] == [step * 4 * 16 for step in steps["speed/tokens"]]
    assert "final/loss" in steps  # the table of hyperparameters


def test_attention_in_bf16_on_a_cpu_is_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(3, 2, 16, 8, generator=generator) for _ in range(4))

    def run(half: bool) -> list[torch.Tensor]:
        leaves = [x.clone().to(torch.bfloat16 if half else torch.float64).requires_grad_() for x in (q, k, v)]
        attend = _causal_attention if half else torch.nn.functional.scaled_dot_product_attention
        y = attend(*leaves) if half else attend(*leaves, is_causal=True)  # type: ignore[operator]
        (y.double() * weight).sum().backward()
        return [y.double(), *(leaf.grad.double() for leaf in leaves)]  # type: ignore[union-attr]

    for ours, exact in zip(run(half=True), run(half=False)):
        assert (ours - exact).norm() / exact.norm() < 0.01


def test_attention_in_bf16_on_a_cpu_drops_weights_and_scales_the_others() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 16, 8).bfloat16() for _ in range(3))
    exact = _causal_attention(q, k, v).double()
    dropped = [_causal_attention(q, k, v, probability=0.25).double() for _ in range(600)]
    assert (dropped[0] - exact).norm() / exact.norm() > 0.2
    assert (torch.stack(dropped).mean(0) - exact).norm() / exact.norm() < 0.03


def test_presets_fill_an_unset_config() -> None:
    assert LitGPT(preset="nano").config == GPTConfig.from_preset("nano")
    assert LitGPT(preset="nano", config=TINY).config == TINY
    with pytest.raises(UserError, match='did you mean "nano"'):
        LitGPT(preset="nanno")


def test_only_training_compiles(tmp_path: Path) -> None:
    """Decoding has a form of its own, which the compiler cannot read."""
    model = module(compile=True)
    trainer(tmp_path).validate(model, Batches(8, 4), verbose=False)
    assert model.model.h[0]._compiled_call_impl is None
