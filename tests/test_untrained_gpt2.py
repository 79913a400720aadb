"""scripts/untrained_gpt2.py: the demo of chapter 4 of "LLMs from scratch", and `predict` beside it."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from environment import ROOT, SHARED

from lit_gpt.__main__ import main
from lit_gpt.api import load
from lit_gpt.convert.recognise import load_source
from lit_gpt.model.config import GPTConfig

CACHE = SHARED / "tiktoken_cache"
GUIDE = (ROOT / "docs/parts.md").read_text("utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("untrained_gpt2", ROOT / "scripts/untrained_gpt2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_and_greedy_decoding_write_the_same_past_the_context(script: ModuleType, tmp_path: Path) -> None:
    config = GPTConfig.from_preset(
        "llms-from-scratch-124m", vocab_size=65, block_size=8, n_layer=2, n_head=4, n_embd=32
    )
    torch.save(script.untrained_weights(config), tmp_path / "small.pth")
    model, _ = load_source(str(tmp_path / "small.pth"), n_head=4)
    out = script.generate_text_simple(model.eval(), torch.tensor([[3, 1, 4, 1]]), 10, 8)
    assert out.shape == (1, 14) and out[0, :4].tolist() == [3, 1, 4, 1]
    gpt = load(str(tmp_path / "small.pth"), n_head=4)
    assert gpt.generate([3, 1, 4, 1], strategy="greedy", max_new_tokens=10) == out[0, 4:].tolist()


@pytest.mark.slow
@pytest.mark.skipif(not CACHE.exists(), reason="../shared/tiktoken_cache is not here")
def test_the_demo_of_the_guide_prints_what_stands_there(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ids and the text are those that the chapter prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    (block,) = re.findall(r"^```console\n(\$ python scripts/untrained_gpt2.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    for part in block.removeprefix("$ ").split("\n$ "):
        line, shown = part.split("\n", 1)
        words = shlex.split(line)
        if words[0] == "python":
            monkeypatch.setattr(sys, "argv", words[1:])
            script.main()
        else:
            assert main(words[1:]) == 0, line
        assert capsys.readouterr().out.strip() == shown.strip()
    assert "42348, 7267" in block and "Hello, I am Featureiman Byeswickattribute argue" in block
