"""What a run leaves in its checkpoints about itself: its recipe and its latest figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import Batches, losses, module, trainer

from lit_gpt.api import load
from lit_gpt.checkpoint.format import KEY, open_checkpoint, save_checkpoint
from lit_gpt.checkpoint.training_record import TrainingRecord, training_record
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.data.prepare import prepare
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.tokenizer.tokenizer import get_tokenizer
from lit_gpt.train.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from lit_gpt.train.callbacks.samples import Samples


def record_of(path: Path) -> TrainingRecord:
    return training_record(*open_checkpoint(path))


@pytest.mark.slow
def test_the_figures_of_the_latest_validation_are_in_the_checkpoint(tmp_path: Path) -> None:
    """Also in one that is saved between two validations, by a run that was resumed."""
    options = {"enable_checkpointing": True, "val_check_interval": 3, "check_val_every_n_epoch": None}
    run = trainer(tmp_path, max_steps=7, callbacks=[BestCheckpoint(), LastCheckpoint()], **options)
    run.fit(module(), Batches(40, 4), Batches(9, 4, seed=1))
    logged = losses(run, "val/loss")
    last = next(tmp_path.rglob("last.ckpt"))
    record = record_of(last)
    assert record.validation["step"] == 6
    assert record.validation["loss"] == pytest.approx(logged[6], rel=1e-5)
    assert record.validation["perplexity"] == pytest.approx(torch.tensor(logged[6]).exp().item(), rel=1e-4)
    assert record.best_loss == pytest.approx(min(logged.values()), rel=1e-5)
    assert (record.steps, record.precision, record.seed) == (7, "32-true", 5)
    assert record.optimizer["name"] == "adamw" and record.schedule["name"] == "cosine"
    more = trainer(tmp_path / "more", max_steps=8, callbacks=[LastCheckpoint()], **options)
    more.fit(module(), Batches(40, 4), Batches(9, 4, seed=1), ckpt_path=last)
    again = record_of(next((tmp_path / "more").rglob("last.ckpt")))
    assert again.steps == 8 and again.validation == record.validation


def test_a_sanity_check_is_no_validation(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, max_steps=2, num_sanity_val_steps=1, enable_checkpointing=True, callbacks=[LastCheckpoint()]
    )
    lit = module()
    run.fit(lit, Batches(40, 4), Batches(9, 4, seed=1))
    assert lit.validation is None or lit.validation["step"] > 0


def test_checkpoints_from_before_are_read(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2, enable_checkpointing=True, callbacks=[LastCheckpoint()])
    run.fit(module(), Batches(40, 4))
    path = next(tmp_path.rglob("last.ckpt"))
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint[KEY].pop("validation") is None
    save_checkpoint(tmp_path / "old.ckpt", checkpoint)
    assert record_of(tmp_path / "old.ckpt").validation == {}
    more = trainer(tmp_path / "more", max_steps=3)
    more.fit(module(), Batches(40, 4), ckpt_path=tmp_path / "old.ckpt")
    checkpoint[KEY]["validation"] = [1]
    save_checkpoint(tmp_path / "odd.ckpt", checkpoint)
    with pytest.raises(UserError, match="its validation is a list"):
        open_checkpoint(tmp_path / "odd.ckpt")


def fit_on_text(folder: Path, **options: Any) -> Path:
    """The last checkpoint of a run of two steps over a prepared text, with sample prompts of these options."""
    if not (folder / "text.txt").exists():
        (folder / "text.txt").write_text("In the beginning there was a text of words.\n" * 40, "utf-8")
        prepare([str(folder / "text.txt")], folder / "shards", "byte", val_split="tail:0.2")
    lit = module(config=GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16))
    lit.tokenizer = get_tokenizer("byte")
    run = trainer(
        folder, max_steps=2, limit_val_batches=1, enable_checkpointing=True,
        callbacks=[Samples(max_new_tokens=2, **options), LastCheckpoint()],
    )  # fmt: skip
    run.fit(lit, datamodule=TokenDataModule(str(folder / "shards"), batch_size=2, block_size=16))
    return max(folder.rglob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def test_a_run_keeps_texts_to_begin_with(tmp_path: Path) -> None:
    """Beginnings of the training text, then the prompts that it was given; and who loads the model has them."""
    given = fit_on_text(tmp_path, prompts=["    In", "\n", "x" * 401, "a word"])
    assert record_of(given).sample_prompts == ("In the beginning", "    In", "a word")
    assert load(str(given)).sample_prompts == ("In the beginning", "    In", "a word")
    assert record_of(fit_on_text(tmp_path, prompts=[])).sample_prompts == ("In the beginning",)


@pytest.mark.slow
def test_hostile_sample_prompts_are_left_out_or_refused(tmp_path: Path) -> None:
    path = fit_on_text(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    entry = checkpoint[KEY]
    for values, kept in (
        (
            ["good", 7, None, ["nested"], {"a": 1}, " \n", "lone \ud800", "x" * 10**6, "also good"],
            ("good", "also good"),
        ),
        ([f"text {number}" for number in range(100)], tuple(f"text {number}" for number in range(8))),
        (None, ()),
    ):
        entry["sample_prompts"] = values
        save_checkpoint(tmp_path / "odd.ckpt", checkpoint)
        assert record_of(tmp_path / "odd.ckpt").sample_prompts == kept
    for values, message in (
        ("text", "its sample_prompts is a str"),
        ([1 << 70], "its sample_prompts holds the number"),
    ):
        entry["sample_prompts"] = values
        save_checkpoint(tmp_path / "odd.ckpt", checkpoint)
        with pytest.raises(UserError, match=message):
            open_checkpoint(tmp_path / "odd.ckpt")
