"""Jobs of text, and the shards that their tokens are written to: one of each split at a time, with masks if need be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

from lit_gpt.data.index import Shard
from lit_gpt.data.masks import MASK_DTYPE
from lit_gpt.data.prepare_state import PrepareState
from lit_gpt.data.shards import ShardWriter, mask_of, write_shard
from lit_gpt.data.splits import SplitText
from lit_gpt.data.text_source import OnRead
from lit_gpt.data.workers import EncodedSplit, TokenizeJob, TokenizeResult

JOB_CHARACTERS = 1 << 19  # characters that a worker gets at a time


@dataclass
class TextCount:
    """How much text the input has, counted as it is read, in every run from its beginning."""

    documents: int = 0
    text_bytes: int = 0

    def count(self, pieces: Iterable[SplitText]) -> Iterator[SplitText]:
        """Pass on the pieces."""
        for piece in pieces:
            self.documents += piece.ends
            self.text_bytes += len(piece.text) if piece.text.isascii() else len(piece.text.encode())
            yield piece


def make_jobs(pieces: Iterable[SplitText]) -> Iterator[TokenizeJob]:
    """Pieces of text in jobs of about `JOB_CHARACTERS`."""
    job: TokenizeJob = []
    size = 0
    for piece in pieces:
        job.append((piece.text, piece.ends, piece.split, piece.where))
        size += len(piece.text)
        if size >= JOB_CHARACTERS:
            yield job
            job, size = [], 0
    if job:
        yield job


def write_pair(
    results: Iterator[TokenizeResult], state: PrepareState, dtype: str, shard_tokens: int, on_text: OnRead
) -> tuple[int, list[Shard]]:
    """Write the next shard of each split; both end with the same job, so that a resumed run begins with the next.

    Args:
        results: of the jobs.
        state: of the folder; it is not changed.
        dtype: of the shards.
        shard_tokens: they end after so many tokens, of both together.
        on_text: told of bytes of text whose tokens were written.

    Returns:
        The number of jobs in them, and the shards of the splits that got any tokens.
    """
    writers: dict[str, _SplitWriter] = {}
    jobs = tokens = 0
    with ExitStack() as stack:
        for result in results:
            jobs += 1
            for split, encoded in result.items():
                if split not in writers:
                    writers[split] = _SplitWriter(stack, state, split, dtype, encoded.mask is not None)
                writers[split].add(encoded)
                tokens += encoded.tokens.size
                on_text(encoded.text_bytes)
            if tokens >= shard_tokens:
                break
    return jobs, [writer.shard for writer in writers.values()]


class _SplitWriter:
    """Writes one shard of a split, and its mask where the format has one."""

    def __init__(self, stack: ExitStack, state: PrepareState, split: str, dtype: str, masked: bool) -> None:
        number = sum(shard.split == split for shard in state.shards)
        path = state.folder / f"{split}_{number:06d}.bin"
        self._tokens = stack.enter_context(write_shard(path, dtype))
        self._mask: ShardWriter | None = None
        if masked:
            mask_path = path.with_name(mask_of(self._tokens.shard).name)
            self._mask = stack.enter_context(write_shard(mask_path, MASK_DTYPE))

    def add(self, encoded: EncodedSplit) -> None:
        """Append the tokens of a job."""
        self._tokens.add(encoded.tokens, encoded.documents, encoded.text_bytes)
        if self._mask is not None and encoded.mask is not None:
            self._mask.add(encoded.mask)

    @property
    def shard(self) -> Shard:
        """The shard, once it is written."""
        mask = "" if self._mask is None else self._mask.shard.sha256
        return replace(self._tokens.shard, mask_sha256=mask)
