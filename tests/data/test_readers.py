"""The texts that are read from files of every kind, how they are cut, and how bad content is named."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import joined, write

from lit_gpt.data import readers
from lit_gpt.data.readers import best_cut, pieces, read_texts
from lit_gpt.data.sources import find_sources
from lit_gpt.data.text_source import OnRead, TextSource
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.train import train_tokenizer

POEM = "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n"
TEXTS = [POEM, 'plain\r\nASCII, with "quotes" and, commas\n', "naïve 🙂\u2028one line\x0cstill\n", "no line end"]
zstandard = pytest.importorskip("zstandard")


def read(path: Path, text_field: str = "text") -> list[str]:
    """The documents of a file."""
    return joined(read_texts(TextSource(path, str(path), text_field)))


def table(kind: str, texts: list[str], path: Path) -> Path:
    if kind == "jsonl":
        return write(path, "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)))
    if kind == "parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.table({"text": texts}), path, row_group_size=2)
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
        rows.writerows([["id", "text"], *enumerate(texts)])
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_each_row_of_a_table_is_a_document(kind: str, tmp_path: Path) -> None:
    assert read(table(kind, TEXTS, tmp_path / f"x.{kind}")) == TEXTS


def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    for text in TEXTS:
        assert read(write(tmp_path / "x.txt", text)) == [text]
        assert read(write(tmp_path / "x.txt", b"\xef\xbb\xbf" + text.encode())) == [text]


def test_compressed_files_read_as_what_they_hold(tmp_path: Path) -> None:
    text = POEM * 20_000  # several reads, several pieces
    assert read(write(tmp_path / "x.txt.gz", gzip.compress(text.encode()))) == [text]
    two_members = gzip.compress(text[:1000].encode()) + gzip.compress(text[1000:].encode())
    assert read(write(tmp_path / "y.txt.gz", two_members)) == [text]
    two_frames = zstandard.compress(text[:1000].encode()) + zstandard.compress(text[1000:].encode())
    assert read(write(tmp_path / "x.txt.zst", two_frames)) == [text]
    rows = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    assert read(write(tmp_path / "x.jsonl.zst", zstandard.compress(rows.encode()))) == TEXTS


def test_a_new_format_is_one_entry_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def paragraphs(source: TextSource, on_read: OnRead) -> Iterator[str]:
        on_read(source.size)
        yield from source.path.read_text("utf-8").split("\n\n")

    write(tmp_path / "texts/x.pars", "one\n\ntwo")
    assert read(tmp_path / "texts/x.pars") == ["one\n\ntwo"]  # a file that is named is plain text
    monkeypatch.setitem(readers.READERS, ".pars", paragraphs)
    (found,) = find_sources([str(tmp_path / "texts")], tmp_path / "out" / ".downloads", "body")
    assert found.path.name == "x.pars" and found.text_field == "body"
    assert joined(read_texts(found)) == ["one", "two"]


@given(text=st.text(alphabet="a \n\u3000明", max_size=200), sizes=st.lists(st.integers(1, 30), min_size=1))
def test_cutting_loses_nothing_and_does_not_depend_on_how_text_comes_in(text: str, sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE_CHARACTERS", 16)
        patch.setattr(readers, "DOCUMENT_CHARACTERS", 40)
        whole = list(pieces([text]))
        parts, start = [], 0
        while start < len(text):
            size = sizes[len(parts) % len(sizes)]
            parts.append(text[start : start + size])
            start += size
        assert list(pieces(parts)) == whole
        assert "".join(piece.text for piece in whole) == text
        assert all(0 < len(piece.text) <= 16 for piece in whole)
        assert all(len(document) <= 40 + 16 for document in joined(whole))


def test_a_cut_falls_where_the_tokenizer_cuts_too() -> None:
    text = "def f():\n    return 1\n\n\n　　“床前明月光”\nclass A:\n    x = 2\n" * 40
    tokenizer = train_tokenizer("bpe:600", [text])
    whole = tokenizer.encode(text)
    for limit in range(60, 400, 7):
        cut = best_cut(text, limit)
        assert 0 < cut <= limit and text[cut - 1] == "\n"
        assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == whole
    assert best_cut("a b" * 10, 8) == 7 and best_cut("明" * 20, 8) == 8
    assert best_cut("\n" * 5000, 4000) == 4000


# ---------------------------------------------------------------- bad content

FAR = 400_000  # bytes, so that the fault is in the second read


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("x.txt", b"a\0b", "binary, not text: byte 1 is zero"),
        ("x.txt", b"x" * FAR + b"\0", f"byte {FAR} is zero"),
        ("x.txt", b"caf\xe9 noir", "not UTF-8 at byte 3 (0xe9)"),
        ("x.txt", "明".encode() * FAR + b"\xff", f"not UTF-8 at byte {3 * FAR} (0xff)"),
        ("x.txt", "明".encode() * FAR + b"\xe6\x98", f"not UTF-8 at byte {3 * FAR} (0xe6)"),
        ("x.txt", "明月".encode("gb18030"), "not UTF-8 at byte 0"),
        ("x.txt", "hello".encode("utf-16"), "not UTF-8 at byte 0"),
        ("x.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:-9], "truncated gzip"),
        ("x.txt.gz", b"no gzip at all", "damaged or truncated gzip"),
        ("x.txt.gz", gzip.compress(b"a\xff", mtime=0), "not UTF-8 at byte 1"),
        ("x.txt.zst", zstandard.compress(bytes(range(1, 128)) * 99)[:-9], "truncated zstd"),
        ("x.txt.zst", b"no zstd at all", "damaged zstd"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("x.jsonl", b'\n["a"]\n', "line 2 is not an object"),
        ("x.jsonl", b'{"content": "a"}', 'no field "text", name it with --text_field: did you mean "content"'),
        ("x.jsonl", b'{"text": 5}', 'field "text" is not a string but int'),
        ("x.jsonl", b'{"text": "a\\ud800"}', "a lone surrogate at character 1"),
        ("x.csv", b"id,body\n1,a\n", 'the header has no field "text"'),
        ("x.csv", b'text\n"open\n', "is not CSV"),
        ("x.csv", b"id,text\n1\n", 'line 2 has no field "text"'),
        ("x.parquet", b"no parquet", "not a parquet file"),
    ],
)
def test_bad_content_is_named_with_its_position(name: str, data: bytes, says: str, tmp_path: Path) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = write(tmp_path / name, data)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_parquet_without_the_field_names_those_it_has(tmp_path: Path) -> None:
    path = table("parquet", TEXTS, tmp_path / "x.parquet")
    with pytest.raises(UserError, match='no field "texts", name it with --text_field: did you mean "text"'):
        read(path, "texts")


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_CHARACTERS", 1000)
    path = write(tmp_path / "x.jsonl", json.dumps({"text": "x" * 500_000}))
    with pytest.raises(UserError, match="a line is longer than 1000"):
        read(path)
