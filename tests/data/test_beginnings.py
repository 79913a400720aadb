"""Beginnings of documents: the first words of some, from the training tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_gpt.data.beginnings import document_beginnings
from lit_gpt.data.prepare import prepare
from lit_gpt.data.shard_folder import open_tokens
from lit_gpt.tokenizer.tokenizer import get_tokenizer


def beginnings(folder: Path, texts: list[str], count: int, tokenizer: str = "byte") -> list[str]:
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, "utf-8")
    prepare([str(folder / f"{i}.txt") for i in range(len(texts))], folder / "shards", tokenizer, val_split="hash:0")
    return document_beginnings(open_tokens(folder / "shards", "train"), get_tokenizer(tokenizer), count)


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("First Citizen:\nBefore we proceed any further, hear me speak.", "First Citizen:"),
        ("\n\nThe first words of a long line that goes on and on.", "The first words"),
        ("incomprehensibilities_of_one_word_that_does_not_end", "incomprehensibilities_of"),
        ("some extraordinarily_long_second_word follows", "some"),
        ("床前明月光，疑是地上霜。", "床前明月光，疑是地上霜。"),
        ("🙂" * 40, None),
        ("汉🙂" * 20, "汉🙂" * 12),
        ('"""\n\nA module of many useful things."""\nimport os', '"""\n\nA module of'),
        ("    \n\t\n", None),
    ],
)
def test_the_first_words_of_the_first_line(text: str, beginning: str | None, tmp_path: Path) -> None:
    found = beginnings(tmp_path, [text, "end"], 4)
    assert found == ([] if beginning is None else [beginning]) + ["end"]


def test_documents_from_all_over_the_text_each_once(tmp_path: Path) -> None:
    texts = [f"document {number // 2}" for number in range(60)]
    found = beginnings(tmp_path, texts, 4)
    assert len(found) == len(set(found)) == 4 and set(found) <= set(texts)
    numbers = [int(text.split()[1]) for text in found]
    assert numbers == sorted(numbers)


def test_fewer_documents_than_asked_for(tmp_path: Path) -> None:
    assert beginnings(tmp_path, ["alone here"], 4) == ["alone here"]
