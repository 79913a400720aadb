"""configs/gpt2_124m_muon.yaml: its arithmetic, and its first twenty steps on a small width."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from environment import ROOT, RunProgram
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_gpt.__main__ import main
from lit_gpt.data.shards import write_shard

CONFIG = ROOT / "configs/gpt2_124m_muon.yaml"
SCALING = (ROOT / "docs/scaling.md").read_text("utf-8")


def test_its_steps_are_two_billion_tokens() -> None:
    values = yaml.safe_load(CONFIG.read_text("utf-8"))
    rows = values["data"]["batch_size"] * values["trainer"]["accumulate_grad_batches"]
    assert rows * 1024 == 524_288
    assert rows * 1024 * values["trainer"]["max_steps"] == pytest.approx(2.0e9, rel=0.001)
    assert values["trainer"]["limit_val_batches"] * values["data"]["batch_size"] * 1024 == 10_485_760


def test_the_guide_has_its_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer's file may not be here: the vocabulary is given by number."""
    values = yaml.safe_load(CONFIG.read_text("utf-8"))
    del values["data"]["tokenizer"]
    values["model"]["config"]["vocab_size"] = 50257
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    words = ("--config", str(tmp_path / "config.yaml"), "--precision", "bf16-mixed", "--format", "json")
    assert main(["info", *words]) == 0
    info = json.loads(capsys.readouterr().out)
    peak, total = info["training"]["memory"]["peak"] / 2**30, info["parameters"]["total"]
    assert f"{peak:.1f} GiB" in SCALING and f"{total:,}" in SCALING


@pytest.mark.slow
def test_its_first_twenty_steps_on_a_small_width(tmp_path: Path, program: RunProgram) -> None:
    generator = np.random.default_rng(0)
    for name, count in (("fineweb_val_000000.bin", 4000), ("fineweb_train_000001.bin", 20_000)):
        with write_shard(tmp_path / "shards" / name, "uint16") as writer:
            writer.add(np.sort(generator.integers(0, 256, count)), documents=1, text_bytes=count)
    small = "--model.config.n_layer 2 --model.config.n_embd 64 --model.config.n_head 2 --model.config.block_size 64"
    small += " --data.batch_size 4 --trainer.accumulate_grad_batches 2 --trainer.accelerator cpu --trainer.devices 1"
    small += " --trainer.max_steps 20 --model.schedule.warmup 5 --trainer.val_check_interval 20 --data.tokenizer byte"
    small += " --trainer.log_every_n_steps 1 --trainer.precision 32-true --model.config.padded_vocab_size null"
    done = program("fit", "--config", CONFIG, "--data.path", "shards", *small.split())
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "lightning_logs/version_0"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    (rates,) = [tag for tag in events.Tags()["scalars"] if tag.startswith("lr/") and "muon" in tag] or ["lr/muon"]
    rate = [event.value for event in events.Scalars(rates)]
    assert len(losses) == 20 and np.mean(losses[-4:]) < losses[0]
    assert max(rate) == pytest.approx(0.02) and rate[0] < rate[4] and rate[-1] < rate[12]
