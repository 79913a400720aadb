"""What followed in the training tokens: against a search by hand, whatever the pieces."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.data.continuations import KEPT_POSITIONS, Continuations, find_continuations


class Array:
    def __init__(self, ids: list[int], dtype: str = "uint16") -> None:
        self.ids = np.array(ids, dtype)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, count: int) -> np.ndarray:
        assert start >= 0 and start + count <= len(self.ids)
        return self.ids[start : start + count]


def by_hand(text: list[int], stream: list[int]) -> tuple[int, Counter[int], list[int]]:
    for length in range(len(text), 0, -1):
        suffix = text[len(text) - length :]
        ends = [end for end in range(length, len(stream)) if stream[end - length : end] == suffix]
        if ends:
            return length, Counter(stream[end] for end in ends), ends
    return 0, Counter(), []


@given(
    text=st.lists(st.integers(0, 3), max_size=9),
    stream=st.lists(st.integers(0, 3), max_size=60),
    piece=st.integers(1, 70),
)
def test_it_is_what_a_search_by_hand_finds(text: list[int], stream: list[int], piece: int) -> None:
    found = find_continuations(text, Array(stream), piece)
    length, counts, ends = by_hand(text, stream)
    assert (found.length, found.counts, found.positions.tolist()) == (length, counts, ends)
    assert found.occurrences == len(ends)
    assert list(found.counts.values()) == sorted(found.counts.values(), reverse=True)


def test_a_token_beyond_the_stream_s_dtype_occurs_nowhere() -> None:
    found = find_continuations([1, 70_000], Array([1, 2, 3, 4464]))
    assert (found.length, found.counts, found.occurrences) == (0, {}, 0)


def test_the_last_token_of_the_stream_was_followed_by_nothing() -> None:
    assert find_continuations([5], Array([1, 2, 5])).length == 0
    assert find_continuations([], Array([1, 2])).length == 0
    found = find_continuations([2], Array([2, 7, 2, 9, 2, 7]))
    assert isinstance(found, Continuations) and found.counts == {7: 2, 9: 1} and found.positions.tolist() == [1, 3, 5]


def test_the_first_positions_are_kept() -> None:
    found = find_continuations([1], Array([1] * 3000), piece=700)
    assert found.counts == {1: 2999} and found.positions.tolist() == list(range(1, KEPT_POSITIONS + 1))
