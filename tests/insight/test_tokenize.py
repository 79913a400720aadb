"""`lit_gpt tokenize` and how it shows tokens, against tiktoken and UTF-8 itself."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from environment import RunProgram
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.__main__ import main
from lit_gpt.checkpoint.format import save_model
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.printable import show_bytes, show_token
from lit_gpt.tokenizer.tokenizer import get_tokenizer
from lit_gpt.tokenizer.train import train_tokenizer

TEXT = "农夫山泉 500ml\n天然水, natural water"


@pytest.mark.slow
@given(st.binary(max_size=12))
def test_no_bytes_are_ever_shown_as_a_replacement_character(data: bytes) -> None:
    shown = show_bytes(data)
    assert ("\ufffd" in shown) == (b"\xef\xbf\xbd" in data)
    assert "\n" not in shown and "\x1b" not in shown
    assert bool(shown) == bool(data)


@given(st.text(max_size=12).filter(lambda text: text.isprintable() and "\\" not in text))
def test_printable_text_is_shown_as_itself(text: str) -> None:
    shown = show_bytes(text.encode())
    assert shown.replace("␣", " ") == text.replace("␣", " ")


def test_half_a_character_a_special_token_and_an_unknown_id() -> None:
    tokenizer = get_tokenizer("byte")
    assert show_token(tokenizer, 0xE5) == r"\xe5"
    assert show_token(tokenizer, 256) == "<|endoftext|>"
    assert show_token(tokenizer, 999) == "#999"
    assert show_bytes(" 农".encode()[:3]) == r"␣\xe5\x86"


def test_pieces_and_ids_side_by_side_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", TEXT, "--tokenizer", "byte", "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    ids = [row["id"] for row in shown["rows"]]
    assert ids == list(TEXT.encode()) and shown["tokens"] == len(ids)
    assert bytes.fromhex(" ".join(row["bytes"] for row in shown["rows"])).decode() == TEXT
    assert main(["tokenize", "--decode", *map(str, ids), "--tokenizer", "byte"]) == 0
    assert capsys.readouterr().out == TEXT + "\n"
    assert main(["tokenize", "--decode", "[228, 189]", "--tokenizer", "byte"]) == 0
    assert capsys.readouterr().out == "\\xe4\\xbd\n"


def test_several_tokenizers_in_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.txt").write_text(TEXT)
    names = ["byte", "char", "bpe:300"]
    assert main(["tokenize", f"FILE:{tmp_path}/x.txt", "--format", "json", "--tokenizer", *names]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [row["tokenizer"] for row in rows] == names
    assert rows[0]["tokens"] == len(TEXT.encode()) and rows[1]["tokens"] == len(TEXT)
    for row in rows:
        assert row["bytes_per_token"] * row["tokens"] == pytest.approx(len(TEXT.encode()))
    assert "char is trained on this very text" in err
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    assert main(["tokenize", "--tokenizer", *names]) == 0
    cells = [line.split("│")[-2].strip() for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert "农|夫|山|泉" in "".join(cells)


@pytest.mark.slow
def test_a_checkpoints_own_tokenizer(tmp_path: Path, tiny_model: GPT, program: RunProgram) -> None:
    tokenizer = train_tokenizer("char", [TEXT])
    save_model(tmp_path / "x.ckpt", tiny_model, tokenizer)
    run = program("tokenize", TEXT, "--ckpt_path", "x.ckpt", "--format", "json")
    assert [row["id"] for row in json.loads(run.stdout)["rows"]] == tokenizer.encode(TEXT)
    save_model(tmp_path / "bare.ckpt", tiny_model, None)
    run = program("tokenize", TEXT, "--ckpt_path", "bare.ckpt")
    assert run.returncode == 2 and "has no tokenizer" in run.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["", "--tokenizer", "byte"], "the text is empty"),
        (["x", "--tokenizer", "bite"], 'did you mean "byte"?'),
        (["x", "--decode", "3"], "not both"),
        (["--decode", "x", "--tokenizer", "byte"], "'x' is no whole number"),
        (["--decode", "257", "--tokenizer", "byte"], "ids are below 257"),
        (["--decode", "3", "--tokenizer", "byte", "byte"], "one tokenizer only"),
        (["--decode", "3", "--tokenizer", "char"], "made from text"),
        (["FILE:none.txt", "--tokenizer", "byte"], "No such file"),
        (["FILE:latin1.txt", "--tokenizer", "byte"], "is not UTF-8 (byte 1)"),
        (["x", "--tokenizer", "byte", "--format", "xml"], "format 'xml' is unknown"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes(b"a\xe9b")
    assert main(["tokenize", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
