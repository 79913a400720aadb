"""Text as it is handed out: whole characters, stop strings matched on bytes, nothing lost and nothing too early."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.outputs import Token
from lit_gpt.generation.stopping import Continuation, Ending, scan
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer

BYTE = get_tokenizer("byte")
ALPHABET = "ab你\U0001f600é"
TEXTS = st.text(ALPHABET, max_size=30)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3)


def pieces_tokenizer() -> Tokenizer:
    """Tokens of one to three bytes that cut characters in two."""
    data = "ab你\U0001f600é".encode()
    pairs = {data[i : i + n] for n in (2, 3) for i in range(len(data) - n + 1)}
    ranks = {bytes([i]): i for i in range(256)} | {piece: 257 + i for i, piece in enumerate(sorted(pairs))}
    return Tokenizer.build("pieces", r"(?s:.)", ranks, {"<|endoftext|>": 256})


PIECES = pieces_tokenizer()


@st.composite
def cut(draw: st.DrawFn) -> tuple[list[int], bytes]:
    """Ids of a text in a random tokenization, and the bytes."""
    data = draw(TEXTS).encode()
    ids, start = [], 0
    while start < len(data):
        fitting = [n for n in (1, 2, 3) if data[start : start + n] in PIECES.ranks and start + n <= len(data)]
        n = draw(st.sampled_from(fitting))
        ids.append(PIECES.ranks[data[start : start + n]])
        start += n
    return ids, data


def first_stop(data: bytes, stops: list[bytes], ends: list[int]) -> tuple[int, int] | None:
    """(byte at which the text is cut, number of tokens) as found by looking at every prefix of whole tokens."""
    for count, end in enumerate(ends, 1):
        starts = [start for stop in stops if (start := data[:end].find(stop)) >= 0]
        if starts:
            return min(starts), count
    return None


@pytest.mark.slow
@given(cut(), STOPS)
@settings(deadline=None, max_examples=150)
def test_text_ends_before_the_first_stop_string(made: tuple[list[int], bytes], stops: list[str]) -> None:
    ids, data = made
    ending = Ending(GenerationConfig(stop=stops), len(ids) + 1, frozenset([256]))
    continuation, shown, count = Continuation(ending, PIECES), "", 0
    for token in [*ids, 256]:
        count += 1
        over = continuation.push(Token(token))
        shown += continuation.drain()[1]
        assert "\ufffd" not in shown
        assert over or not any(stop in shown for stop in stops)
        if over:
            break
    ends = [sum(len(PIECES.token_bytes(token)) for token in ids[: i + 1]) for i in range(len(ids))]
    found = first_stop(data, [stop.encode() for stop in stops], ends)
    assert continuation.finish_reason == "stop"
    assert (shown.encode(), count) == ((data[: found[0]], found[1]) if found else (data, len(ids) + 1))


@pytest.mark.slow
@given(cut(), STOPS)
@settings(deadline=None, max_examples=100)
def test_looking_ahead_is_pushing(made: tuple[list[int], bytes], stops: list[str]) -> None:
    ids, _ = made
    ending = Ending(GenerationConfig(stop=stops), 6, frozenset([256]))
    continuation = Continuation(ending, PIECES)
    expected = continuation.would_end(ids)
    assert any([continuation.push(Token(token)) for token in ids[: max(1, len(ids))]]) is expected


def test_scan_holds_back_what_may_become_a_stop_string() -> None:
    assert scan(b"", b"to be EN", [b"END"]) == (b"to be ", b"EN", False)
    assert scan(b"EN", b"D. Or not", [b"END"]) == (b"", b"", True)
    assert scan(b"EN", b"EN", [b"END"]) == (b"EN", b"EN", False)
    assert scan(b"aa", b"b", [b"aac", b"ab"]) == (b"a", b"", True)
    assert scan(b"", b"xy", []) == (b"xy", b"", False)


def test_held_back_text_is_flushed_at_the_end() -> None:
    continuation = Continuation(Ending(GenerationConfig(stop="abc"), 2, frozenset()), BYTE)
    assert [continuation.push(Token(token)) for token in b"ab"] == [False, True]
    assert continuation.drain()[1] == "ab"
    assert continuation.finish_reason == "length"


@pytest.mark.parametrize("data", ["你".encode()[:2], b"a\xff"])
def test_bytes_that_never_become_a_character_are_marked_at_the_end(data: bytes) -> None:
    continuation = Continuation(Ending(GenerationConfig(), len(data), frozenset()), BYTE)
    for token in data:
        continuation.push(Token(token))
    assert continuation.drain()[1] == data.decode("utf-8", "replace")
