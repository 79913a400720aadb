"""The rules by which text is held out: the tail to the character, documents whole, and what auto resolves to."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import joined

from lit_gpt.data.readers import Text
from lit_gpt.data.splits import SplitRule, SplitText
from lit_gpt.errors import UserError


def assign(spec: str, documents: list[str], size: int = 7) -> list[SplitText]:
    texts = [Text(d[i : i + size], i + size >= len(d)) for d in documents for i in range(0, len(d), size)]
    return list(SplitRule.parse(spec).assign(texts, sum(len(d.encode()) for d in documents)))


documents_of = st.lists(st.text(alphabet="ab明🙂", min_size=1, max_size=30), min_size=1, max_size=20)


@pytest.mark.slow
@given(documents=documents_of, fraction=st.floats(0, 0.99))
def test_the_tail_is_that_share_of_the_bytes_to_the_character(documents: list[str], fraction: float) -> None:
    pieces = assign(f"tail:{fraction}", documents)
    train = "".join(piece.text for piece in pieces if piece.split == "train")
    val = "".join(piece.text for piece in pieces if piece.split == "val")
    assert train + val == "".join(documents)
    border = int(len((train + val).encode()) * (1 - fraction)) if fraction else len(train.encode())
    assert border <= len(train.encode()) < border + 4
    if train:
        assert [piece for piece in pieces if piece.split == "train"][-1].ends
    assert joined((piece.text, piece.ends) for piece in pieces if piece.split == "val") or not val


@given(documents=documents_of)
def test_by_hash_documents_go_whole_and_duplicates_together(documents: list[str]) -> None:
    pieces = assign("hash:0.5", documents + documents[:3])
    side: dict[str, set[str]] = {}
    text, splits = "", set()
    for piece in pieces:
        text, splits = text + piece.text, splits | {piece.split}
        if piece.ends:
            assert len(splits) == 1
            side.setdefault(text, set()).update(splits)
            text, splits = "", set()
    assert all(len(splits) == 1 for splits in side.values())


def test_by_hash_the_share_is_that_of_the_documents() -> None:
    pieces = assign("hash:0.2", [f"document {i}" for i in range(5000)], size=99)
    share = sum(piece.split == "val" for piece in pieces) / 5000
    assert abs(share - 0.2) < 0.03  # five standard deviations
    assert all(piece.split == "train" for piece in assign("hash:0", ["a", "b"]))
    assert all(piece.split == "train" for piece in assign("tail:0", ["a", "b"]))


def test_auto_takes_documents_where_there_are_many_and_the_tail_where_there_are_few() -> None:
    auto = SplitRule.parse("auto")
    assert str(auto.resolve(1, 10**6)) == "tail:0.1" and str(auto.resolve(99, 10**6)) == "tail:0.1"
    assert str(auto.resolve(100, 10**6)) == "hash:0.1" and str(auto.resolve(1000, 10**6)) == "hash:0.02"
    assert str(auto.resolve(2000, 10**8)) == "hash:0.01"
    assert auto.resolve(2000, 10**12).fraction * 10**12 == pytest.approx(1 << 25, rel=0.01)
    assert str(SplitRule.parse("tail:0.3").resolve(10**6, 10)) == "tail:0.3"


@pytest.mark.parametrize(
    "spec", ["", "tail", "hash", "auto:0.1", "tail:1", "tail:-0.1", "hash:x", "head:0.1", "tail:nan"]
)
def test_a_wrong_split_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match=re.escape(f'val_split "{spec}": write auto, hash:0.01 or tail:0.1')):
        SplitRule.parse(spec)
