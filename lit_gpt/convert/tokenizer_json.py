"""`tokenizer.json` of Hugging Face ↔ our tokenizers: the same ids or a refusal, in both directions.

Byte-level BPE and tiktoken do the same by different means: a list of merges against ids that are ranks. Where the two
could differ on some text the conversion is refused; what remains is tested on probe texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers

from lit_gpt.console.messages import note
from lit_gpt.convert import patterns
from lit_gpt.convert.byte_fallback_json import is_byte_fallback, read_byte_fallback
from lit_gpt.convert.probe_texts import probe_texts
from lit_gpt.convert.schema import SWITCH, TEXT, check_schema
from lit_gpt.errors import UserError, brief
from lit_gpt.tokenizer.byte_fallback import ByteFallbackTokenizer, hub_tokenizer
from lit_gpt.tokenizer.json_object import read_json, read_text
from lit_gpt.tokenizer.tokenizer import Tokenizer, byte_alphabet
from lit_gpt.tokenizer.vocabulary import is_panic

_STEP = {
    "type": str,
    "add_prefix_space": SWITCH,
    "use_regex": SWITCH,
    "individual_digits": SWITCH,
    "pattern": ({"Regex": TEXT, "String": TEXT}, None),
    "behavior": TEXT,
    "invert": SWITCH,
}
_PROCESSOR = {"type": TEXT, "single": ([{"SpecialToken": ({"id": str}, None)}], None)}
_SCHEMA = {
    "model": ({"type": TEXT}, None),
    "pre_tokenizer": ({**_STEP, "pretokenizers": ([_STEP], None)}, None),
    "normalizer": ({"type": str, "normalizers": ([{"type": str}], None)}, None),
    "post_processor": ({**_PROCESSOR, "processors": ([_PROCESSOR], None)}, None),
    "added_tokens": ([{"content": str, "id": int}], None),
}
_MODEL_SCHEMA = {"vocab": {str: int}, "merges": [(str, [str])]}
_TOKEN = (str, {"content": str}, None)
_SIDE_SCHEMA = {
    "eos_token": _TOKEN,
    "bos_token": _TOKEN,
    "chat_template": (str, [{"name": str, "template": str}], None),
}
"""Types of what is read of `tokenizer.json`, of its model, and of `tokenizer_config.json`."""
LETTER_OF = {byte: letter for letter, byte in byte_alphabet().items()}
BYTE_OF = byte_alphabet()


def read_tokenizer(folder: Path, config: dict[str, Any], name: str) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, or None with a note where there is none.

    Args:
        folder: holds `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`.
        config: its `config.json`.
        name: what the user called it.

    Raises:
        UserError: if it is neither byte-level BPE nor BPE with byte fallback, or would give other ids here.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        return convert_tokenizer(read_json(path), _details(folder, config), f"{name}: tokenizer.json", _short(name))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        values = _from_vocab_and_merges(folder)
        return convert_tokenizer(values, _details(folder, config), f"{name}: vocab.json", _short(name))
    pieces = next((p for p in ("tokenizer.model", "spiece.model") if (folder / p).is_file()), None)
    if pieces:
        raise UserError(
            f"{name}: {pieces} is a SentencePiece vocabulary, and only tokenizer.json is read: save the tokenizer with "
            "transformers, which writes one"
        )
    note(f"without a tokenizer: {name} has no tokenizer.json")
    return None


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1] or name


def _details(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What stands beside the vocabulary: end of text, whether a BOS is wanted, and the chat template."""
    side = folder / "tokenizer_config.json"
    values = read_json(side) if side.is_file() else {}
    check_schema(values, _SIDE_SCHEMA, str(side))
    template = values.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = read_text(folder / "chat_template.jinja")
    eos_ids = config.get("eos_token_id")
    return {
        "eos": _content(values.get("eos_token")),
        "eos_id": eos_ids[0] if isinstance(eos_ids, list) and eos_ids else eos_ids,
        "bos": _content(values.get("bos_token")) if values.get("add_bos_token") else None,
        "chat_template": template,
    }


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _from_vocab_and_merges(folder: Path) -> dict[str, Any]:
    """GPT-2's two files as the `tokenizer.json` that they stand for."""
    lines = read_text(folder / "merges.txt").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    vocabulary = read_json(folder / "vocab.json")
    end = "<|endoftext|>"
    added = [{"id": vocabulary[end], "content": end, "special": True}] if end in vocabulary else []
    return {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
        "added_tokens": added,
    }


def convert_tokenizer(values: dict[str, Any], details: dict[str, Any], where: str, name: str) -> Tokenizer:
    """`tokenizer.json` as a tokenizer that gives the same ids: a tiktoken encoding for byte-level BPE.

    Args:
        values: the file's content.
        details: from `_details`.
        where: how errors name the file.
        name: the tokenizer's.

    Raises:
        UserError: if it is neither byte-level BPE nor BPE with byte fallback, or a text was found for which the ids
            differ.
    """
    check_schema(values, _SCHEMA, where)
    if is_byte_fallback(values):
        end = _end_of_text(details, _added_tokens(values))
        first = _first_token(values) or details["bos"]
        return read_byte_fallback(values, end, first, details["chat_template"], where, name)
    model = values.get("model") or {}
    _check_model(values, model, where)
    check_schema(model, _MODEL_SCHEMA, where)
    pattern = patterns.read_pattern(values.get("pre_tokenizer"), where)
    vocabulary: dict[str, int] = model["vocab"]
    specials, end = _specials(values, details, vocabulary)
    ranks = {_bytes(letters, where): number for letters, number in vocabulary.items() if letters not in specials}
    _check_merges(model, ranks, where)
    runs = _space_runs(values)
    if runs:
        pattern = patterns.with_space_runs(pattern, 1 + len(runs), where)
        ranks |= {text.encode(): number for text, number in runs.items()}
        specials = {text: number for text, number in specials.items() if text not in runs}
    try:
        tokenizer = Tokenizer.build(
            name,
            pattern,
            ranks,
            specials,
            bos_id=_bos_id(values, details, specials),
            normalization=_normalization(values.get("normalizer"), where),
            chat_template=details["chat_template"],
            end_of_text=end,
        )
    except UserError as error:
        raise UserError(f"{where} cannot be a tiktoken encoding: {error}") from None
    _check_same_ids(tokenizer, hub_tokenizer(values, where), where)
    return tokenizer


def _added_tokens(values: dict[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in values.get("added_tokens") or []}


def _space_runs(values: dict[str, Any]) -> dict[str, int]:
    """The added tokens that are 2, 3, … spaces, and no special ones; none if a length is missing."""
    added = [token for token in values.get("added_tokens") or [] if token.get("special") is not True]
    runs = {token["content"]: token["id"] for token in added if not token["content"].strip(" ")}
    return runs if sorted(map(len, runs)) == list(range(2, 2 + len(runs))) else {}


def _end_of_text(details: dict[str, Any], added: dict[str, int]) -> str | None:
    """The name of the token that ends a text: that of `tokenizer_config.json`, or the one with the config's id."""
    return details["eos"] or next((text for text, i in added.items() if i == details["eos_id"]), None)


def _specials(
    values: dict[str, Any], details: dict[str, Any], vocabulary: dict[str, int]
) -> tuple[dict[str, int], str | None]:
    """Name → id of the special tokens, and the name of the one that ends a text, if there is one."""
    specials = _added_tokens(values)
    end = _end_of_text(details, specials)
    if end is not None and end not in specials and end in vocabulary:
        specials[end] = vocabulary[end]
    return specials, end if end in specials else None


def _check_model(values: dict[str, Any], model: dict[str, Any], where: str) -> None:
    """Refuse what is no byte-level BPE, with the reason."""
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    remedy = "choose a model with byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2)"
    if kind != "BPE":
        raise UserError(
            f"{where} is a {kind} vocabulary, not byte-level BPE, which cannot be a tiktoken encoding: {remedy}"
        )
    if model.get("byte_fallback") or not patterns.is_byte_level(values.get("pre_tokenizer")):
        raise UserError(
            f"{where} is SentencePiece-like BPE over characters, not byte-level BPE, which cannot be a tiktoken "
            f"encoding: {remedy}"
        )
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise UserError(f"{where}: {field}={brief(model[field])} is not supported: {remedy}")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise UserError(f"{where} has no vocab and merges: get it again")


def _bytes(letters: str, where: str) -> bytes:
    try:
        return bytes(BYTE_OF[letter] for letter in letters)
    except KeyError:
        raise UserError(
            f"{where}: the token {brief(letters)} is no string of bytes: the vocabulary is not byte-level"
        ) from None


def _normalization(normalizer: dict[str, Any] | None, where: str) -> str | None:
    if normalizer is None:
        return None
    parts = (normalizer.get("normalizers") or []) if normalizer["type"] == "Sequence" else [normalizer]
    kinds = [part["type"] for part in parts]
    if kinds not in ([], ["NFC"]):
        raise UserError(f"{where}: the normalizer {'+'.join(kinds)} is not supported, only NFC: choose another model")
    return "NFC" if kinds else None


def _bos_id(values: dict[str, Any], details: dict[str, Any], specials: dict[str, int]) -> int | None:
    """The token that the model was trained to see first, if its tokenizer puts one in front of every text."""
    first = _first_token(values)
    if first is not None:
        return specials.get(first)
    return specials.get(details["bos"]) if details["bos"] else None


def _first_token(values: dict[str, Any]) -> str | None:
    """The token that the file puts in front of every text, if it does."""
    processor = values.get("post_processor") or {}
    for part in processor.get("processors") or [processor]:
        first = (part.get("single") or [{}])[0] if part.get("type") == "TemplateProcessing" else {}
        if first.get("SpecialToken"):
            return first["SpecialToken"]["id"]
    return None


def _check_merges(model: dict[str, Any], ranks: dict[bytes, int], where: str) -> None:
    """Merging by rank equals merging by list only if the list goes up in the ids of what it makes."""
    last = -1
    for merge in model["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2:
            raise UserError(f"{where}: the merge {brief(merge)} is no pair: get it again")
        left, right = pair
        made = ranks.get(_bytes(left, where) + _bytes(right, where))
        if made is None or made < last:
            raise UserError(
                f"{where}: the merge of {brief(left)} and {brief(right)} is out of the order of ids: "
                "choose another model"
            )
        last = made


def _check_same_ids(ours: Tokenizer, theirs: tokenizers.Tokenizer, where: str) -> None:
    """Try both on probe texts and on the text of every token."""
    texts = [*probe_texts(), *_texts_of_tokens(ours)]
    try:
        encodings = theirs.encode_batch_fast(texts, add_special_tokens=False)
        all_ours = [ours.encode(text) for text in texts]
    except BaseException as error:  # a pattern that never ends, or a vocabulary with gaps where one of them has none
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise UserError(
            f"{where} fails on a text ({' '.join(str(error).split())[:200]}): choose another model"
        ) from None
    for text, encoding, mine in zip(texts, encodings, all_ours):
        if mine != encoding.ids:
            raise UserError(
                f"{where} cannot be a tiktoken encoding with the same ids: {text[:40]!r} is {encoding.ids[:8]} there, "
                f"{mine[:8]} here; choose another model"
            )


def _texts_of_tokens(tokenizer: Tokenizer) -> Iterable[str]:
    for token in tokenizer.ranks:
        try:
            text = token.decode()
        except UnicodeDecodeError:
            continue
        if not any(special in text for special in tokenizer.specials):
            yield text


def write_tokenizer(tokenizer: Tokenizer, where: str) -> dict[str, Any]:
    """Our tokenizer as `tokenizer.json`; one with byte fallback has been one all along.

    The merges are those that tiktoken would do to a token's bytes with ids below its own. A token that merges cannot
    reach is still found where it is a whole piece, which `ignore_merges` says.

    Raises:
        UserError: if a text was found for which the ids differ.
    """
    if isinstance(tokenizer, ByteFallbackTokenizer):
        processor = None if tokenizer.bos_id is None else _post_processor(tokenizer)
        return {**tokenizer.content, "post_processor": processor}
    letters = {token: "".join(LETTER_OF[byte] for byte in token) for token in tokenizer.ranks}
    ordered = sorted(tokenizer.ranks, key=lambda token: tokenizer.ranks[token])
    pairs = (_last_pair(token, tokenizer.ranks) for token in ordered if len(token) > 1)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(text, number) for text, number in sorted(tokenizer.specials.items(), key=lambda p: p[1])
        ],
        "normalizer": {"type": tokenizer.normalization} if tokenizer.normalization else None,
        "pre_tokenizer": patterns.write_pattern(tokenizer.pattern),
        "post_processor": _post_processor(tokenizer),
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            # The specials too: what is not in here would get the next free id, whatever added_tokens says.
            "vocab": {letters[token]: tokenizer.ranks[token] for token in ordered} | tokenizer.specials,
            "merges": [[letters[left], letters[right]] for left, right in filter(None, pairs)],
        },
    }
    _check_same_ids(tokenizer, hub_tokenizer(values, where), where)
    return values


def _last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that merge into `token` when its bytes are merged, or None if merges do not lead there."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        found = [(ranks.get(a + b, limit), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, at = min(found)
        if rank >= limit:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _added_token(text: str, number: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": text, **flags}


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any] | None:
    name = next((text for text, number in tokenizer.specials.items() if number == tokenizer.bos_id), None)
    if name is None:
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    bos, a, b = (
        {"SpecialToken": {"id": name, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
    )
    return {
        "type": "TemplateProcessing",
        "single": [bos, a],
        "pair": [bos, a, b],
        "special_tokens": {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}},
    }


def write_tokenizer_config(tokenizer: Tokenizer, block_size: int) -> dict[str, Any]:
    """`tokenizer_config.json`: what transformers needs to know beside the vocabulary."""
    name_of = {number: text for text, number in tokenizer.specials.items()}
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.end_of_text,
        "bos_token": None if tokenizer.bos_id is None else name_of.get(tokenizer.bos_id),
        "chat_template": tokenizer.chat_template,
    }
    return {key: value for key, value in values.items() if value is not None}
