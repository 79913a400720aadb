"""`fit` with `data.format: pairs`, as a user runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from chatting import chat_bytes, write_lines
from environment import ROOT
from models import tiny_gpt
from pairing import some_pairs

from lit_gpt.__main__ import main
from lit_gpt.checkpoint.format import load_checkpoint, save_model

FIT = f"fit --config {ROOT / 'configs/dpo.yaml'} --data.source pairs.jsonl --data.batch_size 2 --data.path pairs"
FIT += " --trainer.max_steps 4 --trainer.val_check_interval 2 --trainer.accelerator cpu --trainer.precision 32-true"
FIT += " --samples.prompts [] --samples.print_at_end 0 --model.compile false --trainer.log_every_n_steps 1"
LAST = Path("lightning_logs/version_0/checkpoints/last.ckpt")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model that can chat, and pairs."""
    monkeypatch.chdir(tmp_path)
    tokenizer = chat_bytes()
    shape = {"vocab_size": tokenizer.n_vocab, "block_size": 64}
    save_model("base.ckpt", tiny_gpt(dtype=torch.float32, std=0.02, **shape), tokenizer)
    write_lines(Path("pairs.jsonl"), some_pairs(60, most=5))
    return tmp_path


@pytest.mark.slow
def test_fit_resume_validate_and_the_figures_in_tensorboard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*FIT.split(), "--init_from", "base.ckpt"]) == 0
    said = capsys.readouterr().err
    assert re.search(r"train: \d+ pairs in \d+ rows of 128", said)
    assert "reference model, train pairs" in said and "reference model, val pairs" in said
    events = EventAccumulator(str(LAST.parents[1]))
    events.Reload()
    names = {f"{stage}/reward_{name}" for stage in ("train", "val") for name in ("accuracy", "margin", "chosen")}
    assert names | {"train/pairs", "train/loss", "val/loss"} <= set(events.Tags()["scalars"])
    assert events.Scalars("train/loss")[0].value == pytest.approx(0.6931, abs=1e-3)
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "6", "--trainer.accelerator", "cpu"]) == 0
    assert "reference model" not in capsys.readouterr().err
    assert load_checkpoint(LAST)["global_step"] == 6
    assert main(["validate", "--ckpt_path", "last", "--trainer.accelerator", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "val/reward_margin" in printed.out and "reference model" not in printed.err
    assert main(["convert", str(LAST), "published", "--to", "hf"]) == 0
    card = Path("published/README.md").read_text("utf-8")
    assert "preferred answer has the larger reward" in card and "nats a token" not in card
    assert main(["predict", "--ckpt_path", "last", "--chat", "--start", "1 ?", "--max_new_tokens", "4"]) == 0


@pytest.mark.slow
def test_bad_input_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (FIT, "data.format=pairs moves a model that can answer already: give it with --init_from MODEL"),
        (f"{FIT} --init_from base.ckpt --model.dpo.beta 0", "dpo.beta=0.0 must be a finite number above 0"),
        (f"{FIT} --init_from base.ckpt --model.dpo.label_smoothing 0.7", "dpo.label_smoothing=0.7 must lie in"),
        (f"{FIT} --init_from base.ckpt --data.source stdlib-chat", "stdlib-chat is made for format chat, not pairs"),
        (f"{FIT} --init_from base.ckpt --data.source bad.jsonl", 'bad.jsonl: line 1 has no "chosen"'),
    ]
    write_lines(Path("bad.jsonl"), [{"prompt": "q", "rejected": "a"}])
    for words, message in cases:
        capsys.readouterr()
        assert main(words.split()) == 2, words
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("lit_gpt: error: ") and message in last
    assert not Path("lightning_logs").exists() and not Path("pairs/index.json").exists()
