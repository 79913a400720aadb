"""The way to the hub, against a server on this machine that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Repository, refused
from safetensors.torch import load_file

from lit_gpt.checkpoint.format import load_model, save_model
from lit_gpt.convert.recognise import open_source
from lit_gpt.convert.write import write_hf
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import get_tokenizer

RunProgram = Callable[..., Any]


@pytest.fixture
def hub(server: Any, tmp_path: Path, tiny_model: GPT) -> Repository:
    save_model(tmp_path / "tiny.ckpt", tiny_model, get_tokenizer("byte"))
    write_hf(open_source(str(tmp_path / "tiny.ckpt")), tmp_path / "hf")
    repositories = server[0].repositories
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    repository = Repository(f"some/model-{len(repositories)}", files)
    repositories[repository.id] = repository
    return repository


@pytest.fixture
def convert(server: Any, hub: Repository, tmp_path: Path) -> Callable[..., Any]:
    """`lit_gpt convert some/model-N OUTPUT`."""
    return lambda output, **environment: server[1]("convert", hub.id, tmp_path / output, **environment)


def is_tiny(path: Path, model: GPT) -> bool:
    converted, tokenizer = load_model(path)
    return torch.equal(converted.wte.weight, model.wte.weight) and tokenizer is not None


@pytest.mark.slow
def test_whole_then_cached_then_offline(
    hub: Repository, convert: Any, server: Any, program: RunProgram, tmp_path: Path, tiny_model: GPT
) -> None:
    done = convert("a.ckpt")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'a.ckpt'}\n"
    assert f"downloading model.safetensors of {hub.id}" in done.stderr
    assert is_tiny(tmp_path / "a.ckpt", tiny_model)
    assert len(hub.gets()) == 1
    assert convert("b.ckpt").returncode == 0
    assert len(hub.gets()) == 1  # from the cache
    before = len(hub.requests)
    offline = program("convert", hub.id, "c.ckpt", **server[2] | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr
    assert len(hub.requests) == before
    assert is_tiny(tmp_path / "c.ckpt", tiny_model)


@pytest.mark.slow
def test_interrupted_and_resumed(hub: Repository, convert: Any, tmp_path: Path, tiny_model: GPT) -> None:
    """The connection breaks in the middle of the weights: the rest is asked for, not the whole again."""
    hub.cut["model.safetensors"] = 20_000
    done = convert("a.ckpt")
    if done.returncode:  # then the next call goes on where this one ended
        assert done.returncode == 2 and "start again to resume" in done.stderr
        done = convert("a.ckpt")
    assert done.returncode == 0, done.stderr
    assert is_tiny(tmp_path / "a.ckpt", tiny_model)
    assert any(asked and not asked.startswith("bytes=0-") for asked in hub.gets()), hub.gets()


@pytest.mark.slow
def test_shards_are_fetched_by_the_index(hub: Repository, convert: Any, tmp_path: Path, tiny_model: GPT) -> None:
    content = hub.files.pop("model.safetensors")
    (tmp_path / "whole.safetensors").write_bytes(content)
    names = load_file(tmp_path / "whole.safetensors")
    hub.files["model-00001-of-00001.safetensors"] = content
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert convert("a.ckpt").returncode == 0
    assert is_tiny(tmp_path / "a.ckpt", tiny_model)


@pytest.mark.slow
def test_no_such_repository(server: Any, tmp_path: Path) -> None:
    done = server[1]("convert", "some/other", tmp_path / "a.ckpt")
    refused(done, "some/other is neither a file here nor a repository of the hub")


@pytest.mark.slow
def test_a_repository_that_wants_a_token(hub: Repository, convert: Any, tmp_path: Path, tiny_model: GPT) -> None:
    hub.token = "hf_right"
    refused(convert("a.ckpt"), "HF_TOKEN")
    refused(convert("a.ckpt", HF_TOKEN="hf_wrong"), "HF_TOKEN")
    done = convert("a.ckpt", HF_TOKEN="hf_right")
    assert done.returncode == 0, done.stderr
    assert is_tiny(tmp_path / "a.ckpt", tiny_model)


@pytest.mark.slow
def test_weights_that_arrive_damaged(hub: Repository, convert: Any, tmp_path: Path, tiny_model: GPT) -> None:
    """As long as they should be, but with other bytes: found by the digest, and not kept."""
    good = hub.files["model.safetensors"]
    hub.digests["model.safetensors"] = hashlib.sha256(good).hexdigest()
    hub.files["model.safetensors"] = good[:-5000] + bytes(byte ^ 1 for byte in good[-5000:])
    refused(convert("a.ckpt"), "model.safetensors arrived damaged")
    assert not (tmp_path / "a.ckpt").exists()
    hub.files["model.safetensors"] = good
    assert convert("a.ckpt").returncode == 0
    assert is_tiny(tmp_path / "a.ckpt", tiny_model)


@pytest.mark.slow
def test_what_is_not_supported_is_not_downloaded(hub: Repository, convert: Any) -> None:
    hub.files["config.json"] = json.dumps({"model_type": "mamba"}).encode()
    refused(convert("a.ckpt"), "model_type 'mamba'")
    assert hub.gets() == []


@pytest.mark.slow
def test_a_repository_without_safetensors(hub: Repository, convert: Any) -> None:
    del hub.files["model.safetensors"]
    refused(convert("a.ckpt"), "has no model.safetensors")
