"""Pairs of answers to one prompt, of which the first is preferred, from JSON lines in the forms of TRL's datasets.

A pair goes on from here as one line of JSON, `[prompt, chosen, rejected]`, each a list like `[["user", "…"]]`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import takewhile
from typing import Any, NamedTuple

from lit_gpt.data.conversations import check_suffix, to_turns
from lit_gpt.data.readers import Text, check_unicode, json_lines, readable
from lit_gpt.data.text_source import BadText, OnRead, TextSource
from lit_gpt.tokenizer.chat_template import Message

_EXAMPLE = '{"prompt": "…", "chosen": "…", "rejected": "…"}'


class PreferencePair(NamedTuple):
    """A prompt, and two ways in which the conversation may go on: the first is preferred."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def read_pairs(source: TextSource, on_read: OnRead = lambda count: None) -> Iterator[Text]:
    """The pairs of one source, each a document as `dump_pair` writes it.

    Raises:
        BadText: not JSON lines, or a line that is no pair; the message names file and line.
        UserError: it cannot be read now.
    """
    check_suffix(source)
    with readable(source):
        for values, where in json_lines(source, on_read, _EXAMPLE):
            yield Text(dump_pair(to_pair(values, where)), True, where)


def dump_pair(pair: PreferencePair) -> str:
    """A pair as one line of JSON."""
    turns = [[[message.role, message.content] for message in messages] for messages in pair]
    return json.dumps(turns, ensure_ascii=False, separators=(",", ":"))


def load_pair(line: str) -> PreferencePair:
    """The inverse of `dump_pair`."""
    return PreferencePair(*([Message(*turn) for turn in messages] for messages in json.loads(line)))


def to_pair(values: dict[str, Any], where: str) -> PreferencePair:
    """A pair from one object of JSON; `Any`, since nothing is known of it.

    Text is one turn of the user and one of the assistant. Lists of messages may begin with the prompt, or with more of
    it: what both have in common belongs to it.

    Args:
        values: the object.
        where: its file and line, for errors.

    Raises:
        BadText: an answer or the prompt is missing, or is in no form that is known; or neither answer is preferred.
    """
    chosen, rejected = (_messages(values, name, "assistant", where) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadText(f"{where}: chosen and rejected are equal, so that neither is preferred: leave the pair out")
    prompt = [] if values.get("prompt") is None else _messages(values, "prompt", "user", where)
    common = [message for message, _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected))]
    chosen, rejected = chosen[len(common) :], rejected[len(common) :]
    prompt = common if common[: len(prompt)] == prompt else prompt + common
    if not prompt:
        raise BadText(
            f'{where} has no "prompt", and chosen and rejected do not begin with the same messages: write {_EXAMPLE}'
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0].role != "assistant":
            found = f"goes on with the role {answer[0].role}" if answer else "has nothing"
            raise BadText(f"{where}: {name} {found} after the prompt: an answer is a turn of the assistant")
    return PreferencePair(prompt, chosen, rejected)


def _messages(values: dict[str, Any], name: str, role: str, where: str) -> list[Message]:
    """The messages in a field, or its text as one of `role`."""
    value = values.get(name)
    if value is None:
        raise BadText(f'{where} has no "{name}": write {_EXAMPLE}')
    if not isinstance(value, str):
        return to_turns(value, f"{where}: {name}")
    check_unicode(value, f"{where}: {name}")
    if not value.strip():
        raise BadText(f"{where}: {name} is empty: write {_EXAMPLE}")
    return [Message(role, value)]
