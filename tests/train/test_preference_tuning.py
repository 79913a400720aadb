"""Preference tuning as Lightning runs it: what is learnt, logged and stored, and a resume to the same bits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from chatting import chat_bytes
from fork_server import ForkServer
from lightning.pytorch.callbacks import Callback
from pairing import prepare_pairs, some_pairs
from training import losses, module, trainer

from lit_gpt.batch import PairBatch
from lit_gpt.checkpoint.format import load_checkpoint
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.train.callbacks.reference import ReferenceLogprobs
from lit_gpt.train.dpo import DPOConfig, answer_logprobs
from lit_gpt.train.module import LitGPT
from lit_gpt.train.optim import OptimizerConfig
from lit_gpt.train.schedule import ScheduleConfig

TESTS = Path(__file__).resolve().parent
BLOCK = 64
CONFIG = GPTConfig(vocab_size=chat_bytes().n_vocab, block_size=BLOCK, n_layer=2, n_head=2, n_embd=32)
FIGURES = ("loss", "reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected")
COMPUTE = "lit_gpt.train.callbacks.reference.answer_logprobs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of which "y" is always preferred to "n"."""
    folder = tmp_path_factory.mktemp("preferences") / "out"
    prepare_pairs(folder, some_pairs(60, most=6))
    return folder


def data_of(folder: Path, **options: Any) -> TokenDataModule:
    return TokenDataModule(str(folder), format="pairs", block_size=BLOCK, **{"batch_size": 2, **options})


def lit(**options: Any) -> LitGPT:
    settings = {"optimizer": OptimizerConfig(lr=1e-3, weight_decay=0.0), "schedule": ScheduleConfig(warmup=0)}
    return module(**{"config": CONFIG, "dpo": DPOConfig(beta=0.5), **settings, **options})


def fit(
    folder: Path, root: Path, steps: int, ckpt_path: Path | None = None, **options: Any
) -> tuple[LitGPT, L.Trainer]:
    """A run of so many steps, judged every five, which leaves a checkpoint after its third and its last one."""
    data, tuned = data_of(folder), lit(**options)
    limits = {"max_steps": steps, "max_epochs": -1, "val_check_interval": 5, "check_val_every_n_epoch": None}
    run = trainer(root, callbacks=[ReferenceLogprobs(data), SaveAfter(root, 3)], **limits)
    run.fit(tuned, data, ckpt_path=ckpt_path)
    run.save_checkpoint(root / "last.ckpt")
    return tuned, run


class SaveAfter(Callback):
    """Saves a checkpoint after one step."""

    def __init__(self, root: Path, step: int) -> None:
        self.root, self.step = root, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.root / f"step{self.step}.ckpt")


def mean_probability(tuned: LitGPT, folder: Path) -> torch.Tensor:
    """(2,) geometric means over the training pairs of the probability of the chosen and of the rejected answer."""
    data = data_of(folder)
    data.setup("fit")
    rows = data.pairs["train"]
    batch = rows.read(range(len(rows)), len(rows), pin=False)
    assert isinstance(batch, PairBatch)
    with torch.no_grad():
        return answer_logprobs(tuned.model.eval(), batch)[batch.numbers >= 0].mean(0).exp()


@pytest.mark.slow
def test_the_chosen_answers_become_likelier_and_the_rejected_ones_less(folder: Path, tmp_path: Path) -> None:
    before, _ = fit(folder, tmp_path / "none", 1, optimizer=OptimizerConfig(lr=0.0))
    after, run = fit(folder, tmp_path / "some", 40)
    at_start, at_end = mean_probability(before, folder), mean_probability(after, folder)
    assert at_end[0] > at_start[0] and at_end[1] < at_start[1]
    assert losses(run, "train/loss")[1] == pytest.approx(math.log(2), rel=1e-4)
    assert losses(run, "train/loss")[40] < 0.2
    assert losses(run, "train/reward_accuracy")[40] == 1
    assert losses(run, "train/reward_margin")[40] > 1
    assert losses(run, "train/pairs")[40] > 2
    result = trainer(tmp_path / "val").validate(after, data_of(folder), verbose=False)
    assert {f"val/{name}" for name in FIGURES} <= result[0].keys()


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits_and_does_not_compute_the_reference_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = fit(folder, tmp_path / "whole", 7)
    monkeypatch.setattr(COMPUTE, lambda *_: pytest.fail("computed again"))
    second, resumed = fit(folder, tmp_path / "second", 7, tmp_path / "whole" / "step3.ckpt")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    for column in ("train/loss", "train/reward_margin", "val/loss"):
        ours = losses(resumed, column)
        assert ours and ours.items() <= losses(run, column).items()
    tables = [
        load_checkpoint(tmp_path / name / "last.ckpt")["callbacks"]["ReferenceLogprobs"] for name in ("whole", "second")
    ]
    assert tables[0]["weights"] == tables[1]["weights"] and len(tables[0]["weights"]) == 64
    for split in ("train", "val"):
        assert torch.equal(tables[0]["logprobs"][split], tables[1]["logprobs"][split])
        assert tables[0]["logprobs"][split].isfinite().all()


@pytest.mark.slow
def test_validation_judges_by_the_reference_of_the_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = fit(folder, tmp_path / "run", 10)
    expected = losses(run, "val/reward_margin")
    fresh, data = lit(seed=9), data_of(folder)
    by_itself = trainer(tmp_path / "itself", callbacks=[ReferenceLogprobs(data)])
    (figures,) = by_itself.validate(fresh, data, verbose=False)
    assert figures["val/loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert figures["val/reward_margin"] == pytest.approx(0, abs=1e-4)
    monkeypatch.setattr(COMPUTE, lambda *_: pytest.fail("computed again"))
    data = data_of(folder)
    judge = trainer(tmp_path / "judge", callbacks=[ReferenceLogprobs(data)])
    (figures,) = judge.validate(lit(seed=9), data, ckpt_path=tmp_path / "run" / "last.ckpt", verbose=False)
    assert figures["val/reward_margin"] == pytest.approx(list(expected.values())[-1], rel=1e-5)
    assert figures["val/reward_margin"] > 0.01


@pytest.mark.slow
def test_other_pairs_and_runs_without_a_reference_are_refused(folder: Path, tmp_path: Path) -> None:
    fit(folder, tmp_path / "run", 3)
    prepare_pairs(tmp_path / "other", some_pairs(60, seed=8, most=6))
    with pytest.raises(UserError, match="pairs are not those of the checkpoint's run"):
        data = data_of(tmp_path / "other")
        judge = trainer(tmp_path / "judge", callbacks=[ReferenceLogprobs(data)])
        judge.validate(lit(), data, ckpt_path=tmp_path / "run" / "last.ckpt", verbose=False)
    saved = load_checkpoint(tmp_path / "run" / "last.ckpt")
    del saved["callbacks"]["ReferenceLogprobs"]
    torch.save(saved, tmp_path / "without.ckpt")
    with pytest.raises(UserError, match="has no log-probabilities of a reference model"):
        fit(folder, tmp_path / "again", 5, tmp_path / "without.ckpt")


@pytest.mark.slow
def test_accumulated_micro_batches_log_the_pairs_of_the_whole_step(folder: Path, tmp_path: Path) -> None:
    data, tuned = data_of(folder, batch_size=1), lit(optimizer=OptimizerConfig(lr=0.0))
    options = {"max_steps": 2, "accumulate_grad_batches": 2}
    run = trainer(tmp_path, callbacks=[ReferenceLogprobs(data)], **options)
    run.fit(tuned, data)
    data, again = data_of(folder, batch_size=2), lit(optimizer=OptimizerConfig(lr=0.0))
    other = trainer(tmp_path / "other", callbacks=[ReferenceLogprobs(data)], max_steps=2)
    other.fit(again, data)
    assert losses(run, "train/pairs") == losses(other, "train/pairs")


@pytest.mark.slow
def test_two_ranks_see_the_same_pairs_and_compute_the_same_reference(
    folder: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    common = {
        "folder": str(folder), "max_steps": 4, "max_epochs": -1, "data": {"format": "pairs"},
        "config": {"vocab_size": CONFIG.vocab_size, "block_size": BLOCK}, "limit_val_batches": 2,
    }  # fmt: skip
    one, two = ({**common, "root": str(tmp_path / name)} for name in ("one", "two"))
    two |= {"ranks": 2, "accumulate": 1, "batch_size": 4}
    done = fork_server.start(TESTS / "resume_driver.py", json.dumps([{**one, "batch_size": 2}, two])).finish()
    assert done.returncode == 0, done.stderr[-3000:]
    samples = [
        sorted(line for path in (tmp_path / name).glob("samples_*.jsonl") for line in rows_of(path))
        for name in ("one", "two")
    ]
    assert samples[0] == samples[1]
    tables = [
        torch.load(tmp_path / name / "step4.ckpt", weights_only=True)["callbacks"]["ReferenceLogprobs"]
        for name in ("one", "two")
    ]
    assert tables[0]["weights"] == tables[1]["weights"]
    for split in ("train", "val"):
        torch.testing.assert_close(tables[0]["logprobs"][split], tables[1]["logprobs"][split])


def rows_of(path: Path) -> list[tuple[int, str]]:
    """(step, row) of everything that a rank saw."""
    lines = map(json.loads, path.read_text().splitlines())
    return [(step, row) for step, rows in lines for row in rows]
