"""The characters of a rendered conversation that are each message's, and those that are the assistant's."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from lit_gpt.tokenizer.template_renderer import TemplateFailed


class Turns(NamedTuple):
    """Characters [start, end) of a rendering.

    Attributes:
        contents: of the text of each message, without the spaces around it where the template takes them away.
        generated: of what stands between the template's generation tags.
    """

    contents: list[tuple[int, int]]
    generated: list[tuple[int, int]]


class Marks:
    """Strings that stand for something in a rendering: no text has them in it, and a template leaves them as they are.

    They consist of a random number between characters for private use, no letters, so that upper and lower case are
    one, and do not begin or end with spaces, so that stripping leaves them whole.
    """

    def __init__(self) -> None:
        self._key = str(secrets.randbelow(10**18)).zfill(18)
        self.pattern = f"\ue000{self._key}\ue001([0-9]+)\ue002"
        self._compiled = re.compile(self.pattern)

    def __call__(self, number: int) -> str:
        """The mark of that number, at least 0."""
        return f"\ue000{self._key}\ue001{number}\ue002"

    def split(self, text: str) -> tuple[list[str], list[int]]:
        """The texts between marks, one more than there are marks, and the marks' numbers."""
        parts = self._compiled.split(text)
        return parts[0::2], [int(number) for number in parts[1::2]]


GENERATION_BEGIN, GENERATION_END, FIRST_CONTENT = 0, 1, 2
"""Numbers of marks; message i has the mark `FIRST_CONTENT` + i."""


def find_turns(text: str, marked: str, marks: Marks, contents: Sequence[str], roles: Sequence[str]) -> Turns:
    """The characters of `text` that are each message's, and those between generation tags.

    Args:
        text: the rendering.
        marked: the same with a mark for each message's text, and marks where generation tags begin and end.
        marks: which made them.
        contents: the texts that were rendered.
        roles: of each message, for errors.

    Raises:
        TemplateFailed: if the template leaves a message out, or changes one otherwise than by stripping it, as it may
            do in the middle of a conversation: what a model learns would not be what it is asked for later.
    """
    literals, numbers = marks.split(marked)
    _check_order([number - FIRST_CONTENT for number in numbers if number >= FIRST_CONTENT], roles)
    gaps = _gaps(literals, numbers)
    found: list[tuple[int, int]] = []
    generated: list[tuple[int, int]] = []
    begin: int | None = None
    position = len(literals[0]) if text.startswith(gaps[0]) else -1
    for number, literal in zip(numbers, literals[1:]):
        index = number - FIRST_CONTENT
        if number == GENERATION_BEGIN and begin is None:
            begin = position
        elif number == GENERATION_END and begin is not None:
            generated.append((begin, position))
            begin = None
        elif index >= 0:
            end = _end_of(text, position, contents[index], gaps[len(found) + 1])
            if end is None:
                raise TemplateFailed(_changed(index, roles))
            found.append((position, end))
            position = end
        else:
            raise TemplateFailed("its generation tags are one inside of the other")
        position += len(literal)
    if position != len(text):
        raise TemplateFailed(_changed(len(roles) - 1, roles))
    return Turns(found, generated)


def _check_order(found: list[int], roles: Sequence[str]) -> None:
    """Raise TemplateFailed unless each message is there once, in order."""
    if found == list(range(len(roles))):
        return
    missing = next((index for index in range(len(roles)) if index not in found), None)
    if missing is not None:
        raise TemplateFailed(f"it leaves out or changes message {missing + 1}, of the role {roles[missing]}")
    raise TemplateFailed("it writes the messages in another order, or one of them twice")


def _gaps(literals: list[str], numbers: list[int]) -> list[str]:
    """The template's own texts before, between and after the messages."""
    gaps = [literals[0]]
    for number, literal in zip(numbers, literals[1:]):
        if number >= FIRST_CONTENT:
            gaps.append(literal)
        else:
            gaps[-1] += literal
    return gaps


def _end_of(text: str, position: int, content: str, gap: str) -> int | None:
    """Where the message at `position` ends that is followed by `gap`; None if it is neither as it is nor stripped."""
    if position < 0:
        return None
    for candidate in (content, content.strip(), content.rstrip(), content.lstrip()):
        end = position + len(candidate)
        if text.startswith(candidate, position) and text.startswith(gap, end):
            return end
    return None


def _changed(index: int, roles: Sequence[str]) -> str:
    return (
        f"it renders message {index + 1}, of the role {roles[index]}, otherwise than it stands there, "
        "so that what is said and what is the template's cannot be told apart"
    )
