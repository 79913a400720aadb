"""`fit --init_from` with data that has more special tokens than the model, as a user runs it."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from models import tiny_gpt

from lit_gpt.__main__ import main
from lit_gpt.checkpoint.format import load_model, read_header, read_weights, save_model
from lit_gpt.tokenizer.chat_template import with_chat_template
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer

FIT = "fit --init_from base.ckpt --data.path chat --data.batch_size 4 --model.schedule.warmup 0 --samples.prompts []"
FIT += " --trainer.max_steps 1 --trainer.limit_val_batches 0 --trainer.accelerator cpu --trainer.precision 32-true"
FIT += " --trainer.enable_progress_bar false --model.optimizer.lr 0"
LAST = Path("lightning_logs/version_0/checkpoints/last.ckpt")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model, and shards of its tokenizer with our chat template, of another one, and without further tokens."""
    monkeypatch.chdir(tmp_path)
    byte = get_tokenizer("byte")
    save_model("base.ckpt", tiny_gpt(dtype=torch.float32, std=0.02, padded_vocab_size=264), byte)
    Path("text.py").write_text(Path(str(string.__file__)).read_text("utf-8"), "utf-8")
    other = Tokenizer.build("other", byte.pattern, byte.ranks, {"<|im_end|>": 256, "<|endoftext|>": 257})
    for name, tokenizer in (("chat", with_chat_template(byte)), ("other", other)):
        tokenizer.save(f"{name}.json")
        assert main(["prepare", "text.py", "--output", name, "--tokenizer", f"{name}.json"]) == 0
    return tmp_path


@pytest.mark.slow
def test_a_model_gets_the_special_tokens_of_its_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FIT.split()) == 0
    assert "new special tokens: <|im_start|>, <|im_end|>; their rows" in capsys.readouterr().err
    header = read_header(LAST)
    assert (header.config.vocab_size, header.config.padded_vocab_size) == (259, 264)
    assert header.tokenizer == with_chat_template(get_tokenizer("byte")).to_dict()
    before, after = read_weights("base.ckpt")["wte.weight"], read_weights(LAST)["wte.weight"]
    assert torch.equal(after[:257], before[:257])
    torch.testing.assert_close(after[257:259], before[:257].mean(0).expand(2, -1), rtol=0, atol=1e-7)
    model, _ = load_model(LAST)
    base, _ = load_model("base.ckpt")
    idx = torch.randint(0, 257, (1, 9))
    assert torch.equal(model(idx).logits[..., :257], base(idx).logits)
    saved = LAST.parents[1] / "config.yaml"
    assert main(["fit", "--config", str(saved)]) == 0  # it names the size that the vocabulary has grown to
    assert main(["fit", "--ckpt_path", str(LAST), "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]) == 0
    assert main(["validate", "--ckpt_path", str(LAST), "--trainer.accelerator", "cpu"]) == 0


@pytest.mark.slow
def test_every_other_difference_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (FIT.replace("path chat", "path other"), "holds shards of the tokenizer other"),
        (f"{FIT} --model.config.vocab_size 300", "model.config.vocab_size=300 differs from the checkpoint's 259"),
        (f"{FIT} --model.config.padded_vocab_size 512", "padded_vocab_size=512 differs from the checkpoint's 264"),
        (
            "validate --init_from base.ckpt --data.path chat",
            "special tokens that the model lacks (<|im_start|>, <|im_end|>)",
        ),
        ("validate --ckpt_path base.ckpt --data.path chat", "start a new run with fit --init_from"),
        ("fit --ckpt_path base.ckpt --data.path chat", "which adds them to a model"),
    ]
    for words, message in cases:
        capsys.readouterr()
        assert main(words.split()) == 2, words
        *before, error = capsys.readouterr().err.splitlines()
        assert message in error and error.startswith("lit_gpt: error: "), (before, error)
    assert not Path("lightning_logs").exists()
