"""Damage anywhere in a prepared folder: `--check` finds it, and what is read is right or one line of error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzzing import fuzz
from hypothesis import example, given
from hypothesis import strategies as st
from preparing import CHINESE, CODE, write

from lit_gpt.data.inspect_shards import check
from lit_gpt.data.prepare import prepare
from lit_gpt.data.prepare_state import PrepareState, _hash
from lit_gpt.data.shard_folder import load_index, open_tokens
from lit_gpt.errors import UserError

OPTIONS = {"tokenizer": "char", "val_split": "tail:0.2", "shard_tokens": 2000}
FILES = ("index.json", "prepare.json", "train_000000.bin", "val_000000.bin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    prepare(str(write(root / "x.txt", (CHINESE + CODE) * 40)), root / "out", **OPTIONS)  # type: ignore[arg-type]
    return root / "out"


@pytest.fixture(scope="module")
def copy(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.parent / "copy"))


def one_line(work: Callable[[], object]) -> bool:
    """Whether it ends with an error, which is one line."""
    try:
        work()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return True
    return False


def damaged(good: bytes, position: int, kind: str, data: bytes) -> bytes:
    position %= len(good) + 1
    if kind == "replace":
        return good[:position] + data + good[position + len(data) :]
    if kind == "insert":
        return good[:position] + data + good[position:]
    return good[:position] + good[position + 1 + len(data) :] if kind == "remove" else good[:position]


def tokens(folder: Path) -> list[list[int]]:
    return [(stream := open_tokens(folder, split)).read(0, len(stream)).tolist() for split in ("train", "val")]


@pytest.mark.slow
@fuzz
@given(
    st.sampled_from(FILES),
    st.integers(0, 1 << 20) | st.integers(0, 1100),
    st.sampled_from(["replace", "insert", "remove", "cut"]),
    st.binary(max_size=6) | st.sampled_from([b"-", b"0", b"9" * 30, b"null", b"\xff", b"[", b'"', b"1e999"]),
)
def test_damage_is_found(folder: Path, copy: Path, name: str, position: int, kind: str, data: bytes) -> None:
    good = (folder / name).read_bytes()
    bad = damaged(good, position, kind, data)
    (copy / name).write_bytes(bad)
    try:
        found = one_line(lambda: check(str(copy)))
        one_line(lambda: tokens(copy))
        if not found:  # then it changes nothing, such as a space in JSON, or it names the tokenizer otherwise
            assert tokens(copy) == tokens(folder)
            ours, theirs = load_index(copy), load_index(folder)
            assert ours.shards == theirs.shards
            assert (ours.eot_id, ours.vocab_size, ours.dtype) == (theirs.eot_id, theirs.vocab_size, theirs.dtype)
            assert ours.tokenizer_hash == theirs.tokenizer_hash
        if name == "prepare.json":
            assert one_line(lambda: PrepareState.read(copy)) or json.loads(bad) == json.loads(good)
    finally:
        (copy / name).write_bytes(good)


@pytest.mark.slow
@fuzz
@given(st.data())
def test_a_state_of_any_values_with_a_hash_that_fits(folder: Path, copy: Path, data: st.DataObject) -> None:
    good = (folder / "prepare.json").read_bytes()
    values = json.loads(good)
    del values["sha256"]
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))
    where = data.draw(st.sampled_from([values, *values["shards"]]))
    where[data.draw(st.sampled_from(sorted(where)))] = data.draw(anything)
    text = json.dumps({**values, "sha256": _hash(values)})
    (copy / "prepare.json").write_text(text)
    try:
        if not one_line(lambda: PrepareState.read(copy)):
            state = PrepareState.read(copy)
            assert state is not None and state.jobs >= 0 and all(shard.tokens >= 0 for shard in state.shards)
        one_line(lambda: check(str(copy)))
    finally:
        (copy / "prepare.json").write_bytes(good)


@pytest.mark.slow
@fuzz
@given(st.binary(max_size=40), st.integers(-(2**31), 2**31 - 1), st.sampled_from(["train.bin", "x_train_1.bin"]))
@example(b"", -100, "x_train_1.bin")
def test_files_of_any_bytes_without_an_index(tmp_path: Path, body: bytes, count: int, name: str) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    for magic, version in ((20240520, 1), (20240801, 7), (count, 1)):
        header = np.zeros(256, "<i4")
        header[:3] = magic, version, count
        for content in (header.tobytes() + body, header.tobytes()[: len(body) * 25] + body):
            (tmp_path / name).write_bytes(content)
            if not one_line(lambda: open_tokens(tmp_path, "train")):
                stream = open_tokens(tmp_path, "train")
                assert 0 < len(stream) * stream.read(0, len(stream)).itemsize <= len(content)
