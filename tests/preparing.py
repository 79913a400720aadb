"""Texts that the tests of `prepare` share, and the files that it leaves."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lit_gpt.data import readers, write_shards

CHINESE = "床前明月光，疑是地上霜。\n　　举头望明月，低头思故乡。\n"
CODE = "def f(x):\n    return x + 1  # it's 12345 🙂\n\n\nclass A:\n    pass\n"
OPTIONS = {"tokenizer": "bpe:500", "val_split": "hash:0.2", "shard_tokens": 9000, "workers": 1}


def cut_small(set_attribute: Callable[[object, str, int], None]) -> None:
    """Pieces and jobs of a sixteenth of their size: a corpus of a sixteenth gives as many shards, far sooner."""
    set_attribute(readers, "PIECE_CHARACTERS", 1 << 14)
    set_attribute(write_shards, "JOB_CHARACTERS", 1 << 15)


def files(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too but locks, by its hash."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def joined(texts: Iterable[Sequence[Any]]) -> list[str]:
    """The documents that pieces of text make; a piece is (text, whether a document ends, …)."""
    documents = [""]
    for text, ends, *_ in texts:
        documents[-1] += text
        documents += [""] if ends else []
    assert documents.pop() == ""
    return documents


def in_a_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its status as `os.waitpid` gives it."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def die_at(call: int, before: bool) -> None:
    """From now on the `call`-th file that gets its final name is the last deed, or the one before it."""
    replace, calls = os.replace, iter(range(1, 1000))

    def fatal(*names: object) -> None:
        last = next(calls) == call
        if last and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)  # type: ignore[arg-type]
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = fatal  # type: ignore[assignment]
