"""The end of a continuation: limits, end ids and stop strings, and the text that is certain by now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.outputs import FinishReason, Token
from lit_gpt.tokenizer.tokenizer import TextStream, Tokenizer


def scan(held: bytes, new: bytes, stops: Iterable[bytes]) -> tuple[bytes, bytes, bool]:
    """Find stop strings in what was held back and what is new.

    >>> scan(b"", b"to be EN", [b"END"])
    (b'to be ', b'EN', False)
    >>> scan(b"EN", b"D. Or not", [b"END"])
    (b'', b'', True)

    Returns:
        What is certain to be text; what may yet become a stop string; whether one was found (what follows is dropped).
    """
    data = held + new
    found = [start for stop in stops if (start := data.find(stop)) >= 0]
    if found:
        return data[: min(found)], b"", True
    keep = 0
    for stop in stops:
        for n in range(min(len(stop) - 1, len(data)), keep, -1):
            if data.endswith(stop[:n]):
                keep = n
                break
    return data[: len(data) - keep], data[len(data) - keep :], False


class Ending:
    """When a continuation ends, by its generation settings and the tokens that fit.

    Attributes:
        limit: the most new tokens.
        end_ids: end-of-text and the stop ids.
        stops: stop strings as bytes.
    """

    def __init__(self, generation_config: GenerationConfig, limit: int, end_ids: frozenset[int]) -> None:
        self.limit = limit
        self.end_ids = end_ids
        self.stops = tuple(stop.encode() for stop in generation_config.stops)

    def reason(self, token: int, count: int, stopped: bool) -> FinishReason | None:
        """Why the continuation ends with `token`, its `count`-th, or None; `stopped` says a stop string was found."""
        if stopped or token in self.end_ids:
            return "stop"
        return "length" if count >= self.limit else None


class Continuation:
    """The tokens of a continuation, and its text in whole characters with possible stop strings held back.

    Attributes:
        ids: every token so far.
        finish_reason: why it ended, or None.
    """

    def __init__(self, ending: Ending, tokenizer: Tokenizer | None) -> None:
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._ending = ending
        self._tokenizer = tokenizer
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._held = b""
        self._tokens: list[Token] = []
        self._text: list[str] = []

    def push(self, token: Token) -> bool:
        """Add the next token; whether it was the last."""
        self.ids.append(token.id)
        self._tokens.append(token)
        stopped = False
        if self._tokenizer is not None and self._stream is not None and token.id not in self._ending.end_ids:
            new = self._tokenizer.token_bytes(token.id)
            sure, self._held, stopped = scan(self._held, new, self._ending.stops)
            self._text.append(self._stream.feed(sure))
        reason = self._ending.reason(token.id, len(self.ids), stopped)
        if reason is not None:
            self.finish(reason)
        return reason is not None

    def would_end(self, path: Sequence[int]) -> bool:
        """Whether it would end if `path` were pushed."""
        held = self._held
        for count, token in enumerate(path, len(self.ids) + 1):
            stopped = False
            if self._tokenizer is not None and token not in self._ending.end_ids:
                _, held, stopped = scan(held, self._tokenizer.token_bytes(token), self._ending.stops)
            if self._ending.reason(token, count, stopped) is not None:
                return True
        return False

    def finish(self, reason: FinishReason) -> None:
        """End it; what was held back is text after all."""
        self.finish_reason = reason
        if self._stream is not None:
            self._text += [self._stream.feed(self._held), self._stream.flush()]
        self._held = b""

    def drain(self) -> tuple[list[Token], str]:
        """Tokens and text since the last call."""
        tokens, text = self._tokens, "".join(self._text)
        self._tokens, self._text = [], []
        return tokens, text
