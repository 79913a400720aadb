"""Tokenizers with byte fallback against the `tokenizers` library, from which their ids come."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_fallback_files import SHAPES, byte_fallback_file
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HubTokenizer

from lit_gpt.errors import UserError
from lit_gpt.tokenizer.byte_fallback import ByteFallbackTokenizer
from lit_gpt.tokenizer.printable import show_token
from lit_gpt.tokenizer.tokenizer import TextStream, Tokenizer, get_tokenizer

NAMES = ["<s>", "</s>", "<unk>", "<|user|>", "<|end|>"]
PIECES = [
    *NAMES,
    "<|",
    "<0x41>",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t",
    "the",
    "fox",
    "é",
    "e\u0301",
    "你",
    "👍🏽",
    "\u2581",
    "1",
]
TEXTS = st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=20).map("".join)


def made(shape: str, **details: Any) -> ByteFallbackTokenizer:
    return ByteFallbackTokenizer.of_content(shape, byte_fallback_file(shape), end_of_text="</s>", **details)


TOKENIZERS = {shape: made(shape, bos_id=1, chat_template="{{ x }}") for shape in SHAPES}
HUBS = {shape: HubTokenizer.from_str(json.dumps(byte_fallback_file(shape))) for shape in SHAPES}
EACH = pytest.mark.parametrize("shape", SHAPES)


@pytest.mark.slow
@EACH
@settings(max_examples=120)
@given(text=TEXTS)
def test_ids_and_text_are_the_librarys(shape: str, text: str) -> None:
    ours, theirs = TOKENIZERS[shape], HUBS[shape]
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode_with_specials(text) == ids
    if not any(name in text for name in NAMES):
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.encode_to_numpy(text).tolist() == ids


@pytest.mark.slow
@EACH
@settings(max_examples=80)
@given(text=TEXTS)
def test_no_text_becomes_a_special_token(shape: str, text: str) -> None:
    tokenizer = TOKENIZERS[shape]
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.specials.values())
    assert all(0 <= token < tokenizer.n_vocab for token in ids)
    if "\u2581" not in text and not (shape == "metaspace" and text.startswith(" ")):
        assert tokenizer.decode(ids) == text  # their own files lose that space


@pytest.mark.slow
@EACH
@settings(max_examples=50)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 200)))
def test_a_stream_gives_whole_characters_and_in_the_end_all(shape: str, text: str, cuts: list[int]) -> None:
    tokenizer = TOKENIZERS[shape]
    ids = tokenizer.encode(text)
    whole = b"".join(tokenizer.token_bytes(token) for token in ids).decode()
    stream, got = TextStream(tokenizer), ""
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    for start, end in itertools.pairwise(edges):
        got += stream.feed(ids[start:end])
        assert whole.startswith(got)
    assert got + stream.flush() == whole
    assert tokenizer.decode(ids) in (whole, whole.removeprefix(" "))


def test_a_text_that_goes_on_keeps_the_space_between_words() -> None:
    tokenizer = TOKENIZERS["llama"]
    ids = [*tokenizer.encode("The quick"), *tokenizer.encode("brown")]
    assert tokenizer.decode(ids) == "The quick brown"
    stream = TextStream(tokenizer)
    assert stream.feed(tokenizer.encode("brown")) + stream.flush() == " brown"


def test_what_others_read_of_a_tokenizer() -> None:
    tokenizer = TOKENIZERS["llama"]
    assert (tokenizer.eot_id, tokenizer.bos_id, tokenizer.n_vocab) == (2, 1, 482)
    assert tokenizer.specials == {"<unk>": 0, "<s>": 1, "</s>": 2, "<|user|>": 480, "<|end|>": 481}
    assert tokenizer.token_bytes(3 + 0x41) == b"A" and tokenizer.token_bytes(1) == tokenizer.token_bytes(9999) == b""
    assert tokenizer.decode(np.array([1, *tokenizer.encode("fox"), 2, 9999])) == "fox"
    assert show_token(tokenizer, tokenizer.encode("the")[0]).startswith("␣") and show_token(tokenizer, 2) == "</s>"
    assert tokenizer.longest_token == max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.n_vocab))
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    for name in ("ranks", "pattern"):
        with pytest.raises(UserError, match='tokenizer "llama"'):
            getattr(tokenizer, name)


@EACH
def test_it_is_stored_as_plain_json_and_comes_back(shape: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[shape]
    tokenizer.save(tmp_path / "tokenizer.json")
    for back in (get_tokenizer(str(tmp_path)), pickle.loads(pickle.dumps(tokenizer))):
        assert isinstance(back, ByteFallbackTokenizer)
        assert back.to_dict() == tokenizer.to_dict()
        assert back.encode("The fox, 你好") == tokenizer.encode("The fox, 你好")
    assert all(isinstance(value, (str, int, dict, type(None))) for value in tokenizer.to_dict().values())
    assert len({other.hash for other in TOKENIZERS.values()}) == len(SHAPES)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 3}, "this lit_gpt reads 1 and 2"),
        ({"content": "{"}, "damaged"),
        ({"content": "[]"}, "its content is no object"),
        ({"content": "{}"}, "no BPE with byte fallback"),
        ({"content": 3}, "its content is 3"),
        ({"hash": "0"}, "does not have the hash it names"),
        ({"bos_id": 300}, "bos_id 300 is none of its special tokens"),
        ({"normalization": None}, 'its normalization must be "spaces"'),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(change: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        Tokenizer.from_dict({**TOKENIZERS["llama"].to_dict(), **change}, "x.ckpt")
    assert str(error.value).startswith("x.ckpt") and "\n" not in str(error.value)


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("unit", [" ", "好", "ab"])
def test_very_long_runs_do_not_break_it(shape: str, unit: str) -> None:
    text = "x" + unit * 100_000
    tokenizer = TOKENIZERS[shape]
    assert tokenizer.decode_bytes(tokenizer.encode_to_numpy(text)) == text.encode()
