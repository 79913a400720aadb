"""The input of prepare: fetched over the network, and refused in one line where it is bad."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from preparing import CHINESE, CODE, write

from lit_gpt.__main__ import main
from lit_gpt.data.prepare import prepare
from lit_gpt.errors import UserError


@pytest.mark.slow
def test_an_address_is_fetched_and_prepared(server: Callable[[str, bytes], str], tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"{i} {CHINESE}"}) + "\n" for i in range(300)).encode()
    local = prepare(str(write(tmp_path / "rows.jsonl", rows)), tmp_path / "local", tokenizer="char")
    fetched = prepare(server("rows.jsonl", rows), tmp_path / "fetched", tokenizer="char")
    assert fetched == local
    assert not (tmp_path / "fetched" / ".downloads").exists()


@pytest.mark.parametrize("name", ["missing.txt", "short/x.txt", "empty.txt"])
def test_an_address_that_fails_is_named_and_leaves_nothing(
    server: Callable[[str, bytes], str], name: str, tmp_path: Path
) -> None:
    url = server("other" if name == "missing.txt" else name, b"" if name == "empty.txt" else CODE.encode() * 9999)
    url = url.replace("other", name)
    with pytest.raises(UserError, match=re.escape(url)) as error:
        prepare(url, tmp_path / "out", tokenizer="byte")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- bad input


def refused(tmp_path: Path, says: str, *inputs: str, **options: object) -> None:
    """`prepare` raises one line that says so, and leaves nothing."""
    with pytest.raises(UserError, match=says) as error:
        prepare(inputs, tmp_path / "out", **{"tokenizer": "byte", **options})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    good = str(write(tmp_path / "good.txt", CODE * 99))
    refused(tmp_path, "no file or folder", str(tmp_path / "goood.txt"))
    refused(tmp_path, "is empty", good, str(write(tmp_path / "empty.txt", "")))
    refused(tmp_path, "byte 5 is zero", good, str(write(tmp_path / "binary.dat", b"hello\0\1")))
    refused(tmp_path, "not UTF-8 at byte 2", good, str(write(tmp_path / "latin.txt", b"ol\xe9")), shard_tokens=100)
    refused(tmp_path, "the input holds no text", str(write(tmp_path / "none.jsonl", '{"text": ""}\n')))
    refused(tmp_path, "the input holds no text", str(write(tmp_path / "none.csv", "text\n")), val_split="hash:0.1")
    refused(tmp_path, 'did you mean "gpt2"', good, tokenizer="gpt-2")
    refused(tmp_path, "bpe:N", good, tokenizer="bpe:lots")
    refused(tmp_path, "write auto, hash:0.01 or tail:0.1", good, val_split="tail:2")
    refused(tmp_path, "at least 1", good, workers=0)
    refused(tmp_path, "no input", *[])
    with pytest.raises(UserError, match="cannot be the output folder"):
        prepare(good, tmp_path / "good.txt" / "out", tokenizer="byte")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x.txt"], "name what to prepare and where to"),
        (["x.txt", "--output", "out", "--tokenzer", "byte"], "tokenzer"),
        (["x.txt", "--output", "out", "--workers", "many"], "workers"),
        (["y.txt", "--output", "out"], 'did you mean "x.txt"'),
        (["--check", "nowhere"], "no such folder"),
    ],
)
def test_the_program_says_it_in_one_line_with_status_2(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.txt", CODE)
    assert main(["prepare", *arguments]) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.out == "" and len(printed.err.splitlines()) == 1
