"""Conversations that the tests of fine-tuning share, and folders that `prepare` makes of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lit_gpt.data.index import ShardIndex
from lit_gpt.data.prepare import prepare
from lit_gpt.tokenizer.chat_template import Message, with_chat_template
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer

WORDS = ["the", "quick", "狐狸", "jumps", "🦊", "over", "<|im_end|>", "lazy\n\ndogs", "and", "naïve", "cats"]


def some_text(numbers: random.Random, most: int = 8) -> str:
    return " ".join(numbers.choice(WORDS) for _ in range(numbers.randint(1, most)))


def some_conversations(count: int, seed: int = 0, most_turns: int = 3) -> list[list[Message]]:
    """Of one to `most_turns` questions and answers; every third begins with a system message."""
    numbers = random.Random(seed)
    made = []
    for index in range(count):
        turns = [Message("system", f"Be brief. {index}")] if index % 3 == 0 else []
        for _ in range(numbers.randint(1, most_turns)):
            turns += [Message("user", some_text(numbers)), Message("assistant", some_text(numbers))]
        made.append(turns)
    return made


def as_openai(messages: Sequence[Message]) -> dict[str, Any]:
    return {"messages": [{"role": each.role, "content": each.content} for each in messages]}


def write_lines(path: Path, values: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), "utf-8")
    return path


def chat_bytes() -> Tokenizer:
    """Bytes with our chat template."""
    return with_chat_template(get_tokenizer("byte"))


def prepare_chat(folder: Path, conversations: Iterable[Sequence[Message]], **options: Any) -> ShardIndex:
    """`folder` prepared from `conversations`, in one process."""
    source = write_lines(folder.with_name(f"{folder.name}.jsonl"), map(as_openai, conversations))
    settings: dict[str, Any] = {"tokenizer": "byte", "val_split": "hash:0.2", "workers": 1, **options}
    return prepare(str(source), folder, data_format="chat", **settings)
