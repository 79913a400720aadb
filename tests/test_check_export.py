"""`scripts/check_export.py`: what is the same is called so, and what differs is noticed. llama.cpp is a stub here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from environment import ROOT
from fork_server import ForkServer
from gguf_samples import TEXT, sample_source

STUB = '''
import numpy as np
import torch
from lit_gpt.convert.recognise import load_source

__version__ = "stub"
GGML_TYPE_F32 = 0


class Llama:
    """The part of llama_cpp.Llama that the script calls, by our own reading of the file."""

    def __init__(self, path, n_ctx, logits_all, verbose, type_k, type_v):
        self.model, self.tokenizer = load_source(path)
        assert n_ctx == self.model.config.block_size and logits_all
        self.reset()

    def reset(self):
        self.ids = []

    @property
    def n_tokens(self):
        return len(self.ids)

    def tokenize(self, text, add_bos, special):
        assert not add_bos and not special
        return self.tokenizer.encode(text.decode() {ids})

    @torch.no_grad()
    def eval(self, ids):
        self.ids = [*self.ids, *ids]
        self.scores = self.model(torch.tensor([self.ids])).logits[0].numpy() {logits}
'''


def check(folder: Path, stub: str | None, server: ForkServer) -> subprocess.CompletedProcess[str]:
    sample_source(folder, "qwen3", block_size=16)
    (folder / "text.txt").write_text(TEXT)
    (folder / "stub").mkdir()
    (folder / "stub/llama_cpp.py").write_text("raise ImportError" if stub is None else stub)
    options = ["--text", "text.txt", "--strings", "40", "--dtypes", "f32,f16", "--windows", "2"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "stub"), str(ROOT)])}
    return server.run(ROOT / "scripts/check_export.py", "sample.ckpt", *options, cwd=folder, env=env)


@pytest.mark.slow
def test_the_same_is_called_the_same(tmp_path: Path, fork_server: ForkServer) -> None:
    done = check(tmp_path, STUB.format(ids="", logits=""), fork_server)
    assert done.returncode == 0 and done.stdout.endswith("all is the same\n"), done.stdout + done.stderr


@pytest.mark.slow
def test_what_differs_is_noticed(tmp_path: Path, fork_server: ForkServer) -> None:
    done = check(tmp_path, STUB.format(ids='+ " "', logits="[:, ::-1].copy()"), fork_server)
    assert done.returncode == 1, done.stdout + done.stderr
    for fault in ("f32: 40 of 40 strings have other ids", "the continuations part at token 0", "f16: perplexity"):
        assert fault in done.stdout


@pytest.mark.slow
def test_without_llama_cpp_there_is_one_line(tmp_path: Path, fork_server: ForkServer) -> None:
    done = check(tmp_path, None, fork_server)
    assert done.returncode == 2 and done.stderr == "llama-cpp-python is not installed: pip install llama-cpp-python\n"
