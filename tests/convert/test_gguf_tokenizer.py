"""Tokenizers as GGUF and back: the same ids in transformers and by llama.cpp's regular expressions, or a refusal."""

from __future__ import annotations

import itertools
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import regex
from gguf_samples import CHATML, TEXT, random_texts, sample_source, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.convert.gguf_tokenizer import PRE_TOKENIZERS, describe_tokenizer, read_vocabulary
from lit_gpt.convert.gguf_write import write_gguf
from lit_gpt.convert.patterns import CL100K, GPT2
from lit_gpt.convert.tokenizer_json import hub_tokenizer, write_tokenizer
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.chatml import with_chat_template
from lit_gpt.tokenizer.tokenizer import EVERY_BYTE, Tokenizer
from lit_gpt.tokenizer.train import WORDS

gguf = pytest.importorskip("gguf")
KINDS = ["byte", "two-byte char", "bpe:400", "gpt-2", "llama-bpe", "qwen2", "smollm"]
BYTES = {token: number for number, token in enumerate(EVERY_BYTE)}


def made(pattern: str, ranks: dict[bytes, int], specials: dict[str, int] | None = None, **details: Any) -> Tokenizer:
    specials = {"<|endoftext|>": max(ranks.values()) + 1} if specials is None else specials
    return Tokenizer.build("made", pattern, ranks, specials, **details)


def as_read(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata as a file's header would have it."""
    from lit_gpt.convert.gguf_format import Numbers

    kinds = gguf.gguf_writer.np.array(metadata["tokenizer.ggml.token_type"], dtype="<i4")
    return metadata | {"tokenizer.ggml.token_type": Numbers(kinds)}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k == "smollm")) for k in KINDS])
def test_there_and_back(kind: str) -> None:
    ours = tokenizer(kind)
    metadata = describe_tokenizer(ours, ours.n_vocab, "x")
    back = read_vocabulary(as_read(metadata), ours.n_vocab, "x", "y")
    assert back is not None and back.to_dict() == ours.to_dict()
    pre = {"byte": "gpt-2", "two-byte char": "gpt-2", "bpe:400": "gpt-2"}.get(kind, kind)
    assert metadata["tokenizer.ggml.pre"] == pre and metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.eos_token_id"] == ours.eot_id
    assert metadata["tokenizer.ggml.add_bos_token"] == (ours.bos_id is not None)
    kinds = metadata["tokenizer.ggml.token_type"]
    assert {metadata["tokenizer.ggml.tokens"][n] for n, k in enumerate(kinds) if k == 3} == set(ours.specials)


# Oniguruma, Rust and Python have other versions of Unicode: what is a letter in one may be unassigned in another.
ASSIGNED = st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"], max_codepoint=0xFFFF), max_size=40)
PIECES = [
    "'s",
    "'LL",
    "'rE",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "1",
    "22",
    "333",
    "é",
    "e\u0301",
    "你",
    "½",
    "\x85",
    "\u3000",
]
TEXTS = st.one_of(ASSIGNED, st.lists(st.sampled_from([*PIECES, "fox", "Fox", "!?"]), max_size=20).map("".join))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_same_ids_in_transformers(kind: str, tmp_path: Path) -> None:
    """What AutoTokenizer makes of the file alone; it knows no `smollm`, and cuts only the others as llama.cpp does."""
    transformers = pytest.importorskip("transformers")
    source = sample_source(tmp_path, "llama", kind)
    ours = tokenizer(kind)
    write_gguf(source, tmp_path / "model.gguf", "f16")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert theirs.eos_token_id == ours.eot_id
    assert theirs.chat_template == ours.chat_template
    if kind == "smollm":
        assert theirs.convert_tokens_to_ids(["a", "the"]) == [ours.encode("a")[0], ours.ranks.get(b"the")]
        return

    def ids_of(text: str) -> list[int]:
        return theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    for text in [TEXT, *random_texts(300)]:
        text = unicodedata.normalize("NFC", text) if ours.normalization else text
        assert ids_of(text) == ours.encode(text), text

    @given(text=TEXTS)
    @settings(max_examples=50, deadline=None)
    def same_ids(text: str) -> None:
        text = unicodedata.normalize("NFC", text) if ours.normalization else text
        assert ids_of(text) == ours.encode(text)

    same_ids()


_SPACE_AND_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ANY_CASE = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA_CPP = {
    "gpt-2": [_GPT2],
    "llama-bpe": [
        rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACE_AND_REST}"
    ],
    "qwen2": [rf"{_ANY_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACE_AND_REST}"],
    "smollm": [r"\p{N}", _GPT2],
}
"""What llama.cpp's `src/llama-vocab.cpp` cuts by under these names: each expression in the pieces of the one before."""


def pieces_there(name: str, text: str) -> list[str]:
    """llama.cpp's pieces: what an expression matches, and what lies between its matches."""
    pieces = [text]
    for expression in LLAMA_CPP[name]:
        # llama.cpp's class of spaces is Unicode's White_Space, Python's has four more.
        spelled = expression.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
        cut: list[str] = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(spelled, piece):
                cut += [piece[end : match.start()], match.group()]
                end = match.end()
            cut.append(piece[end:])
        pieces = [piece for piece in cut if piece]
    return pieces


def pieces_here(name: str) -> Any:
    """A function of a text: the pieces of our pattern, by the library that `tokenizer_json` compares tiktoken with."""
    splitter = hub_tokenizer(write_tokenizer(made(PRE_TOKENIZERS[name](), BYTES), "x"), "x").pre_tokenizer
    return lambda text: [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_our_pieces_are_those_of_llama_cpps_expressions(name: str) -> None:
    pieces = pieces_here(name)

    def same(text: str) -> None:
        text = "".join("s" if c == "ſ" else c for c in text if unicodedata.category(c) != "Cn")
        assert pieces(text) == pieces_there(name, text)

    for text in [TEXT, *random_texts(600)]:
        same(text)
    given(text=TEXTS)(settings(max_examples=50, deadline=None)(same))()


def test_the_one_letter_that_llama_cpp_takes_for_no_s() -> None:
    """The long s, U+017F, is an "s" to `(?i:'s)`, but not to llama.cpp's spelling of it, in any Llama 3 or Qwen."""
    for name in ("llama-bpe", "qwen2"):
        assert pieces_here(name)("'ſt") == ["'ſ", "t"] and pieces_there(name, "'ſt") == ["'ſt"]
    assert pieces_here("gpt-2")("'ſt") == pieces_there("gpt-2", "'ſt")


def merged_by(tokens: list[str], merges: list[str], piece: str) -> list[int]:
    """llama.cpp's way with a piece in the letters of bytes: of all pairs the first in the list, leftmost, repeated."""
    rank = {tuple(merge.split(" ")): number for number, merge in enumerate(merges)}
    parts = list(piece)
    while len(parts) > 1:
        best, at = min((rank.get(pair, len(rank)), i) for i, pair in enumerate(itertools.pairwise(parts)))
        if best == len(rank):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [tokens.index(part) for part in parts]


@pytest.mark.parametrize("kind", ["byte", "two-byte char", "bpe:400"])
def test_merges_as_llama_cpp_does_them_give_our_ids(kind: str) -> None:
    """Pieces of llama.cpp's expression, merged by the list in the file; characters, too, which we cut otherwise."""
    from lit_gpt.convert.tokenizer_json import LETTER_OF

    ours = tokenizer(kind)
    metadata = describe_tokenizer(ours, ours.n_vocab, "x")
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    assert (merges == []) == (kind == "byte")
    for text in [TEXT, "naïve café Ελληνικά, Русский", *random_texts(100)]:
        ids: list[int] = []
        for piece in pieces_there("gpt-2", text):
            ids += merged_by(tokens, merges, "".join(LETTER_OF[byte] for byte in piece.encode()))
        assert ids == ours.encode(text), text


def test_ids_that_the_tokenizer_does_not_use_are_no_text() -> None:
    ours = tokenizer("bpe:400")
    metadata = describe_tokenizer(ours, ours.n_vocab + 3, "x")
    assert metadata["tokenizer.ggml.tokens"][-3:] == [f"[PAD{ours.n_vocab + n}]" for n in range(3)]
    assert metadata["tokenizer.ggml.token_type"][-3:] == [gguf.TokenType.UNUSED] * 3
    back = read_vocabulary(as_read(metadata), ours.n_vocab + 3, "x", "y")
    assert back is not None and back.to_dict() == ours.to_dict()


@pytest.mark.slow
def test_a_file_of_another_program_without_types() -> None:
    """Of GPT-2's early files: the end of text is a token as any other, and no key of ours says what is what."""
    ours = made(GPT2, tokenizer("bpe:400").ranks)
    metadata = describe_tokenizer(ours, ours.n_vocab, "x")
    del metadata["lit_gpt.tokenizer"], metadata["tokenizer.ggml.token_type"], metadata["tokenizer.ggml.add_bos_token"]
    back = read_vocabulary(metadata, ours.n_vocab, "x", "small")
    assert back is not None and (back.name, back.hash, back.bos_id) == ("small", ours.hash, None)
    qwen = tokenizer("qwen2")
    metadata = as_read(describe_tokenizer(qwen, qwen.n_vocab, "x"))
    del metadata["lit_gpt.tokenizer"]
    back = read_vocabulary(metadata, qwen.n_vocab, "x", "small")
    assert back is not None and back.hash == qwen.hash and back.normalization == "NFC"
    assert back.chat_template == CHATML


@pytest.mark.parametrize("kind", ["byte", "llama-bpe"])
def test_our_chat_template_has_no_tags_in_a_file_and_has_them_again(kind: str) -> None:
    """Jinja itself, which llama-cpp-python renders with, does not know them."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    ours = with_chat_template(replace(tokenizer(kind), chat_template=None))
    metadata = describe_tokenizer(ours, ours.n_vocab, "x")
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    talk = [{"role": "user", "content": " 你好\n"}, {"role": "assistant", "content": "Hi"}]
    first = "<|im_start|>" if ours.bos_id is not None else ""
    written = jinja.from_string(metadata["tokenizer.chat_template"]).render(messages=talk, bos_token=first)
    assert written == first + "<|im_start|>user\n 你好\n<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
    back = read_vocabulary(as_read(metadata), ours.n_vocab, "x", "y")
    assert back is not None and back.to_dict() == ours.to_dict()


def unreachable(pattern: str) -> Tokenizer:
    """With a token that only a whole piece is."""
    merges = tokenizer("bpe:400").ranks
    return made(pattern, merges | {b"zyxw": max(merges.values()) + 1})


REFUSED = {
    "characters of three bytes": (lambda: tokenizer("char"), "are no merge of two others"),
    "another expression": (lambda: made(CL100K, BYTES), r"regular expression of tokenizer \"made\""),
    "characters that are none": (lambda: made(r"(?s:.)", BYTES | {b"ab": 256}), "regular expression"),
    "NFC": (lambda: made(WORDS, BYTES, normalization="NFC"), "does not normalise text to NFC"),
    "no end": (lambda: made(WORDS, BYTES, {}), "no end-of-text token"),
    "a token out of reach": (lambda: unreachable(WORDS), '1 tokens of tokenizer "made" are no merge'),
    "a special token with a token's letters": (
        lambda: made(WORDS, tokenizer("bpe:400").ranks, {"ove": 500, "<|endoftext|>": 501}),
        "two tokens are written 'ove'",
    ),
    "a special token that is a word": (
        lambda: made(PRE_TOKENIZERS["llama-bpe"](), BYTES, {"<|endoftext|>": 256, "ende": 257}),
        "would read the special token 'ende'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_express_is_refused_with_the_reason(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        describe_tokenizer(make(), 1000, "x")


def test_more_ids_than_the_model_has_are_refused() -> None:
    with pytest.raises(UserError, match="the tokenizer has ids up to 256, the model 100: choose another"):
        describe_tokenizer(tokenizer("byte"), 100, "x")


def test_whole_pieces_are_found_by_llama_bpe() -> None:
    """Llama 3's vocabulary has tokens that no merges make; its pre-tokenizer looks for whole pieces first."""
    ours = unreachable(PRE_TOKENIZERS["llama-bpe"]())
    metadata = as_read(describe_tokenizer(ours, ours.n_vocab, "x"))
    back = read_vocabulary(metadata, ours.n_vocab, "x", "y")
    assert back is not None and back.hash == ours.hash and len(back.encode(" zyxw")) > len(back.encode("zyxw")) == 1


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    """A chat template in JSON can have one, UTF-8 cannot."""
    source = sample_source(tmp_path, "qwen3", "byte")
    assert source.tokenizer is not None
    broken = replace(source, tokenizer=replace(source.tokenizer, chat_template="\ud800"))
    with pytest.raises(UserError, match="half a character"):
        write_gguf(broken, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["sample.ckpt"]
