"""Conversations in three forms of JSON lines, and one line of error for everything that is none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from chatting import as_openai, some_conversations, write_lines
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.data.conversations import dump_messages, load_messages, read_conversations, to_messages
from lit_gpt.data.text_source import BadText, TextSource
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.chat_template import Message

QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def read(path: Path) -> list[list[Message]]:
    texts = list(read_conversations(TextSource(path, path.name)))
    assert all(text.ends and text.where.startswith(f"{path.name}: line ") for text in texts)
    return [load_messages(text.text) for text in texts]


@pytest.mark.slow
@given(st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), st.text(max_size=20)), min_size=1))
def test_a_conversation_is_one_line_and_comes_back(messages: list[Message]) -> None:
    line = dump_messages(messages)
    assert "\n" not in line
    assert load_messages(line) == messages


def test_the_three_forms_are_one() -> None:
    wanted = [Message("system", "s"), Message("user", "q"), Message("assistant", "a")]
    forms: list[dict[str, Any]] = [
        {"messages": [{"role": "system", "content": "s"}, QUESTION, ANSWER], "id": 7},
        {"messages": [{"role": "developer", "content": "s"}, QUESTION, {**ANSWER, "weight": 1}]},
        {"messages": [{"role": "system", "content": [{"type": "text", "text": "s"}]}, QUESTION, ANSWER]},
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        {"system": "s", "conversations": [QUESTION, {"from": "chatgpt", "value": "a"}]},
        {"system": "s", "instruction": "q", "input": "", "output": "a"},
        {"system": "s", "instruction": "q", "output": "a"},
    ]
    for values in forms:
        assert to_messages(values, "x") == wanted, values
    more = to_messages({"instruction": "Add.", "input": "1 2", "output": "3"}, "x")
    assert more == [Message("user", "Add.\n\n1 2"), Message("assistant", "3")]


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "is not JSON"),
    "nested deeply": ('{"messages": ' + "[" * 100_000, "is not JSON"),
    "a huge number": ('{"messages": ' + "9" * 5000 + "}", "is not JSON"),
    "no object": ([1], "is not an object such as"),
    "no form": ({"text": "a", "title": "b"}, r'has no field "messages" \(OpenAI\).*\[\'text\', \'title\'\]'),
    "no list": ({"messages": "q"}, "its messages are not a list but str"),
    "empty": ({"messages": []}, "its messages are an empty list"),
    "a text for a message": ({"messages": ["q"]}, "message 1 is not an object but str"),
    "no role": ({"messages": [QUESTION, {"content": "a"}]}, r'message 2 has no role: give it "role"'),
    "an unknown role": (
        {"messages": [{"role": "asistant", "content": "a"}]},
        'role .asistant.: did you mean "assistant"',
    ),
    "a tool's": ({"messages": [{"role": "zzz\n", "content": "a"}]}, r"unknown role .zzz\\n.: known are: system"),
    "a role that is a list": ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown role .*known are"),
    "no content": ({"messages": [QUESTION, {"role": "assistant"}]}, "message 2: its content is missing"),
    "null": ({"messages": [{"role": "user", "content": None}]}, "message 1: its content is missing"),
    "a number": ({"messages": [{"role": "user", "content": 5}]}, "its content is not a string but int"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "a part of its content is no text",
    ),
    "a part without text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content is missing"),
    "a tool call": ({"messages": [QUESTION, {**ANSWER, "tool_calls": [{}]}]}, "message 2 has tool_calls"),
    "a weight": ({"messages": [QUESTION, {**ANSWER, "weight": 0}]}, "message 2 has weight 0"),
    "nothing to learn": ({"messages": [QUESTION]}, "no turn of the assistant, so there is nothing to learn"),
    "ShareGPT's without a value": ({"conversations": [{"from": "human"}]}, "message 1: its content is missing"),
    "Alpaca's without an output": ({"instruction": "q"}, '"output" is missing'),
    "Alpaca's with a list": ({"instruction": ["q"], "output": "a"}, '"instruction" is not a string but list'),
    "Alpaca's history": ({"instruction": "q", "output": "a", "history": [["a", "b"]]}, 'has a "history"'),
    "a system that is no text": ({"system": 5, "messages": [QUESTION, ANSWER]}, '"system" is not a string but int'),
    "half of a pair": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "a lone surrogate at character 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_conversation_is_one_line_with_file_and_line(name: str, tmp_path: Path) -> None:
    bad, says = BAD[name]
    path = write_lines(tmp_path / "c.jsonl", [as_openai(some_conversations(1)[0])])
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + (bad if isinstance(bad, str) else json.dumps(bad)) + "\n")
    with pytest.raises(BadText, match=says) as refused:
        read(path)
    message = str(refused.value)
    assert message.startswith("c.jsonl: line 3")
    assert "\n" not in message and len(message) < 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.floats() | st.text("a \n你\ud800", max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["messages", "conversations", "role", "from", "content", "value", "instruction", "output"]),
            st.sampled_from(["user", "gpt"]) | inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(["messages", "conversations", "instruction", "output", "system"]), JSON))
def test_any_value_is_a_conversation_or_one_line(values: dict[str, Any]) -> None:
    try:
        messages = to_messages(values, "c.jsonl: line 1")
    except BadText as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return
    assert any(message.role == "assistant" for message in messages)
    assert load_messages(dump_messages(messages)) == messages


def test_compressed_and_empty_lines(tmp_path: Path) -> None:
    wanted = some_conversations(5)
    lines = "\n\n".join(json.dumps(as_openai(messages)) for messages in wanted).encode()
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    assert read(tmp_path / "c.jsonl.gz") == wanted
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "c.ndjson.zst").write_bytes(zstandard.compress(lines))
    assert read(tmp_path / "c.ndjson.zst") == wanted
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-20])
    with pytest.raises(BadText, match="damaged or truncated gzip"):
        read(tmp_path / "cut.jsonl.gz")


@pytest.mark.parametrize(("name", "says"), [("c.json", "jq -c"), ("c.csv", "not from .csv"), ("c.txt.gz", "from .txt")])
def test_files_that_are_no_json_lines(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).write_text("[]")
    with pytest.raises(BadText, match=says):
        read(tmp_path / name)
    with pytest.raises(UserError, match="vanished"):
        read(tmp_path / "gone.jsonl")
