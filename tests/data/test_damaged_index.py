"""An index that is damaged or hostile: one line, in bounded time and memory, whatever is in it."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.data.index import Shard, ShardIndex
from lit_gpt.data.prompts import PromptDataset
from lit_gpt.data.readers import read_texts
from lit_gpt.data.shard_folder import load_index
from lit_gpt.data.shards import parse_shard_header, write_shard
from lit_gpt.data.small_json import MAX_JSON_BYTES
from lit_gpt.data.text_source import TextSource
from lit_gpt.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with write_shard(tmp_path / "train_000000.bin", "uint16") as writer:
        writer.add(np.arange(5), documents=1, text_bytes=5)
    ShardIndex("uint16", (writer.shard,), "byte", "abc", 257, 256, "after").save(tmp_path)
    return tmp_path


def refused(folder: Path, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load_index(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and "index.json" in str(caught.value)


CONTENTS = {
    "not UTF-8": (b'{"dtype": "\xe9"}', "not UTF-8 at byte 11"),
    "empty": (b"", "not JSON"),
    "a list": (b"[1]", "not a JSON object but list"),
    "deep": (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "not an index|nested too deeply"),
    "deeper": (b"[" * 100_000, "far too many lists"),
    "deep with spaces": ((b"[" + b" " * 70) * 100_000, "nested too deeply"),
    "large": (b" " * (MAX_JSON_BYTES + 1), "larger than"),
    "a huge number": (b'{"format_version": ' + b"9" * 5000 + b"}", "not JSON"),
    "NaN": (b'{"format_version": NaN}', "format version NaN"),
    "shards no list": (b'{"format_version": 1, "shards": 5}', "not an index"),
    "shards of text": (b'{"format_version": 1, "shards": ["a"]}', "not an index"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_bytes_that_are_no_index(folder: Path, name: str) -> None:
    content, says = CONTENTS[name]
    (folder / "index.json").write_bytes(content)
    refused(folder, says)


def shard(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["shards"][0].update(changes)


def top(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update(changes)


VALUES = {
    "negative tokens": (shard(tokens=-5, bytes=1014), "tokens -5 is no count"),
    "negative documents": (shard(documents=-1), "documents -1 is no count"),
    "absurd bytes of text": (shard(text_bytes=10**30), "text_bytes 10+ is no count"),
    "absurd size": (shard(tokens=10**15, bytes=1034), "are not 1034 bytes"),
    "fraction": (shard(tokens=5.0), "tokens 5.0 is no count"),
    "truth": (shard(documents=True), "documents true is no count"),
    "text": (shard(bytes="1034"), 'bytes "1034" is no count'),
    "a hash that is none": (shard(sha256="../../x"), "is no hash"),
    "path": (shard(name="../train_000000.bin"), "is not a file name"),
    "line end": (shard(name="train_0.bin\n"), "is not a file name"),
    "number": (shard(name=5), "is not a file name"),
    "other key": (shard(code="x"), "not an index"),
    "twice": (lambda values: values["shards"].append(values["shards"][0]), "listed twice"),
    "vocabulary": (top(vocab_size=-1), "vocab_size -1"),
    "vocabulary of text": (top(vocab_size="257"), 'vocab_size "257"'),
    "end of text": (top(eot_id=257), "eot_id 257 is not in the vocabulary"),
    "position": (top(eot_position="between"), "neither before nor after"),
    "tokenizer": (top(tokenizer=5), "tokenizer 5 is not a line of text"),
    "tokenizer of two lines": (top(tokenizer="a\nb"), r"tokenizer .a\\nb. is not a line of text"),
    "a key of two lines": (
        shard(**{"a\nb\x1b[2J": 1}),
        "an unexpected keyword argument 'a�b�.2J'",
    ),
    "a long key": (shard(**{"a" * 9999: 1}), "an unexpected keyword argument 'aaa"),
    "a name that steers the terminal": (shard(name="train_\x9b2J.bin"), "is not a file name"),
    "half of a pair": (shard(name="train_\ud800.bin"), "is not a file name"),
    "dtype": (top(dtype=["uint16"]), "is not one of uint16"),
    "version": (top(format_version=-1), "format version -1"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_no_index_has(folder: Path, name: str) -> None:
    change, says = VALUES[name]
    values = json.loads((folder / "index.json").read_text())
    change(values)
    (folder / "index.json").write_text(json.dumps(values))
    refused(folder, says)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_an_index_that_cannot_be_read_is_not_taken_for_none(folder: Path, kind: str) -> None:
    """The shards were read as if they had come without hashes and tokenizer."""
    (folder / "index.json").unlink()
    if kind == "link":
        (folder / "index.json").symlink_to(folder / "nowhere")
    elif kind == "pipe":
        os.mkfifo(folder / "index.json")
    else:
        (folder / "index.json").mkdir()
    refused(folder, "cannot be read")


def test_no_index_takes_more_than_bounded_memory() -> None:
    """At most 24 times its size, which is limited: below 200 MB."""
    assert MAX_JSON_BYTES * 24 < 210e6
    for unit in (b"[],", b"{},", b'"ab",', b"1e9,", b'{"a":' + b" " * 60 + b"1},"):
        data = b'{"format_version": 1, "shards": [' + unit * ((1 << 16) // len(unit)) + b"0]}"
        tracemalloc.start()
        with pytest.raises(UserError, match=r"far too many|not an index"):
            ShardIndex.from_json(data, "index.json")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 24 * len(data) + 100_000, unit


def test_a_header_with_a_negative_count_is_refused(tmp_path: Path) -> None:
    """1024 bytes of header and -100 tokens of two are the 824 bytes of a truncated file."""
    head = np.array([20240520, 1, -100], "<i4").tobytes()
    with pytest.raises(UserError, match="truncated or damaged"):
        parse_shard_header("train_0.bin", head.ljust(824, b"\0"), 824, "train_0.bin")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
GOOD = {"name": "train_0.bin", "tokens": 5, "bytes": 1034, "sha256": "", "documents": 1, "text_bytes": 5}
SOME_INDEX = json.loads(ShardIndex("uint16", (Shard(**GOOD),), "byte", "abc", 257, 256, "after").to_json())  # type: ignore[arg-type]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzz_of_values(data: st.DataObject) -> None:
    """Any value anywhere: an index whose counts hold, or one line."""
    values = {**SOME_INDEX, "shards": [dict(GOOD)]}
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from([values, values["shards"][0]]))
        if isinstance(where, dict):
            where[data.draw(st.sampled_from(sorted(where)) | st.text(max_size=5))] = data.draw(JSON)
        if not (isinstance(values["shards"], list) and values["shards"] and isinstance(values["shards"][0], dict)):
            break
    check_index(json.dumps(values).encode("utf-8", "surrogatepass"))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_fuzz_of_bytes(position: int, value: int, cut: bool) -> None:
    good = json.dumps(SOME_INDEX).encode()
    position %= len(good)
    check_index(good[:position] if cut else good[:position] + bytes([value]) + good[position + 1 :])


def check_index(data: bytes) -> None:
    try:
        index = ShardIndex.from_json(data, "index.json")
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return
    assert ShardIndex.from_json(index.to_json().encode(), "") == index
    for shard in index.shards:
        assert (
            0 <= shard.tokens <= shard.bytes and "/" not in shard.name and min(shard.documents, shard.text_bytes) >= 0
        )


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=1030), st.integers(0, 1 << 40), st.sampled_from(["train.bin", "x_train_0.bin"]))
def test_fuzz_of_headers(head: bytes, size: int, name: str) -> None:
    for start in (b"", np.array([20240520, 1], "<i4").tobytes(), np.array([20240801, 7], "<i4").tobytes()):
        try:
            dtype, shard = parse_shard_header(name, (start + head)[:1024], size, name)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert shard.tokens >= 0 and shard.bytes == size
        assert size - shard.tokens * np.dtype(dtype).itemsize in (0, 1024)


def test_a_deep_line_of_json_is_one_line_of_error(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"line 1 is not JSON"):
        list(read_texts(TextSource(tmp_path / "deep.jsonl", "deep.jsonl")))
    with pytest.raises(UserError, match=r"prompt 1 is not JSON"):
        PromptDataset(prompts=str(tmp_path / "deep.jsonl"))
