"""Texts that the tests of `prepare` share, and the files that it leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

CHINESE = "床前明月光，疑是地上霜。\n　　举头望明月，低头思故乡。\n"
CODE = "def f(x):\n    return x + 1  # it's 12345 🙂\n\n\nclass A:\n    pass\n"
OPTIONS = {"tokenizer": "bpe:500", "val_split": "hash:0.2", "shard_tokens": 150_000, "workers": 1}


def files(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, by its hash."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def joined(texts: Iterable[tuple[str, bool]]) -> list[str]:
    """The documents that pieces of text make; a piece is (text, whether a document ends)."""
    documents = [""]
    for text, ends in texts:
        documents[-1] += text
        documents += [""] if ends else []
    assert documents.pop() == ""
    return documents
