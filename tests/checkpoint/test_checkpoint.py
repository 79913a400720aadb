"""Checkpoints: whole or absent, complete, and never a way to run code."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from environment import ROOT
from fork_server import ForkServer

from lit_gpt.checkpoint.format import (
    build_model,
    load_model,
    read_header,
    read_weights,
    resolve_ckpt_path,
    save_checkpoint,
    save_model,
)
from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_link, atomic_write
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import get_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model: GPT) -> Path:
    path = tmp_path / "tiny.ckpt"
    save_model(path, tiny_model, get_tokenizer("byte"))
    return path


def test_a_checkpoint_alone_gives_the_same_model_and_tokenizer(checkpoint: Path, tiny_model: GPT) -> None:
    model, tokenizer = load_model(checkpoint)
    idx = torch.randint(257, (2, 8))
    torch.testing.assert_close(model(idx).logits, tiny_model(idx).logits, rtol=0, atol=0)
    assert tokenizer is not None
    assert tokenizer.hash == get_tokenizer("byte").hash
    assert model.lm_head.weight is model.wte.weight, "tied weights come back tied"
    assert not model.training


def test_the_header_is_read_without_the_weights(checkpoint: Path, tiny_config: GPTConfig) -> None:
    header = read_header(checkpoint)
    assert header.config == tiny_config
    assert header.tokenizer is not None


def test_a_model_can_be_trained_without_touching_its_file(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    model, _ = load_model(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert checkpoint.read_bytes() == before


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def test_a_pickle_that_wants_to_run_code_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"lit_gpt": _Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"wants to run \w+\.system"):
        read_header(tmp_path / "evil.ckpt")
    assert not (tmp_path / "owned").exists()


def test_what_is_no_checkpoint_is_refused_with_the_reason(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:-3000])
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    newer = torch.load(checkpoint, weights_only=True)
    newer["lit_gpt"]["format_version"] = 99
    torch.save(newer, tmp_path / "newer.ckpt")
    for name, message in (
        ("cut.ckpt", "truncated"),
        ("text.ckpt", "truncated, damaged or no checkpoint"),
        ("other.ckpt", "not a lit_gpt checkpoint"),
        ("newer.ckpt", "format version 99"),
        ("absent.ckpt", "does not exist"),
        (".", "is a folder"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_header(tmp_path / name)
        assert "\n" not in str(error.value)


def test_all_faults_of_the_weights_are_listed_at_once(checkpoint: Path, tiny_config: GPTConfig) -> None:
    weights = read_weights(checkpoint)
    del weights["ln_f.bias"]
    weights["extra"] = torch.zeros(1)
    weights["wpe.weight"] = torch.zeros(3, 32)
    with pytest.raises(
        UserError, match=r"ln_f.bias is missing.*extra is not part.*wpe.weight is \(3, 32\), not \(32, 32\)"
    ):
        build_model(tiny_config, weights, "x")


def test_last_is_the_newest_run_and_an_error_when_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run under"):
        resolve_ckpt_path("last", tmp_path)
    for run in ("version_0", "version_1"):
        folder = tmp_path / "lightning_logs" / run / "checkpoints"
        folder.mkdir(parents=True)
        save_checkpoint(folder / "step=1.ckpt", {})
        atomic_link(folder / "step=1.ckpt", folder / "last.ckpt")
    older = tmp_path / "lightning_logs/version_0/checkpoints/step=1.ckpt"
    os.utime(older, ns=(0, 0))
    assert resolve_ckpt_path("last", tmp_path).parts[-3] == "version_1"
    assert resolve_ckpt_path("some/path.ckpt", tmp_path) == Path("some/path.ckpt")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk"), atomic_write(path) as file:
        file.write(b"new")
        raise OSError("disk full")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.slow
def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path, fork_server: ForkServer) -> None:
    path, script = tmp_path / "big.ckpt", tmp_path / "script.py"
    script.write_text(
        "import sys, torch\nfrom lit_gpt.checkpoint.format import save_checkpoint\nn = 0\n"
        "while True:\n    n += 1\n    save_checkpoint(sys.argv[1], {'n': n, 'x': torch.full((2_000_000,), float(n))})\n"
    )
    process = fork_server.start(script, path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not path.exists():
        assert process.poll() is None, process.output()
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = torch.load(path, weights_only=True)
    assert bool((found["x"] == found["n"]).all())
