"""GGUF's vocabulary ↔ our tokenizers: the same ids in llama.cpp as here, or a refusal.

llama.cpp knows regular expressions by name only (`src/llama-vocab.cpp`). Merges and checks are those of
`tokenizer_json.py`: GGUF has what `tokenizer.json` has in another form.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from gguf.constants import TokenType

from lit_gpt.console.messages import note
from lit_gpt.convert.gguf_format import Numbers
from lit_gpt.convert.patterns import GPT2, read_pattern, write_pattern
from lit_gpt.convert.tokenizer_json import LETTER_OF, convert_tokenizer, write_tokenizer
from lit_gpt.errors import UserError, brief
from lit_gpt.tokenizer.chatml import with_generation_tags, without_generation_tags
from lit_gpt.tokenizer.json_object import parse_json
from lit_gpt.tokenizer.tokenizer import CHARACTERS, EVERY_BYTE, Tokenizer
from lit_gpt.tokenizer.train import WORDS

OUR_TOKENIZER = "lit_gpt.tokenizer"
"""A key of our own: what GGUF cannot say of a `Tokenizer`, as JSON."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS_APART = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}],
}
_DIGITS_START = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|[\p{N}"
"""So it begins; to find every digit that belongs to it takes seconds."""
PRE_TOKENIZERS: dict[str, Callable[[], str]] = {
    "gpt-2": lambda: GPT2,
    "llama-bpe": lambda: _LLAMA3,
    "qwen2": lambda: _LLAMA3.replace("{1,3}", ""),
    "smollm": lambda: read_pattern(_DIGITS_APART, "smollm"),
}
"""`tokenizer.ggml.pre` → the regular expression that has the same pieces."""
_OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
_WHOLE_PIECES = {"llama-bpe"}
"""Of these llama.cpp takes a piece that is a token whole, before it tries merges, as tiktoken always does."""
_SPECIALS = (TokenType.CONTROL, TokenType.USER_DEFINED)


def describe_tokenizer(tokenizer: Tokenizer | None, vocab_size: int, where: str) -> dict[str, Any]:
    """Metadata of a tokenizer, the inverse of `read_vocabulary`.

    Args:
        tokenizer: None for a model of bare ids.
        vocab_size: of the model: ids that the tokenizer does not use become tokens that no text has.
        where: how errors name the source.

    Raises:
        UserError: if llama.cpp would give some text other ids, or end texts elsewhere.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    if tokenizer.n_vocab > vocab_size:
        raise UserError(
            f"{where}: the tokenizer has ids up to {tokenizer.n_vocab - 1}, the model {vocab_size}: "
            "choose another with --tokenizer"
        )
    if tokenizer.eot_id is None:
        raise UserError(
            f'{where}: tokenizer "{tokenizer.name}" has no end-of-text token, and llama.cpp would take another for it: '
            "choose another with --tokenizer"
        )
    pre = pre_tokenizer_of(tokenizer, where)
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [int(TokenType.UNUSED)] * vocab_size
    for token, number in tokenizer.ranks.items():
        tokens[number], kinds[number] = "".join(LETTER_OF[byte] for byte in token), int(TokenType.NORMAL)
    for text, number in tokenizer.specials.items():
        tokens[number], kinds[number] = text, int(TokenType.CONTROL)
    _check_unlike(tokens, tokenizer, pre, where)
    merges = write_tokenizer(tokenizer, where)["model"]["merges"]
    _check_merges_suffice(tokenizer, pre, len(merges), where)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": tokenizer.eot_id,
        "tokenizer.ggml.bos_token_id": tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "tokenizer.ggml.add_bos_token": tokenizer.bos_id is not None,
    }
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = without_generation_tags(tokenizer.chat_template)
    ours = {"name": tokenizer.name, "pattern": tokenizer.pattern, "normalization": tokenizer.normalization}
    return metadata | {OUR_TOKENIZER: json.dumps(ours)}


def pre_tokenizer_of(tokenizer: Tokenizer, where: str) -> str:
    """The name of llama.cpp's pre-tokenizer that has the tokenizer's pieces.

    Raises:
        UserError: if it has none.
    """
    pre = _name_of(tokenizer.pattern)
    if pre is None:
        if tokenizer.pattern == CHARACTERS and all(map(_is_character, tokenizer.ranks)):
            pre = "gpt-2"  # a piece of several characters is cut between them all the same: nothing joins two
        else:
            raise UserError(
                f'{where}: llama.cpp has no pre-tokenizer with the regular expression of tokenizer "{tokenizer.name}" '
                f"(it has those of {', '.join(PRE_TOKENIZERS)}): write it with --to hf"
            )
    if tokenizer.normalization is not None:
        if pre != "qwen2":
            raise UserError(
                f"{where}: llama.cpp does not normalise text to {tokenizer.normalization} as tokenizer "
                f'"{tokenizer.name}" does: write it with --to hf'
            )
        note("llama.cpp does not normalise text: what is not in Unicode's NFC has other ids there, as with any Qwen")
    return pre


def _name_of(pattern: str) -> str | None:
    if pattern == WORDS:
        return "gpt-2"
    names = [name for name in PRE_TOKENIZERS if name != "smollm" or pattern.startswith(_DIGITS_START)]
    return next((name for name in names if PRE_TOKENIZERS[name]() == pattern), None)


def _is_character(token: bytes) -> bool:
    """Whether a token is one byte, or one character."""
    try:
        return len(token) == 1 or len(token.decode()) == 1
    except UnicodeDecodeError:
        return False


def _check_merges_suffice(tokenizer: Tokenizer, pre: str, merges: int, where: str) -> None:
    """Refuse tokens that only whole pieces are, where llama.cpp does not search for those."""
    lost = len(tokenizer.ranks) - len(EVERY_BYTE) - merges
    if lost and pre not in _WHOLE_PIECES:
        raise UserError(
            f'{where}: {lost} tokens of tokenizer "{tokenizer.name}" are no merge of two others, and llama.cpp would '
            "not find them: write it with --to hf, or train with --tokenizer bpe:N"
        )


def _check_unlike(tokens: list[str], tokenizer: Tokenizer, pre: str, where: str) -> None:
    """Refuse a special token whose name llama.cpp would find in text: it finds tokens by their text alone."""
    if len(set(tokens)) < len(tokens):
        ((twice, _),) = Counter(tokens).most_common(1)
        raise UserError(
            f"{where}: two tokens are written {brief(twice)}, which llama.cpp refuses: write it with --to hf"
        )
    if pre not in _WHOLE_PIECES:
        return
    for text in tokenizer.specials:
        ranks = {token: number for number, token in enumerate(EVERY_BYTE)} | {text.encode(): 256}
        if len(ranks) > 256 and Tokenizer.build("probe", tokenizer.pattern, ranks, {}).encode(text) == [256]:
            raise UserError(
                f"{where}: llama.cpp would read the special token {brief(text)} where a text has that word: "
                "write it with --to hf"
            )


def read_vocabulary(metadata: Mapping[str, Any], rows: int, where: str, name: str) -> Tokenizer | None:
    """The tokenizer that a header describes, or None with a note where it has none.

    Args:
        metadata: of the header.
        rows: of the embedding.
        where: how errors name the file.
        name: the tokenizer's, where the file does not say.

    Raises:
        UserError: if it is no byte-level BPE, its pre-tokenizer is not known here, or ids of some text would differ.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        note(f"without a tokenizer: {where} has none")
        return None
    if kind != "gpt2":
        what = "a SentencePiece vocabulary" if kind == "llama" else f"of the kind {brief(kind)}"
        raise UserError(
            f"{where}: its tokenizer is {what}, not byte-level BPE, which is what is read from GGUF: choose a model "
            "with byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2), or name a tokenizer with --tokenizer"
        )
    tokens, kinds = _tokens(metadata, rows, where)
    hints = _hints(metadata, where)
    pre, pattern = _pattern(metadata, hints, where)
    specials = {text: number for number, text in enumerate(tokens) if kinds[number] in _SPECIALS}
    end, first = (_token_named(metadata, tokens, part, where) for part in ("eos", "bos"))
    first = first if metadata.get("tokenizer.ggml.add_bos_token", pre in _WHOLE_PIECES) else None
    specials |= {text: tokens.index(text) for text in (end, first) if text is not None and text not in specials}
    ordinary = {text: n for n, text in enumerate(tokens) if kinds[n] == TokenType.NORMAL and text not in specials}
    values = {
        "model": {
            "type": "BPE",
            "vocab": ordinary | specials,
            "merges": metadata.get("tokenizer.ggml.merges"),
            "ignore_merges": pre in _WHOLE_PIECES,
        },
        "pre_tokenizer": write_pattern(pattern),
        "normalizer": {"type": "NFC"} if hints.get("normalization", "NFC" if pre == "qwen2" else None) else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "added_tokens": [
            {"id": number, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False}
            for text, number in sorted(specials.items(), key=lambda item: item[1])
        ],
    }
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise UserError(f"{where}: tokenizer.chat_template is {brief(template)}, no text: it is damaged")
    template = None if template is None else with_generation_tags(template)
    details = {"eos": end, "eos_id": None, "bos": first, "chat_template": template}
    return convert_tokenizer(values, details, f"{where}: its tokenizer", str(hints.get("name", name)))


def _tokens(metadata: Mapping[str, Any], rows: int, where: str) -> tuple[list[str], list[int]]:
    """Texts and types of all ids."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not isinstance(metadata.get("tokenizer.ggml.merges"), list):
        raise UserError(f"{where} has no tokens and merges in its metadata: get it again")
    if len(tokens) != rows:
        raise UserError(f"{where} has {len(tokens)} tokens, but token_embd.weight has {rows} rows: it is damaged")
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{where} has a token twice: it is damaged")
    given = metadata.get("tokenizer.ggml.token_type")
    if given is None:
        return tokens, [int(TokenType.NORMAL)] * rows
    if not isinstance(given, Numbers) or len(given.values) != rows or given.values.dtype.kind not in "iu":
        raise UserError(f"{where}: tokenizer.ggml.token_type is no list of {rows} whole numbers: it is damaged")
    kinds = given.values.tolist()
    if int(TokenType.BYTE) in kinds:
        raise UserError(f"{where} has tokens of the type BYTE, as SentencePiece has: it is no byte-level BPE")
    return tokens, kinds


def _hints(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    text = metadata.get(OUR_TOKENIZER, "{}")
    try:
        hints = parse_json(text.encode())
    except (AttributeError, ValueError):
        hints = None
    known = {"name": (str,), "pattern": (str,), "normalization": (str, type(None))}
    if not isinstance(hints, dict) or any(not isinstance(v, known.get(k, ())) for k, v in hints.items()):
        raise UserError(f"{where}: {OUR_TOKENIZER} is {brief(text)}, which we do not write: it is damaged")
    return hints


def _pattern(metadata: Mapping[str, Any], hints: dict[str, Any], where: str) -> tuple[str, str]:
    """The pre-tokenizer's name and its regular expression; ours in the file's own spelling, if it means the same."""
    given = metadata.get("tokenizer.ggml.pre")
    pre = _OTHER_NAMES.get(given, given) if isinstance(given, str) else None
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{where}: its pre-tokenizer {brief(given)} is not known here ({', '.join(PRE_TOKENIZERS)} are): convert "
            "the model's Hugging Face folder, or name a tokenizer with --tokenizer"
        )
    ours = hints.get("pattern")
    if ours is not None and (_name_of(ours) == pre or (ours == CHARACTERS and pre == "gpt-2")):
        return pre, ours
    return pre, PRE_TOKENIZERS[pre]()


def _token_named(metadata: Mapping[str, Any], tokens: list[str], part: str, where: str) -> str | None:
    """The text of the token that begins or ends texts."""
    number = metadata.get(f"tokenizer.ggml.{part}_token_id")
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise UserError(
            f"{where}: tokenizer.ggml.{part}_token_id is {brief(number)}, which is none of its {len(tokens)} tokens: "
            "it is damaged"
        )
    return tokens[number]
