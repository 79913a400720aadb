"""The shard format against bytes written by hand, and every way in which a folder can be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.data.index import Shard, ShardIndex
from lit_gpt.data.shard_folder import STATE_FILE, check_folder, is_prepared, load_index, open_tokens
from lit_gpt.data.shards import write_shard
from lit_gpt.data.token_stream import check_ids
from lit_gpt.errors import UserError


def by_hand(magic: int, version: int, code: str, ids: list[int]) -> bytes:
    """The format as llm.c's reader takes it, packed by `struct` alone."""
    return struct.pack("<256i", magic, version, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}{code}", *ids)


def folder_of(path: Path, splits: dict[str, list[list[int]]], **about: object) -> ShardIndex:
    """A prepared folder: per split, a list of shards."""
    shards = []
    for split, contents in splits.items():
        for number, ids in enumerate(contents):
            with write_shard(path / f"{split}_{number:06}.bin", "uint16") as writer:
                writer.add(np.array(ids, dtype=np.int64), documents=1, text_bytes=len(ids))
            shards.append(writer.shard)
    values = {"tokenizer": "byte", "tokenizer_hash": "abc", "vocab_size": 257, "eot_id": 256, "eot_position": "after"}
    index = ShardIndex("uint16", tuple(shards), **{**values, **about})  # type: ignore[arg-type]
    index.save(path)
    return index


@pytest.mark.parametrize(
    ("dtype", "magic", "version", "code", "ids"),
    [("uint16", 20240520, 1, "H", [0, 1, 65535]), ("uint32", 20240801, 7, "I", [0, 128_255, 2**32 - 1])],
)
def test_bytes_are_the_format(tmp_path: Path, dtype: str, magic: int, version: int, code: str, ids: list[int]) -> None:
    expected = by_hand(magic, version, code, ids)
    with write_shard(tmp_path / "x_train_0.bin", dtype) as writer:
        for token in ids:
            writer.add(np.array([token]))
    assert (tmp_path / "x_train_0.bin").read_bytes() == expected
    assert writer.shard == Shard("x_train_0.bin", 3, len(expected), hashlib.sha256(expected).hexdigest())
    assert open_tokens(tmp_path, "train").read(0, 3).tolist() == ids  # no index: as public sets come


def test_public_and_headerless_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number, ids in enumerate([[1, 2], [3, 4, 5]]):
        (tmp_path / "a" / f"fineweb_train_{number:06}.bin").write_bytes(by_hand(20240520, 1, "H", ids))
    (tmp_path / "a" / "fineweb_val_000000.bin").write_bytes(by_hand(20240520, 1, "H", [9]))
    (tmp_path / "a" / "gpt2_124M.bin").write_bytes(b"a checkpoint that lies beside its data")
    assert open_tokens(tmp_path / "a", "train").read(0, 5).tolist() == [1, 2, 3, 4, 5]
    assert open_tokens(tmp_path / "a", "val").read(0, 1).tolist() == [9]
    (tmp_path / "b").mkdir()
    np.arange(7, dtype="<u2").tofile(tmp_path / "b" / "train.bin")  # how nanoGPT's prepare.py writes it
    assert open_tokens(tmp_path / "b", "train").read(2, 5).tolist() == [2, 3, 4, 5, 6]
    assert is_prepared(tmp_path / "a") and is_prepared(tmp_path / "b") and not is_prepared(tmp_path)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)  # each writes and syncs its files
@given(data=st.data(), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
def test_shard_borders_do_not_show(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("borders")
    whole = np.arange(sum(sizes))
    folder_of(path, {"train": [piece.tolist() for piece in np.split(whole, np.cumsum(sizes)[:-1])]})
    stream = open_tokens(path, "train")
    assert len(stream) == len(whole)
    for _ in range(4):
        start = data.draw(st.integers(0, len(whole)))
        count = data.draw(st.integers(0, len(whole) - start))
        assert stream.read(start, count).tolist() == whole[start : start + count].tolist()
        if count:
            owners = np.repeat(np.arange(len(sizes)), sizes)[start : start + count]
            touched = stream.shard_range(start, count)
            assert set(owners.tolist()) <= set(touched) and {touched[0], touched[-1]} == {owners[0], owners[-1]}
    for bad in [(-1, 1), (0, len(whole) + 1)]:
        with pytest.raises(IndexError):
            stream.read(*bad)


@pytest.mark.slow
def test_more_shards_than_open_files(tmp_path: Path) -> None:
    folder_of(tmp_path, {"train": [[number] for number in range(200)]})
    stream = open_tokens(tmp_path, "train")
    for _ in range(2):
        assert [int(stream.read(position, 1)[0]) for position in range(200)] == list(range(200))
    assert len(list(Path("/proc/self/fd").iterdir())) < 150


def test_index_round_trip_and_counts(tmp_path: Path) -> None:
    index = folder_of(tmp_path, {"train": [[1, 256], [256]], "val": [[4, 5, 256]]})
    assert load_index(tmp_path) == index == check_folder(tmp_path)
    stream = open_tokens(tmp_path, "train")
    assert (stream.documents, stream.text_bytes, len(stream)) == (2, 3, 3)


def test_fingerprint_is_the_content(tmp_path: Path) -> None:
    for name, ids in [("a", [1, 2, 3]), ("b", [1, 2, 3]), ("c", [1, 2, 4])]:
        folder_of(tmp_path / name, {"train": [ids]})
    prints = {name: open_tokens(tmp_path / name, "train").fingerprint for name in "abc"}
    assert prints["a"] == prints["b"] != prints["c"]
    for name in "abc":
        (tmp_path / name / "index.json").unlink()  # without hashes the ends of each file are read
    assert open_tokens(tmp_path / "a", "train").fingerprint == open_tokens(tmp_path / "b", "train").fingerprint
    assert open_tokens(tmp_path / "a", "train").fingerprint != open_tokens(tmp_path / "c", "train").fingerprint


def test_an_interrupted_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), write_shard(tmp_path / "train_0.bin", "uint16") as writer:
        writer.add(np.array([1]))
        raise RuntimeError("no space left")
    with (
        pytest.raises(UserError, match="id 65536 does not fit uint16"),
        write_shard(tmp_path / "t", "uint16") as writer,
    ):
        writer.add(np.array([65536]))
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    folder_of(tmp_path, {"train": [list(range(100))]})
    stream = open_tokens(tmp_path, "train")
    assert stream.read(0, 1).tolist() == [0]
    with (tmp_path / "train_000000.bin").open("r+b") as file:
        file.truncate(1100)
    with pytest.raises(UserError, match="truncated"):
        stream.read(50, 10)


def change_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def break_index(path: Path, **changes: object) -> None:
    values = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps({**values, **changes}))


BREAKAGES = {
    "wrong magic": (lambda path: change_byte(path / "train_000000.bin", 0), "wrong magic"),
    "wrong version": (lambda path: change_byte(path / "train_000000.bin", 4), "version 0 of magic"),
    "truncated": (
        lambda path: (path / "train_000000.bin").write_bytes(by_hand(20240520, 1, "H", [1])[:-1]),
        "truncated",
    ),
    "another length": (lambda path: (path / "train_000000.bin").write_bytes(by_hand(20240520, 1, "H", [1])), "says"),
    "missing": (lambda path: (path / "train_000000.bin").unlink(), "missing"),
    "unlisted": (lambda path: (path / "train_9.bin").write_bytes(by_hand(20240520, 1, "H", [1])), "not listed"),
    "no index, mixed": (
        lambda path: [
            (path / "index.json").unlink(),
            (path / "train_9.bin").write_bytes(by_hand(20240801, 7, "I", [1])),
        ],
        "different tokenizers are mixed",
    ),
    "unfinished": (lambda path: (path / "index.json").rename(path / STATE_FILE), "not finished"),
    "not JSON": (lambda path: (path / "index.json").write_text("{"), "not JSON"),
    "no fields": (lambda path: (path / "index.json").write_text('{"format_version": 1}'), "not an index"),
    "newer": (lambda path: break_index(path, format_version=99), "newer than this program"),
    "odd dtype": (lambda path: break_index(path, dtype="float64"), 'dtype "float64"'),
    "no train": (lambda path: break_index(path, shards=[]) or (path / "train_000000.bin").unlink(), "no train shards"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_bad_folder(tmp_path: Path, name: str) -> None:
    folder_of(tmp_path, {"train": [[1, 2, 3]]})
    break_it, message = BREAKAGES[name]
    break_it(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_tokens(tmp_path, "train")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_headerless_of_odd_size_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="3 bytes are no whole number"):
        open_tokens(tmp_path, "train")
    with pytest.raises(UserError, match=r"lit_gpt prepare"):
        open_tokens(tmp_path / "nowhere", "train")


def test_check_finds_a_damaged_byte_and_foreign_ids(tmp_path: Path) -> None:
    index = folder_of(tmp_path, {"train": [[1, 2, 3]]})
    change_byte(tmp_path / "train_000000.bin", 1026)
    open_tokens(tmp_path, "train")  # opening is quick: it compares sizes, not hashes
    with pytest.raises(UserError, match="sha256"):
        check_folder(tmp_path)
    change_byte(tmp_path / "train_000000.bin", 1026)
    dataclasses.replace(index, vocab_size=3, eot_id=None).save(tmp_path)
    with pytest.raises(UserError, match="token 2 is id 3, but the vocabulary ends at 2"):
        check_folder(tmp_path)
    check_ids(np.array([5], np.uint16), None, "", 0)
