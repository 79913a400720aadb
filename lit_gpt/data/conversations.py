"""Conversations from JSON lines: OpenAI's `messages`, ShareGPT's `conversations`, Alpaca's instruction and output.

A conversation goes on from here as one line of JSON, `[["user", "…"], ["assistant", "…"]]`, whatever it was read from:
the same conversation in another form falls into the same split.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lit_gpt.data.readers import Text, check_unicode, json_lines, readable
from lit_gpt.data.text_source import BadText, OnRead, TextSource
from lit_gpt.errors import brief, nearest
from lit_gpt.tokenizer.chat_template import Message

SUFFIXES = (".jsonl", ".ndjson")
"""Of files that are read, without that of a compression; and none, of an address."""

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's later name for it
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
"""The role or `from` of a message → its role here."""

_EXAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


def read_conversations(source: TextSource, on_read: OnRead = lambda count: None) -> Iterator[Text]:
    """The conversations of one source, each a document as `dump_messages` writes it.

    Raises:
        BadText: not JSON lines, or a line that is no conversation; the message names file and line.
        UserError: it cannot be read now.
    """
    check_suffix(source)
    with readable(source):
        for values, where in json_lines(source, on_read, _EXAMPLE):
            yield Text(dump_messages(to_messages(values, where)), True, where)


def check_suffix(source: TextSource) -> None:
    """Refuse a file that is no JSON lines by its name. Raises BadText."""
    if source.suffix == ".json":
        raise BadText(f"{source.name}: a file of one JSON value: make it lines with jq -c '.[]' FILE.json > FILE.jsonl")
    if source.suffix not in (*SUFFIXES, ""):
        raise BadText(
            f"{source.name}: conversations are read from JSON lines, not from {source.suffix}: write one a line to a "
            "file that ends in .jsonl (or .jsonl.gz, .jsonl.zst)"
        )


def dump_messages(messages: Sequence[Message]) -> str:
    """A conversation as one line of JSON."""
    turns = [[message.role, message.content] for message in messages]
    return json.dumps(turns, ensure_ascii=False, separators=(",", ":"))


def load_messages(line: str) -> list[Message]:
    """The inverse of `dump_messages`."""
    return [Message(role, content) for role, content in json.loads(line)]


def to_messages(values: dict[str, Any], where: str) -> list[Message]:
    """A conversation from one object of JSON, in the form that its fields show; `Any`, since nothing is known of it.

    Args:
        values: the object.
        where: its file and line, for errors.

    Raises:
        BadText: it is in none of the forms, a message has no role or an unknown one, a value has the wrong type, or
            the assistant has no turn, so that there is nothing to learn.
    """
    form = next((form for key, form in _FORMS.items() if key in values), None)
    if form is None:
        raise BadText(
            f'{where} has no field "messages" (OpenAI), "conversations" (ShareGPT) or "instruction" (Alpaca), it has '
            f"{brief(list(values))}"
        )
    messages = _system_message(values, where) + form(values, where)
    if not any(message.role == "assistant" for message in messages):
        raise BadText(f"{where} has no turn of the assistant, so there is nothing to learn: leave it out, or add one")
    return messages


def to_turns(turns: object, where: str) -> list[Message]:
    """Messages from a list of OpenAI's or ShareGPT's.

    Raises:
        BadText: as `to_messages`; an assistant's turn is not asked for.
    """
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else f"not a list but {type(turns).__name__}"
        raise BadText(f"{where}: its messages are {found}: write {_EXAMPLE}")
    return [_to_message(turn, f"{where}: message {number}") for number, turn in enumerate(turns, 1)]


def _to_message(turn: Any, where: str) -> Message:
    """One of OpenAI's messages (role, content) or of ShareGPT's (from, value)."""
    if not isinstance(turn, dict):
        raise BadText(f"{where} is not an object but {type(turn).__name__}: write {_EXAMPLE}")
    role = turn.get("role", turn.get("from"))
    if role is None:
        raise BadText(f'{where} has no role: give it "role": system, user or assistant')
    if not isinstance(role, str) or role not in ROLES:
        known = nearest(role, ROLES) if isinstance(role, str) else f"known are: {', '.join(ROLES)}"
        raise BadText(f"{where} has the unknown role {brief(role)}: {known}")
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise BadText(f"{where} has {key}, which cannot be learnt here: leave the conversation out")
    if turn.get("weight", 1) not in (1, None):
        raise BadText(f"{where} has weight {brief(turn['weight'])}; every answer counts here: leave the field out")
    content = turn["content"] if "content" in turn else turn.get("value")
    return Message(ROLES[role], _text(_joined_parts(content, where), where, "its content"))


def _joined_parts(content: Any, where: str) -> Any:
    """OpenAI's list of text parts as one text; anything else as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise BadText(f"{where}: a part of its content is no text but {brief(part)}: only text can be learnt here")
    return "".join(_text(part.get("text"), where, "a part of its content") for part in content)


def _text(value: object, where: str, what: str) -> str:
    """A value that must be text."""
    if not isinstance(value, str):
        found = "is missing" if value is None else f"is not a string but {type(value).__name__}"
        raise BadText(f"{where}: {what} {found}")
    check_unicode(value, where)
    return value


def _system_message(values: dict[str, Any], where: str) -> list[Message]:
    """The `system` that some files have beside the messages."""
    system = values.get("system")
    return [Message("system", _text(system, where, '"system"'))] if system not in (None, "") else []


def _from_alpaca(values: dict[str, Any], where: str) -> list[Message]:
    if values.get("history"):
        raise BadText(f'{where} has a "history": write the whole conversation as "messages"')
    question = _text(values["instruction"], where, '"instruction"')
    more = values.get("input")
    if more not in (None, ""):
        question += "\n\n" + _text(more, where, '"input"')
    return [Message("user", question), Message("assistant", _text(values.get("output"), where, '"output"'))]


_FORMS: dict[str, Callable[[dict[str, Any], str], list[Message]]] = {
    "messages": lambda values, where: to_turns(values["messages"], where),
    "conversations": lambda values, where: to_turns(values["conversations"], where),
    "instruction": _from_alpaca,
}
"""The field that shows a form → how it is read."""
