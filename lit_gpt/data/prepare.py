"""`lit_gpt prepare`: from text to token shards, in parallel, in bounded memory, resumed after a kill.

One process reads and cuts, workers tokenize, and the reading process writes their results in order. So what is written
depends on the input alone, however many workers there are and whenever one run ended and the next went on.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo

from lit_gpt.console import note
from lit_gpt.data.index import Shard, ShardIndex
from lit_gpt.data.inspect_shards import check, show, summary
from lit_gpt.data.merge_sample import merge_sample
from lit_gpt.data.prepare_state import BEGIN_AGAIN, DOWNLOADS, PrepareState, locked
from lit_gpt.data.readers import DOCUMENT_CHARACTERS, READERS, Text, read_texts
from lit_gpt.data.shard_folder import STATE_FILE, has_index, load_index, read_lock
from lit_gpt.data.shards import ShardWriter, dtype_for, file_hash, write_shard
from lit_gpt.data.sources import fetch, find_sources
from lit_gpt.data.splits import MAX_COUNTED_DOCUMENTS, SplitRule, SplitText
from lit_gpt.data.text_source import BadText, OnRead, TextSource
from lit_gpt.data.workers import TokenizeJob, TokenizeResult, Workers
from lit_gpt.errors import UserError
from lit_gpt.options import make_parser
from lit_gpt.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer, is_trained
from lit_gpt.tokenizer.train import train_tokenizer

RULES_VERSION = 1  # raise it when the same input is to give other shards
JOB_CHARACTERS = 1 << 19  # characters that a worker gets at a time
BYTES_PER_WORKER = 1 << 22  # bytes of input below which another process does not pay
Fingerprints = list[list[str | int]]  # of the sources
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare(
    inputs: str | Sequence[str],
    output: str | os.PathLike[str],
    tokenizer: str = "gpt2",
    text_field: str = "text",
    val_split: str = "auto",
    workers: int | None = None,
    shard_tokens: int = 100_000_000,
    overwrite: bool = False,
) -> ShardIndex:
    """Tokenize texts into a folder of shards, or go on with one that was not finished; the folder's index.

    Args:
        inputs: files, folders, globs, addresses, or "stdlib".
        output: the folder; it gets the shards, `index.json` and `tokenizer.json`.
        tokenizer: "gpt2", "cl100k_base", …, "char", "byte", "bpe:4096", or a saved one's path.
        text_field: the field of .jsonl, .csv and .parquet that holds the text.
        val_split: "auto", "hash:0.01" (that share of the documents) or "tail:0.1" (the last tenth of the text).
        workers: processes that tokenize; None is one for each core.
        shard_tokens: a shard ends after so many tokens.
        overwrite: replace other shards in `output`.

    Raises:
        UserError: bad input, input that cannot be read now, or a full disk. After text that is wrong for good nothing
            is left behind; otherwise what was finished is kept, and the same call goes on from there.
    """
    rule, folder = SplitRule.parse(val_split), Path(output)
    if shard_tokens < 1 or (workers is not None and workers < 1):
        raise UserError(f"workers {workers} and shard_tokens {shard_tokens} must be at least 1")
    sources = find_sources([inputs] if isinstance(inputs, str) else inputs, folder / DOWNLOADS, text_field)
    chosen = tokenizer if is_trained(tokenizer) else get_tokenizer(tokenizer)
    fingerprints = [source.fingerprint for source in sources]
    recipe = _recipe(fingerprints, chosen, [text_field, str(rule), shard_tokens])
    if not overwrite and has_index(folder):
        with read_lock(folder):  # others may be reading it, too; without --overwrite there is nothing to write
            return _finished_index(PrepareState.open(folder, recipe, overwrite))
    with locked(folder):
        state = PrepareState.open(folder, recipe, overwrite)
        if state.finished and state.split:
            return _finished_index(state)
        with _kept_on_failure(state):
            check = partial(_check_unchanged, sources, fingerprints)
            return _write_folder(state, rule, sources, chosen, workers, shard_tokens, check)


def _finished_index(state: PrepareState) -> ShardIndex:
    """The index of a folder that holds just what is wanted already."""
    note(f"{state.folder} already holds exactly this")
    return load_index(state.folder)


def _recipe(sources: Fingerprints, tokenizer: Tokenizer | str, options: list[str | int]) -> dict[str, object]:
    """All that decides what the shards contain; an unfinished folder is gone on with if its recipe is the same."""
    known = tokenizer if isinstance(tokenizer, str) else tokenizer.hash
    return {"rules": RULES_VERSION, "sources": sources, "tokenizer": known, "options": options}


@contextmanager
def _kept_on_failure(state: PrepareState) -> Iterator[None]:
    """Text that is wrong for good leaves nothing behind; after anything else the finished shards are kept."""
    try:
        yield
    except BadText:
        state.abandon(keep_downloads=False)
        raise
    except UserError as error:  # a file or a server may come back, a package be installed
        if not state.shards:
            state.abandon(keep_downloads=True)
            raise
        raise UserError(f"{error} ({len(state.shards)} finished shards are kept)") from error
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        if not state.shards:
            state.abandon(keep_downloads=False)
        kept = f"its {len(state.shards)} finished shards are kept" if state.shards else "nothing was kept"
        raise UserError(
            f"{state.folder}: the disk is full ({error.strerror}); {kept}; free some space and run the same again"
        ) from error


def _fetch_all(sources: list[TextSource]) -> list[str]:
    """Fetch what is not here yet; the hash of what each address gave."""
    downloads = [source for source in sources if source.url]
    wanted = [source for source in downloads if not source.path.exists()]
    for source in downloads:
        if source not in wanted:
            note(f"{source.url}: fetched before; remove {source.path} to fetch it anew")
    if wanted:
        with _progress("fetch", None) as (on_read, _):
            for source in wanted:
                fetch(source, on_read)
    return [file_hash(source.path) for source in downloads]


# ---------------------------------------------------------------- what has to be known before the first token


def _resolve_split(rule: SplitRule, sources: list[TextSource]) -> tuple[SplitRule, int]:
    """The rule with "auto" resolved, and the bytes of text it reckons with (files of plain text need not be read)."""
    size = sum(source.size for source in sources)
    if rule.kind == "hash":
        return rule, size
    if all(source.suffix not in READERS and not source.compression for source in sources):
        documents = sum(1 + source.size // DOCUMENT_CHARACTERS for source in sources)
        return rule.resolve(documents, size), size
    documents = length = 0
    with _progress("measure", size) as (on_read, _):
        for text, ends in _texts(sources, on_read):
            documents += ends
            length += len(text.encode())
            if rule.kind == "auto" and documents >= MAX_COUNTED_DOCUMENTS:
                return rule.resolve(documents, size), size
    return rule.resolve(max(documents, 1), length), length


def _tokenizer(chosen: Tokenizer | str, sources: list[TextSource], state: PrepareState) -> Tokenizer:
    """The tokenizer, which is in the folder afterwards; one that an earlier run trained is read from there.

    Args:
        chosen: the tokenizer, or the spec of one that is trained on the sources.
        sources: the texts.
        state: of the output folder.

    Raises:
        UserError: finished shards were made with another.
    """
    file = state.folder / TOKENIZER_FILE
    if isinstance(chosen, str) and state.tokenizer and file.exists():
        found = Tokenizer.load(file)
        state.use_tokenizer(found.hash)
        return found
    if isinstance(chosen, str):
        with _progress(f"train {chosen}", sum(source.size for source in sources)) as (on_read, _):
            every = (text for text, _ in _texts(sources, on_read))
            chosen = train_tokenizer(chosen, every if chosen == "char" else merge_sample(sources, on_read))
    chosen.save(file)
    state.use_tokenizer(chosen.hash)
    return chosen


def _texts(sources: list[TextSource], on_read: OnRead) -> Iterator[Text]:
    for source in sources:
        yield from read_texts(source, on_read)


# ---------------------------------------------------------------- the work


def _write_folder(
    state: PrepareState,
    rule: SplitRule,
    sources: list[TextSource],
    chosen: Tokenizer | str,
    workers: int | None,
    shard_tokens: int,
    check_unchanged: Callable[[], None],
) -> ShardIndex:
    """Everything that is missing in the folder, in this order: downloads, rule, tokenizer, shards, index."""
    state.use_downloads(_fetch_all(sources))
    if state.split is None:
        state.start(*_resolve_split(rule, sources))
    tokenizer = _tokenizer(chosen, sources, state)
    read = _write_shards(state, tokenizer, sources, workers, shard_tokens, check_unchanged)
    return _finish(state, tokenizer, read)


def _check_unchanged(sources: list[TextSource], fingerprints: Fingerprints) -> None:
    """Refuse text that was changed while it was read: shards of both would be mixed. Raises UserError."""
    for source, known in zip(sources, fingerprints):
        if source.fingerprint != known:
            raise UserError(f"{source.name}: changed while it was read; put it back, or {BEGIN_AGAIN}")


@dataclass
class _Read:
    """How much text the input has, counted as it is read, in every run from its beginning."""

    documents: int = 0
    text_bytes: int = 0

    def count(self, pieces: Iterable[SplitText]) -> Iterator[SplitText]:
        """Pass on the pieces."""
        for piece in pieces:
            self.documents += piece.ends
            self.text_bytes += len(piece.text) if piece.text.isascii() else len(piece.text.encode())
            yield piece


def _write_shards(
    state: PrepareState,
    tokenizer: Tokenizer,
    sources: list[TextSource],
    workers: int | None,
    shard_tokens: int,
    check_unchanged: Callable[[], None],
) -> _Read:
    """Write the shards that are not there yet, a train and a validation shard at a time; how much was read.

    Raises:
        UserError: from `check_unchanged`, which is asked before each pair counts as finished.
    """
    assert state.split
    size, read = sum(source.size for source in sources), _Read()
    dtype = dtype_for(tokenizer.n_vocab)
    count = min(workers or len(os.sched_getaffinity(0)), 1 + size // BYTES_PER_WORKER)
    with _progress("tokenize", size) as (on_read, on_text), Workers(tokenizer, dtype, count) as pool:
        pieces = read.count(state.split.assign(_texts(sources, on_read), state.size))
        # What finished shards hold is read again, at a hundred times the speed of tokenizing, but not tokenized.
        results = pool.map(islice(_jobs(pieces), state.jobs, None))
        while True:
            jobs, shards = _write_pair(results, state, dtype, shard_tokens, on_text)
            check_unchanged()
            if not jobs:
                return read
            state.add(jobs, shards)


def _jobs(pieces: Iterable[SplitText]) -> Iterator[TokenizeJob]:
    job: TokenizeJob = []
    size = 0
    for piece in pieces:
        job.append((piece.text, piece.ends, piece.split))
        size += len(piece.text)
        if size >= JOB_CHARACTERS:
            yield job
            job, size = [], 0
    if job:
        yield job


def _write_pair(
    results: Iterator[TokenizeResult], state: PrepareState, dtype: str, shard_tokens: int, on_text: OnRead
) -> tuple[int, list[Shard]]:
    """Write the next shard of each split; both end with the same job, so that a resumed run begins with the next.

    Returns:
        The number of jobs in them, and the shards of the splits that got any tokens.
    """
    writers: dict[str, ShardWriter] = {}
    jobs = tokens = 0
    with ExitStack() as stack:
        for result in results:
            jobs += 1
            for split, encoded in result.items():
                if split not in writers:
                    number = sum(shard.split == split for shard in state.shards)
                    path = state.folder / f"{split}_{number:06d}.bin"
                    writers[split] = stack.enter_context(write_shard(path, dtype))
                writers[split].add(encoded.tokens, encoded.documents, encoded.text_bytes)
                tokens += encoded.tokens.size
                on_text(encoded.text_bytes)
            if tokens >= shard_tokens:
                break
    return jobs, [writer.shard for writer in writers.values()]


def _finish(state: PrepareState, tokenizer: Tokenizer, read: _Read) -> ShardIndex:
    """Write the index, which makes the folder complete.

    Raises:
        UserError: the shards do not hold what was read.
        BadText: nothing to train on.
    """
    shards = sorted(state.shards, key=lambda shard: shard.name)
    held = _Read(sum(shard.documents for shard in shards), sum(shard.text_bytes for shard in shards))
    if held != read:
        raise UserError(
            f"{state.folder}: its shards hold {held.documents} documents of {held.text_bytes} bytes, the input has "
            f"{read.documents} of {read.text_bytes}: {STATE_FILE} is wrong; {BEGIN_AGAIN}"
        )
    if not any(shard.split == "train" for shard in shards):
        why = "all of the text fell into validation" if shards else "the input holds no text"
        raise BadText(f"nothing to train on: {why}; give more text, or a smaller --val_split such as tail:0.1")
    if not any(shard.split == "val" for shard in shards):
        note(f"no document fell into validation by {state.split}; --val_split tail:0.1 always holds some text out")
    index = ShardIndex(
        dtype=dtype_for(tokenizer.n_vocab),
        shards=tuple(shards),
        tokenizer=tokenizer.name,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.n_vocab,
        eot_id=tokenizer.eot_id,
        eot_position=None if tokenizer.eot_id is None else "after",
    )
    index.save(state.folder)
    state.remove_downloads()
    return index


# ---------------------------------------------------------------- progress, and the program


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[tuple[OnRead, OnRead]]:
    """A bar on stderr; gives a function to count bytes read and one to count bytes of text tokenized."""
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


def _parser() -> Any:
    parser = make_parser("prepare", "Turn text into token shards.")
    add = parser.add_argument
    add("inputs", nargs="*", type=str, metavar="INPUT", help='files, folders, globs, addresses, or "stdlib"')
    add("--output", type=str | None, metavar="DIR", help="the folder for the shards")
    add(
        "--tokenizer",
        type=str | None,
        help="gpt2 (default), cl100k_base, …, char, byte, bpe:4096, or a saved one's path",
    )
    add("--text_field", type=str, default="text", help="the field of .jsonl, .csv and .parquet that holds the text")
    add("--val_split", type=str, default="auto", help="auto, hash:0.01 (of documents) or tail:0.1 (of the text)")
    add("--workers", type=int | None, help="processes that tokenize (default: one for each core)")
    add("--shard_tokens", type=int, default=100_000_000, help="a shard ends after so many tokens")
    add("--overwrite", type=bool, action=ActionYesNo, default=False, help="replace other shards in the output folder")
    add("--check", type=str | None, metavar="DIR", help="verify a folder of shards instead")
    add("--show", type=str | None, metavar="DIR", help="print the first documents of a folder of shards instead")
    return parser


def main(argv: list[str]) -> None:
    """`lit_gpt prepare`."""
    args = _parser().parse_args(argv)
    if args.check:
        index = check(args.check, args.tokenizer)
        print(f"{args.check}: {len(index.shards)} shards are all right\n{summary(index)}")
    elif args.show:
        for line in show(args.show, args.tokenizer):
            print(line)
    elif not args.inputs or not args.output:
        raise UserError("name what to prepare and where to, such as: lit_gpt prepare my_texts/ --output data/mine")
    else:
        options = ("text_field", "val_split", "workers", "shard_tokens", "overwrite")
        chosen = {name: args[name] for name in options}
        print(summary(prepare(args.inputs, args.output, args.tokenizer or "gpt2", **chosen)))
