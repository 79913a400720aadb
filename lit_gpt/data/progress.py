"""The progress bar of a preparation, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lit_gpt.data.text_source import OnRead


@contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[tuple[OnRead, OnRead]]:
    """A bar that ends with the block.

    Args:
        what: is being done.
        total: bytes to read, None where that is not known.

    Yields:
        A function to count bytes read, and one to count bytes of text tokenized.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    percent, rate = TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), percent, rate, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        bar.add_task(what, total=total, rate="")
        task = bar.tasks[0]
        text = 0

        def on_text(count: int) -> None:
            nonlocal text
            text += count
            bar.update(task.id, rate=f"{text / 1e6 / max(task.elapsed or 0, 1e-3):.1f} MB/s")

        yield lambda count: bar.advance(task.id, count), on_text
