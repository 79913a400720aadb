"""The regular expressions that cut text into pieces, in Hugging Face's notation and in tiktoken's.

Hugging Face's library uses Oniguruma, tiktoken Rust's regex with look-around. Their character classes agree on every
code point; three notations mean different things:

    {1,3}+   possessive here, one or more repetitions there
    $        the end of the text here, of a line there
    (?s:.)   any character here, not known there
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from tiktoken_ext.openai_public import r50k_pat_str

from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import CHARACTERS
from lit_gpt.tokenizer.train import WORDS

GPT2 = r50k_pat_str
"""What `ByteLevel` with `use_regex` does."""
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
"""The pattern of `cl100k_base`, which tiktoken does not give a name."""


def is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether text is turned into bytes before it is merged."""
    return any(part["type"] == "ByteLevel" for part in _parts(pre_tokenizer))


def _parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return (pre_tokenizer.get("pretokenizers") or []) if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def read_pattern(pre_tokenizer: dict[str, Any] | None, where: str) -> str:
    """tiktoken's pattern for a `pre_tokenizer`.

    Raises:
        UserError: for steps that no single pattern does.
    """
    parts = _parts(pre_tokenizer)
    kinds = [part["type"] for part in parts]
    byte_level = parts[-1]
    if byte_level.get("add_prefix_space"):
        raise UserError(f"{where}: add_prefix_space is not supported: choose a tokenizer without it")
    words = byte_level.get("use_regex", True)
    if kinds == ["ByteLevel"] and words:
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and words:
        return _with_digits_apart(parts[0].get("individual_digits", False))
    if kinds == ["Split", "ByteLevel"] and not words:
        return _read_split(parts[0], where)
    steps = " + ".join(kinds)
    raise UserError(
        f"{where}: the pre_tokenizer {steps} (use_regex={words}) is no single pattern: choose another model"
    )


def _read_split(split: dict[str, Any], where: str) -> str:
    pattern = (split.get("pattern") or {}).get("Regex")
    kept = (split.get("behavior"), split.get("invert", False))
    if pattern is None or kept not in (("Isolated", False), ("Removed", True)):
        raise UserError(f"{where}: the pre_tokenizer Split {kept} is not supported: choose another model")
    return _KNOWN.get(pattern, pattern)


def with_space_runs(pattern: str, longest: int, where: str) -> str:
    """GPT-2's rule between runs of 2 … `longest` spaces, which are pieces of their own and cut out first (GPT-NeoX).

    Raises:
        UserError: for another pattern than GPT-2's.
    """
    if pattern != GPT2:
        raise UserError(
            f"{where}: tokens for runs of spaces beside this pre_tokenizer are not supported: choose another model"
        )
    space = r"(?:(?! {2})\s)"  # none that begins a run: the text before one is cut as if it ended there
    words = r"'(?:[dmst]|ll|re|ve)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
    return rf" {{2,{longest}}}|{words}|{space}+(?!\S)|{space}+"


def _with_digits_apart(one_by_one: bool) -> str:
    """GPT-2's rule in each stretch between digits, which are pieces of their own.

    Spaces before a digit end their stretch, so that none is left over for the digit.
    """
    digit = rf"[\p{{N}}{_more_digits()}]"
    other = digit[1:-1]
    many = "" if one_by_one else "+"
    return rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}++|{digit}{many}| ?[^\s\p{{L}}{other}]++|\s+(?![^\s{other}])|\s+"


@cache
def _more_digits() -> str:
    """Characters that the `Digits` step counts as digits though the class N does not hold them."""
    from tokenizers import Regex, pre_tokenizers

    # Unicode's numbers are in the first two planes; of the 15 others it takes seconds to ask.
    every = "".join(map(chr, (c for c in range(0x80, 0x20000) if not 0xD800 <= c < 0xE000)))
    no_numbers = "".join(text for text, _ in pre_tokenizers.Split(Regex(r"\p{N}"), "removed").pre_tokenize_str(every))
    pieces = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str(no_numbers)
    return "".join(rf"\x{{{ord(text):x}}}" for text, _ in pieces if len(text) == 1)


def write_pattern(pattern: str) -> dict[str, Any]:
    """A `pre_tokenizer` that cuts as tiktoken does with `pattern`."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if pattern == GPT2:
        return {**byte_level, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": to_oniguruma(pattern)}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}


def to_oniguruma(pattern: str) -> str:
    """tiktoken's `pattern` in Oniguruma's notation, for the three differences above."""
    if pattern == CHARACTERS:
        return r"[\s\S]"
    pattern = re.sub(r"(\\p\{\w+\}|\[[^]]*\]|\\?\w)(\{\d+(?:,\d*)?\})\+", r"(?>\1\2)", pattern)
    # Left alone: what is escaped, and classes, in which a dollar is a dollar.
    return re.sub(r"(\\.|\[(?:\\.|[^]\\])*\])|\$", lambda match: match.group(1) or r"\z", pattern)


_KNOWN = {to_oniguruma(pattern): pattern for pattern in (CHARACTERS, WORDS, GPT2, CL100K)}
"""Patterns that we translated ourselves are read back as they were, so that a tokenizer keeps its hash."""
