"""Addresses with a hash, as the Shakespeare configurations have one: the file of that hash, or none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from environment import ROOT, RunProgram

from lit_gpt.data.prepare import prepare
from lit_gpt.data.sources import HASH_MARK, find_sources
from lit_gpt.errors import UserError

CONFIGS = ("shakespeare_char", "shakespeare_char_cpu", "shakespeare_char_modern")
TINYSHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
"""SHA-256 of the text that nanoGPT's `data/shakespeare_char/prepare.py` fetches, 1,115,394 bytes."""
TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 200

Serve = Callable[[str, bytes | None], str]


@pytest.mark.slow
def test_the_file_of_the_hash_is_read(server: Serve, tmp_path: Path) -> None:
    address = server("input.txt", TEXT) + HASH_MARK + hashlib.sha256(TEXT).hexdigest()
    index = prepare([address], tmp_path / "out", "byte", val_split="tail:0.1")
    assert sum(shard.tokens for shard in index.shards) >= len(TEXT)


def test_another_file_is_refused_and_not_kept(server: Serve, tmp_path: Path) -> None:
    address = server("input.txt", TEXT + b"!") + HASH_MARK + hashlib.sha256(TEXT).hexdigest()
    with pytest.raises(UserError, match=r"/input\.txt: what is there is another file than expected \(its SHA-256 is "):
        prepare([address], tmp_path / "out", "byte")
    assert not list((tmp_path / "out").rglob("*input.txt*"))
    server("input.txt", TEXT)  # it is there again, and the same command goes on
    prepare([address], tmp_path / "out", "byte")


@pytest.mark.parametrize("digest", ["", "86c4", "z" * 64, "A" * 64])
def test_what_is_no_hash_is_refused(digest: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is followed by the 64 hexadecimal digits of a SHA-256"):
        find_sources([f"https://example.org/a.txt{HASH_MARK}{digest}"], tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shakespeare_configurations_know_their_text(name: str) -> None:
    data = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text("utf-8"))["data"]
    address, _, digest = data["source"].partition(HASH_MARK)
    assert address.startswith("https://") and address.endswith("/tinyshakespeare/input.txt")
    assert digest == TINYSHAKESPEARE and data["path"] == "data/shakespeare_char"


@pytest.mark.slow
def test_shakespeare_in_two_commands(server: Serve, tmp_path: Path, program: RunProgram) -> None:
    address = server("input.txt", TEXT) + HASH_MARK + hashlib.sha256(TEXT).hexdigest()
    config = (ROOT / "configs/shakespeare_char_cpu.yaml").read_text("utf-8")
    known = yaml.safe_load(config)["data"]["source"]
    (tmp_path / "config.yaml").write_text(config.replace(known, address), "utf-8")
    short = ("--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--model.schedule.warmup", "1")
    short += ("--samples.max_new_tokens", "5")
    done = program("fit", "--config", "config.yaml", *short)
    assert done.returncode == 0, done.stderr
    done = program("predict", "--ckpt_path", "last", "--start", "First", "--max_new_tokens", "5")
    assert done.returncode == 0 and done.stdout.startswith("First"), done.stderr


@pytest.mark.slow
def test_without_a_network_the_remedy_is_named(server: Serve, tmp_path: Path, program: RunProgram) -> None:
    config = (ROOT / "configs/shakespeare_char_cpu.yaml").read_text("utf-8")
    known = yaml.safe_load(config)["data"]["source"]
    gone = server("input.txt", None)
    (tmp_path / "config.yaml").write_text(config.replace(known, f"{gone}{HASH_MARK}{TINYSHAKESPEARE}"), "utf-8")
    done = program("fit", "--config", "config.yaml")
    (line,) = (line for line in done.stderr.splitlines() if "error" in line)
    assert done.returncode == 2 and f"{gone}: cannot be fetched" in line and "(--data.source FILE)" in line
