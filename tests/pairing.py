"""Pairs of answers that the tests of preference tuning share, and folders that `prepare` makes of them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chatting import write_lines

from lit_gpt.data.index import ShardIndex
from lit_gpt.data.prepare import prepare


def some_pairs(count: int, seed: int = 0, most: int = 12) -> list[dict[str, str]]:
    """Pairs as text: the preferred answer has "y" alone, the other one "n" alone."""
    numbers = random.Random(seed)
    return [
        {
            "prompt": f"{index} " + "?" * numbers.randint(1, most),
            "chosen": "y" * numbers.randint(1, most),
            "rejected": "n" * numbers.randint(1, most),
        }
        for index in range(count)
    ]


def prepare_pairs(folder: Path, pairs: Iterable[object], **options: Any) -> ShardIndex:
    """`folder` prepared from `pairs`, in one process."""
    source = write_lines(folder.with_name(f"{folder.name}.jsonl"), pairs)
    settings: dict[str, Any] = {"tokenizer": "byte", "val_split": "hash:0.2", "workers": 1, **options}
    return prepare(str(source), folder, data_format="pairs", **settings)
