"""A rendered conversation, taken apart at the special tokens that the template wrote."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from lit_gpt.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class SplitRendering:
    """Texts between special tokens, and the special tokens' ids.

    Attributes:
        parts: as `Tokenizer.encode_parts` takes them.
        rendered: positions in the rendering after each of its marks, and 0.
        written: the same positions where marks have become the names that they stand for.
        changed: the texts that are not as they were written: where each begins, how it was, how it is normalised.
        normalize: made the second of the first.
    """

    parts: list[str | int]
    rendered: list[int]
    written: list[int]
    changed: list[tuple[int, str, str]]
    normalize: Callable[[str], str]

    def position(self, rendered: int, is_end: bool = False) -> int:
        """Where in the parts, one after another, a character of the rendering is.

        Args:
            rendered: its position in the rendering.
            is_end: the position ends a span. A character that two were composed to is of both their spans.
        """
        step = bisect_right(self.rendered, rendered) - 1
        written = self.written[step] + (rendered - self.rendered[step])
        moved = 0  # characters that the parts before it have become longer
        for begin, text, normalized in self.changed:
            inside = written - begin
            if inside <= 0:
                break
            if inside < len(text):
                return begin + moved + self._inside(text, normalized, inside, is_end)
            moved += len(normalized) - len(text)
        return written + moved

    def _inside(self, text: str, normalized: str, inside: int, is_end: bool) -> int:
        """The position `inside` of `text` in what it is normalised to."""
        if is_end:
            after = self.normalize(text[inside:])
            return len(normalized) - _common_prefix(after[::-1], normalized[::-1])
        return _common_prefix(self.normalize(text[:inside]), normalized)


def _common_prefix(a: str, b: str) -> int:
    """Characters with which both begin."""
    return next((index for index, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def split_rendering(text: str, marks_and_names: re.Pattern[str], tokenizer: Tokenizer) -> SplitRendering:
    """Take `text` apart.

    Args:
        text: the rendering.
        marks_and_names: matches a mark for the name of a special token that somebody has typed, with its id as the
            first group, or else the name of a special token.
        tokenizer: whose special tokens they are.
    """
    names = {number: name for name, number in tokenizer.specials.items()}
    parts: list[str | int] = []
    rendered, written = [0], [0]
    changed: list[tuple[int, str, str]] = []
    run: list[str] = []  # of text since the last special token
    run_begin = end = 0

    def end_run() -> None:
        whole = "".join(run)
        normalized = tokenizer.normalized(whole)
        if normalized != whole:
            changed.append((run_begin, whole, normalized))
        parts.extend([normalized] if normalized else [])
        run.clear()

    for match in marks_and_names.finditer(text):
        run.append(text[end : match.start()])
        at, end = written[-1] + match.start() - rendered[-1], match.end()
        name = match[0] if match[1] is None else names[int(match[1])]
        rendered.append(end)
        written.append(at + len(name))
        if match[1] is not None:
            run.append(name)
        else:
            end_run()
            parts.append(tokenizer.specials[name])
            run_begin = written[-1]
    run.append(text[end:])
    end_run()
    return SplitRendering(parts, rendered, written, changed, tokenizer.normalized)
