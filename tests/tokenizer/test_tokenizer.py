"""Tokenizers against the `tokenizers` library, tiktoken itself, Python's own UTF-8, and a server that never answers."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken.load
import tiktoken.registry
from environment import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

import lit_gpt.tokenizer.tiktoken_files
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import TextStream, Tokenizer, byte_alphabet, get_tokenizer, is_trained
from lit_gpt.tokenizer.train import train_tokenizer

POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。\n"
PROSE = "def f(x):\n    return x + 1  # it's what we'd do: 12345\n\n\nclass A:\n\tpass\r\n"
CORPUS = [POEM * 3, PROSE * 5, "naïve café 🙂🙂 Ωμέγα\n" * 2]
CACHE = SHARED / "tiktoken_cache"
needs_cache = pytest.mark.skipif(not CACHE.exists(), reason="../shared/tiktoken_cache is not here")

BYTE = get_tokenizer("byte")
CHAR = train_tokenizer("char", CORPUS)
BPE = train_tokenizer("bpe:400", CORPUS)
LOCAL = pytest.mark.parametrize("tokenizer", [BYTE, CHAR, BPE], ids=["byte", "char", "bpe"])
texts = st.text() | st.text(alphabet="ab \n明月好é🙂1'.", max_size=60)


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Downloads fail at once; the list fills with what was asked for."""
    asked: list[str] = []

    def refuse(url: str, **_: object) -> None:
        asked.append(url)
        raise ConnectionError("no network here")

    monkeypatch.setattr("requests.get", refuse)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    return asked


@LOCAL
@given(text=texts)
def test_round_trip_is_exact_for_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_to_numpy(text).tolist() == ids
    assert all(0 <= token < tokenizer.n_vocab and token != tokenizer.eot_id for token in ids)


@LOCAL
@given(text=texts, cuts=st.lists(st.integers(0, 200)))
def test_a_stream_gives_whole_characters_and_in_the_end_all(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = tokenizer.encode(text)
    stream, got = TextStream(tokenizer), ""
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    for start, end in itertools.pairwise(edges):
        got += stream.feed(ids[start:end])
        assert text.startswith(got)
    assert got + stream.flush() == text


@given(data=st.binary(max_size=40), cut=st.integers(0, 40))
def test_a_stream_of_damaged_bytes_reads_as_the_whole_does(data: bytes, cut: int) -> None:
    stream = TextStream(BYTE)
    assert stream.feed(data[:cut]) + stream.feed(list(data[cut:])) + stream.flush() == data.decode("utf-8", "replace")


def test_bytes_and_characters_have_the_ids_one_expects() -> None:
    assert BYTE.encode("é") == [0xC3, 0xA9] and (BYTE.n_vocab, BYTE.eot_id) == (257, 256)
    wide = sorted(c for c in set("".join(CORPUS)) if ord(c) > 127)
    assert CHAR.encode(POEM) == [256 + wide.index(c) if ord(c) > 127 else ord(c) for c in POEM]
    assert CHAR.encode("錦") == list("錦".encode())  # not in the corpus
    assert CHAR.n_vocab == 256 + len(wide) + 1 and CHAR.eot_id == CHAR.n_vocab - 1


def library_peer(tokenizer: Tokenizer, corpus: list[str], size: int) -> object:
    """A tokenizer of the `tokenizers` library, set up here by its own documentation."""
    from tokenizers import ByteLevelBPETokenizer

    peer = ByteLevelBPETokenizer()
    peer.train_from_iterator(corpus, vocab_size=size - 1, min_frequency=2, show_progress=False)
    return peer


BPE_TWIN = library_peer(BPE, CORPUS, 400)
# Letters that newer Unicode tables know and older do not are cut differently by the two regular-expression engines.
long_assigned = st.characters(codec="utf-8", exclude_categories=["Cn", "Co", "Cs"])


@pytest.mark.slow
@settings(max_examples=120)
@given(
    text=st.text(long_assigned)
    | st.text(alphabet="aab \n明月好é🙂1'", max_size=60)
    | st.sampled_from([*CORPUS, POEM[5:]])
)
def test_trained_merges_give_the_ids_of_the_tokenizers_library(text: str) -> None:
    assert BPE.encode(text) == BPE_TWIN.encode(text).ids  # type: ignore[attr-defined]


@settings(max_examples=25)
@given(
    words=st.lists(st.text("ab", min_size=1, max_size=12), min_size=5, max_size=40), text=st.text("ab ", max_size=40)
)
def test_runs_that_overlap_themselves_merge_as_in_the_library(words: list[str], text: str) -> None:
    corpus = [" ".join(words)]
    peer = library_peer(BPE, corpus, 300)
    assert train_tokenizer("bpe:300", corpus).encode(text) == peer.encode(text).ids  # type: ignore[attr-defined]


def test_training_on_chinese_learns_words_and_stops_where_pairs_run_out() -> None:
    tokenizer = train_tokenizer("bpe:5000", [POEM * 2])
    assert 257 < tokenizer.n_vocab < 5000 and tokenizer.eot_id == tokenizer.n_vocab - 1
    assert len(tokenizer.encode("床前明月光")) == 1
    assert tokenizer.decode(tokenizer.encode(POEM)) == POEM


@LOCAL
def test_saved_and_read_back_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = get_tokenizer(str(path))
        assert again.to_dict() == tokenizer.to_dict() == json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
        assert again.encode("".join(CORPUS)) == tokenizer.encode("".join(CORPUS))


def test_retraining_in_place_is_read_back_new(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path).hash == BPE.hash
    CHAR.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path).hash == CHAR.hash != BPE.hash


def test_the_hash_is_stable_and_covers_what_decides_ids() -> None:
    ranks = {bytes([value]): value for value in range(256)}
    base = Tokenizer.build("x", "(?s:.)", ranks, {"<|endoftext|>": 256})
    lines = "\n".join(f"{__import__('base64').b64encode(token).decode()} {rank}" for token, rank in ranks.items())
    canonical = json.dumps(["(?s:.)", lines, [["<|endoftext|>", 256]], None], separators=(",", ":"))
    assert base.hash == hashlib.sha256(canonical.encode()).hexdigest()
    assert base.hash == Tokenizer.build("other name", "(?s:.)", dict(reversed(ranks.items())), base.specials).hash
    others = [
        Tokenizer.build("x", "(?s:..)", ranks, base.specials),
        Tokenizer.build("x", "(?s:.)", {**ranks, b"ab": 300}, base.specials),
        Tokenizer.build("x", "(?s:.)", ranks, {"<|end|>": 256}),
        Tokenizer.build("x", "(?s:.)", ranks, base.specials, normalization="NFC"),
    ]
    assert len({base.hash, *(other.hash for other in others)}) == 5


def test_ids_may_have_gaps_and_none_of_them_breaks_decoding() -> None:
    ranks = {bytes([value]): value + 10 for value in range(256)} | {b"ab": 1000}
    tokenizer = Tokenizer.build("gaps", "(?s:.+)", ranks, {"<|endoftext|>": 2000, "<s>": 2001}, bos_id=2001)
    assert (tokenizer.n_vocab, tokenizer.eot_id, tokenizer.bos_id) == (2002, 2000, 2001)
    assert tokenizer.encode("abc") == [1000, ord("c") + 10]
    assert tokenizer.decode(np.array([1000, 2000, 5, 99999])) == "ab"
    assert tokenizer.token_bytes(2000) == tokenizer.token_bytes(5) == tokenizer.token_bytes(-1) == b""
    assert Tokenizer.from_dict(tokenizer.to_dict()).to_dict() == tokenizer.to_dict()


def test_normalization_is_applied_and_kept() -> None:
    tokenizer = Tokenizer.build("qwen-like", BYTE.pattern, BYTE.ranks, BYTE.specials, normalization="NFC")
    text = "e\u0301 Å 한"
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text) != text
    assert Tokenizer.from_dict(tokenizer.to_dict()).normalization == "NFC"


@LOCAL
def test_text_that_looks_like_a_special_token_is_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.eot_id not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eot_id or 0]) == "a"


@pytest.mark.slow
@LOCAL
@pytest.mark.parametrize("unit", [" ", "好"])
def test_very_long_runs_do_not_break_it(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * 1_100_000 + "x"  # a million is where the regular expression's stack ends
    assert tokenizer.decode_bytes(tokenizer.encode_to_numpy(text)) == text.encode()


SPECIALS = {"<|a|>": 300, "<|a|><|b|>": 301, "<|im_end|>": 302, "<|endoftext|>": 256}
WITH_SPECIALS = Tokenizer.build("specials", BYTE.pattern, BYTE.ranks, SPECIALS)
NAMES = st.sampled_from([*SPECIALS, "<|", "|>", "a", " "])


@pytest.mark.slow
@given(text=st.lists(NAMES | st.text(max_size=3), max_size=12).map("".join))
def test_names_of_special_tokens_are_those_tokens_only_if_asked_for(text: str) -> None:
    tokenizer = WITH_SPECIALS
    ids = tokenizer.encode_with_specials(text)
    names = {value: name for name, value in SPECIALS.items()}
    assert "".join(names.get(token, "") or chr(token) for token in ids if token < 128 or token in names) == "".join(
        c for c in text if ord(c) < 128
    )
    assert not set(tokenizer.encode(text)) & set(names)
    if "<|a|><|b|>" not in text:  # where one name begins another, tiktoken's choice is not defined
        assert ids == tokenizer.encoding.encode(text, allowed_special="all")


def test_a_million_spaces_in_a_chat_do_not_break_it() -> None:
    """tiktoken's own `encode` raises ValueError: the stack of the regular expression ends."""
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    tokenizer = Tokenizer.build("spaces", pattern, BYTE.ranks, SPECIALS)
    text = "<|a|>" + " " * 1_000_000 + "x<|im_end|>"
    assert tokenizer.encode_with_specials(text) == [300, *[32] * 1_000_000, ord("x"), 302]


def test_a_lone_surrogate_becomes_the_replacement_character() -> None:
    assert BYTE.decode(BYTE.encode("a\ud800b")) == "a\ufffdb"


def test_the_byte_alphabet_is_the_librarys() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


@pytest.mark.slow
@needs_cache
@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base"])
@settings(max_examples=50)
@given(text=texts)
def test_named_encodings_are_tiktokens_own(name: str, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
        tokenizer = get_tokenizer(name)
        assert tokenizer.encode(text) == tiktoken.get_encoding(name).encode(text, disallowed_special=())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
@needs_cache
def test_gpt2_is_found_under_the_name_that_has_its_ids(no_download: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    tokenizer = get_tokenizer("gpt2")
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot_id) == ("gpt2", 50257, 50256)
    assert tokenizer.encode("Hello, world") == [15496, 11, 995]  # GPT-2's published ids
    assert tokenizer.hash == get_tokenizer("r50k_base").hash and not no_download


def test_without_a_network_the_error_says_what_to_do(
    no_download: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError) as error:
        get_tokenizer("o200k_base")
    message = str(error.value)
    assert all(part in message for part in ("o200k_base", "TIKTOKEN_CACHE_DIR", '"byte"', '"char"', '"bpe:4096"'))
    assert "\n" not in message and len(no_download) == 1


@needs_cache
def test_a_damaged_cache_file_is_not_used(
    no_download: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(CACHE, tmp_path / "cache")
    for file in (tmp_path / "cache").iterdir():
        file.chmod(0o600)
        file.write_bytes(file.read_bytes()[:-100])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        get_tokenizer("r50k_base")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("gpt-2", 'did you mean "gpt2"'),
        ("cl100k", 'did you mean "cl100k_base"'),
        ("chars", 'did you mean "char"'),
        ("char", "made from text"),
        ("bpe:4096", "made from text"),
        ("bpe:many", "bpe:N"),
        ("bpe:256", ">= 257"),
        ("no/such.json", "No such file"),
    ],
)
def test_a_wrong_name_is_one_line_with_the_remedy(spec: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        get_tokenizer(spec)
    assert spec in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "not a tokenizer of lit_gpt"),
        ({"version": 3}, "version 3"),
        ({"version": True}, "version True"),
        ({"version": 2}, "damaged, its content is None"),
        ({"pattern": "(?s:..)"}, "damaged"),
        ({"pattern": "("}, "damaged"),
        ({"ranks": "AA== 0"}, "lacks 255 of the 256 bytes"),
        ({"ranks": "*"}, "damaged"),
        ({"specials": None}, "damaged"),
        ({"normalization": "NFKD"}, 'only "NFC"'),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(change: dict[str, object], says: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**BYTE.to_dict(), **change}), "utf-8")
    with pytest.raises(UserError, match=says):
        get_tokenizer(str(path))
    path.write_text(json.dumps(BYTE.to_dict())[:-50], "utf-8")
    with pytest.raises(UserError, match="not JSON"):
        get_tokenizer(str(path))


def test_what_is_trained_is_known_by_name() -> None:
    assert is_trained("char") and is_trained("bpe:4096") and not is_trained("gpt2") and not is_trained("byte")
    with pytest.raises(UserError, match="not made from text"):
        train_tokenizer("gpt2", ["x"])


def test_downloads_have_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def get(url: str, **options: object) -> None:
        seen.update(options)
        raise TimeoutError

    monkeypatch.setattr("requests.get", get)
    with contextlib.suppress(TimeoutError):
        lit_gpt.tokenizer.tiktoken_files._download("https://example.invalid/x")
    assert seen.get("timeout")
