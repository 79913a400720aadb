"""Checks of what a `tiktoken.Encoding` is made of: on what it does not expect it ends in a panic, no exception."""

from __future__ import annotations

import re

import tiktoken

from lit_gpt.errors import UserError, brief

MAX_TOKENS = 1 << 20
MAX_ID = 1 << 24
_LONGEST_PATTERN = 20_000  # characters
_MOST_REPETITIONS = 10_000
# Counts such as {1,3}, but not the code points and classes of \x{1f3}, \p{L} and the like.
_COUNT = re.compile(r"(?<!\\[xupPU])\{(\d*)(?:,(\d*))?\}")


def build_encoding(name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> tiktoken.Encoding:
    """The encoding of these parts.

    Raises:
        UserError: for parts of other types, ids that are negative, too large or given twice, and a pattern that is no
            regular expression, or would be one of many megabytes.
    """
    fault = _fault(name, pattern, ranks, specials)
    if fault is not None:
        raise UserError(f"tokenizer {brief(name)}: {fault}")
    try:
        return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"tokenizer {brief(name)}: tiktoken does not accept it ({reason})") from None


def is_panic(error: BaseException) -> bool:
    """Whether a library that is written in Rust met what it does not expect; such an error is no `Exception`."""
    return (type(error).__module__, type(error).__name__) == ("pyo3_runtime", "PanicException")


def _fault(name: object, pattern: object, ranks: dict[bytes, int], specials: object) -> str | None:
    if not isinstance(name, str) or not isinstance(pattern, str) or not isinstance(specials, dict):
        return "its name, pattern or specials are of another type"
    if len(pattern) > _LONGEST_PATTERN or _repetitions(pattern) > _MOST_REPETITIONS:
        return f"its pattern {brief(pattern)} is too large"
    if len(ranks) + len(specials) > MAX_TOKENS:
        return f"it has {len(ranks) + len(specials)} tokens, more than {MAX_TOKENS}"
    for token, number in (*ranks.items(), *specials.items()):
        if not isinstance(token, (bytes, str)) or not token:
            return f"{brief(token)} is no token"
        if type(number) is not int or not 0 <= number < MAX_ID:
            return f"the id {brief(number)} of {brief(token)} is not in 0 … {MAX_ID - 1}"
    odd = next((special for special in specials if not isinstance(special, str)), None)
    if odd is not None:
        return f"the special token {brief(odd)} is no text"
    seen: dict[int, bytes | str] = {}
    if len({*ranks.values(), *specials.values()}) < len(ranks) + len(specials):
        for token, number in (*ranks.items(), *specials.items()):
            if number in seen:
                return f"{brief(seen[number])} and {brief(token)} have one id, {number}"
            seen[number] = token
    return None


def _repetitions(pattern: str) -> int:
    """How many copies of its innermost part the pattern can stand for, nested counts multiplied."""
    product = 1
    for low, high in _COUNT.findall(pattern):
        longest = max(len(low), len(high))
        product *= 10**longest if longest > 5 else max(int(low or 1), int(high or 1), 1)
        if product > _MOST_REPETITIONS:
            break
    return product
