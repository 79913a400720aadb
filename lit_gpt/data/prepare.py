"""`lit_gpt prepare`: from text to token shards, in parallel, in bounded memory, resumed after a kill.

One process reads and cuts, workers tokenize, and the reading process writes their results in order. So what is written
depends on the input alone, however many workers there are and whenever one run ended and the next went on.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo

from lit_gpt.console.messages import note
from lit_gpt.console.options import make_parser
from lit_gpt.data.formats import MASKED_FORMATS, DataFormat, MaskedFormat, template_hash, write_generated
from lit_gpt.data.index import INDEX_VERSION, MASKED_VERSION, ShardIndex
from lit_gpt.data.inspect_shards import check, show, summary
from lit_gpt.data.merge_sample import merge_sample
from lit_gpt.data.prepare_inputs import check_format, chosen_tokenizer, sources_of
from lit_gpt.data.prepare_state import BEGIN_AGAIN, DOWNLOADS, PrepareState, locked
from lit_gpt.data.progress import progress_bar
from lit_gpt.data.readers import DOCUMENT_CHARACTERS, READERS, Text, read_texts
from lit_gpt.data.shard_folder import STATE_FILE, has_index, load_index, read_lock
from lit_gpt.data.shards import dtype_for, file_hash
from lit_gpt.data.sources import fetch
from lit_gpt.data.splits import MAX_COUNTED_DOCUMENTS, SplitRule
from lit_gpt.data.text_source import BadText, OnRead, TextSource
from lit_gpt.data.workers import Workers
from lit_gpt.data.write_shards import TextCount, make_jobs, write_pair
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer
from lit_gpt.tokenizer.train import train_tokenizer

RULES_VERSION = 1  # raise it when the same input is to give other shards
BYTES_PER_WORKER = 1 << 22  # bytes of input below which another process does not pay
RENDERING = 8  # times as long as tokenizing takes a conversation, about half a millisecond, at least
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
    data_format: DataFormat = "text",
) -> ShardIndex:
    """Tokenize texts into a folder of shards, or go on with one that was not finished; the folder's index.

    Args:
        inputs: files, folders, globs, addresses, or "stdlib"; of conversations "stdlib-chat".
        output: the folder; it gets the shards, `index.json` and `tokenizer.json`.
        tokenizer: "gpt2", "cl100k_base", …, "char", "byte", "bpe:4096", or a saved one's path.
        text_field: the field of .jsonl, .csv and .parquet that holds the text.
        val_split: "auto", "hash:0.01" (that share of the documents) or "tail:0.1" (the last tenth of the text).
        workers: processes that tokenize; None is one for each core.
        shard_tokens: a shard ends after so many tokens.
        overwrite: replace other shards in `output`.
        data_format: "text", or "chat" for conversations and "pairs" of answers, whose shards have a loss mask beside
            them. Their tokenizer is one that exists; without a chat template it gets ours.

    Raises:
        UserError: bad input, input that cannot be read now, or a full disk. After text that is wrong for good nothing
            is left behind; otherwise what was finished is kept, and the same call goes on from there.
    """
    rule, folder = SplitRule.parse(val_split), Path(output)
    if shard_tokens < 1 or (workers is not None and workers < 1):
        raise UserError(f"workers {workers} and shard_tokens {shard_tokens} must be at least 1")
    inputs, masked = [inputs] if isinstance(inputs, str) else inputs, MASKED_FORMATS.get(data_format)
    check_format(inputs, data_format, text_field)
    found = sources_of(inputs, folder / DOWNLOADS, text_field, masked)
    chosen = chosen_tokenizer(tokenizer, masked)
    options: list[str | int] = [text_field, str(rule), shard_tokens]
    if masked is not None:
        options += [data_format, "" if isinstance(chosen, str) else template_hash(chosen)]
    task = _Task(found, [source.fingerprint for source in found], chosen, rule, workers, shard_tokens, data_format)
    recipe = _recipe(task.fingerprints, chosen, options)
    if not overwrite and has_index(folder):
        with read_lock(folder):  # others may be reading it, too; without --overwrite there is nothing to write
            return _finished_index(PrepareState.open(folder, recipe, overwrite))
    with locked(folder):
        state = PrepareState.open(folder, recipe, overwrite)
        if state.finished and state.split:
            return _finished_index(state)
        with _kept_on_failure(state):
            return _write_folder(state, task)


@dataclass(frozen=True)
class _Task:
    """What is to be prepared, and how; the tokenizer is the spec of one where it is trained on the sources."""

    sources: list[TextSource]
    fingerprints: Fingerprints
    tokenizer: Tokenizer | str
    rule: SplitRule
    workers: int | None
    shard_tokens: int
    data_format: str

    @property
    def masked(self) -> MaskedFormat | None:
        """The format, if it is one with loss masks."""
        return MASKED_FORMATS.get(self.data_format)

    @property
    def size(self) -> int:
        """Bytes of the sources."""
        return sum(source.size for source in self.sources)

    def texts(self, on_read: OnRead) -> Iterator[Text]:
        """The documents of all sources, in pieces."""
        read = read_texts if self.masked is None else self.masked.read
        for source in self.sources:
            yield from read(source, on_read)

    def check_unchanged(self) -> None:
        """Refuse text that was changed while it was read: shards of both would be mixed. Raises UserError."""
        for source, known in zip(self.sources, self.fingerprints):
            if source.fingerprint != known:
                raise UserError(f"{source.name}: changed while it was read; put it back, or {BEGIN_AGAIN}")


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


def _fetch_all(task: _Task) -> list[str]:
    """Fetch, or make, what is not here yet; the hash of what each address gave."""
    downloads = [source for source in task.sources if source.url]
    wanted = [source for source in downloads if not source.path.exists()]
    for source in downloads:
        if source not in wanted:
            note(f"{source.url}: fetched before; remove {source.path} to fetch it anew")
    if wanted:
        with progress_bar("fetch", None) as (on_read, _):
            for source in wanted:
                if task.masked is not None and source.url in task.masked.generated:
                    write_generated(source, task.masked)
                else:
                    fetch(source, on_read)
    return [file_hash(source.path) for source in downloads]


# ---------------------------------------------------------------- what has to be known before the first token


def _resolve_split(task: _Task) -> tuple[SplitRule, int]:
    """The rule with "auto" resolved, and the bytes of text it reckons with (files of plain text need not be read)."""
    rule, size = task.rule, task.size
    if rule.kind == "hash":
        return rule, size
    if task.masked is None and all(s.suffix not in READERS and not s.compression for s in task.sources):
        documents = sum(1 + source.size // DOCUMENT_CHARACTERS for source in task.sources)
        return rule.resolve(documents, size), size
    documents = length = 0
    with progress_bar("measure", size) as (on_read, _):
        for text, ends, _ in task.texts(on_read):
            documents += ends
            length += len(text.encode())
            if rule.kind == "auto" and documents >= MAX_COUNTED_DOCUMENTS:
                return rule.resolve(documents, size), size
    return rule.resolve(max(documents, 1), length), length


def _tokenizer(task: _Task, state: PrepareState) -> Tokenizer:
    """The tokenizer, which is in the folder afterwards; one that an earlier run trained is read from there.

    Raises:
        UserError: finished shards were made with another.
    """
    file, chosen = state.folder / TOKENIZER_FILE, task.tokenizer
    if isinstance(chosen, str) and state.tokenizer and file.exists():
        found = Tokenizer.load(file)
        state.use_tokenizer(found.hash)
        return found
    if isinstance(chosen, str):
        with progress_bar(f"train {chosen}", task.size) as (on_read, _):
            every = (text for text, *_ in task.texts(on_read))
            chosen = train_tokenizer(chosen, every if chosen == "char" else merge_sample(task.sources, on_read))
    chosen.save(file)
    state.use_tokenizer(chosen.hash)
    return chosen


# ---------------------------------------------------------------- the work


def _write_folder(state: PrepareState, task: _Task) -> ShardIndex:
    """Everything that is missing in the folder, in this order: downloads, rule, tokenizer, shards, index."""
    state.use_downloads(_fetch_all(task))
    if state.split is None:
        state.start(*_resolve_split(task))
    tokenizer = _tokenizer(task, state)
    read = _write_shards(state, task, tokenizer)
    return _finish(state, task, tokenizer, read)


def _write_shards(state: PrepareState, task: _Task, tokenizer: Tokenizer) -> TextCount:
    """Write the shards that are not there yet, a train and a validation shard at a time; how much was read.

    Raises:
        UserError: a source has changed, which is asked before each pair counts as finished.
    """
    assert state.split
    read, dtype = TextCount(), dtype_for(tokenizer.n_vocab)
    size = task.size * (1 if task.masked is None else RENDERING)
    count = min(task.workers or len(os.sched_getaffinity(0)), 1 + size // BYTES_PER_WORKER)
    with (
        progress_bar("tokenize", task.size) as (on_read, on_text),
        Workers(tokenizer, dtype, count, task.data_format) as pool,
    ):
        pieces = read.count(state.split.assign(task.texts(on_read), state.size, cuts=task.masked is None))
        # What finished shards hold is read again, at a hundred times the speed of tokenizing, but not tokenized.
        results = pool.map(islice(make_jobs(pieces), state.jobs, None))
        while True:
            jobs, shards = write_pair(results, state, dtype, task.shard_tokens, on_text)
            task.check_unchanged()
            if not jobs:
                return read
            state.add(jobs, shards)


def _finish(state: PrepareState, task: _Task, tokenizer: Tokenizer, read: TextCount) -> ShardIndex:
    """Write the index, which makes the folder complete.

    Raises:
        UserError: the shards do not hold what was read.
        BadText: nothing to train on.
    """
    shards = sorted(state.shards, key=lambda shard: shard.name)
    held = TextCount(sum(shard.documents for shard in shards), sum(shard.text_bytes for shard in shards))
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
        eot_position=None if tokenizer.eot_id is None or task.masked else "after",
        format_version=MASKED_VERSION if task.masked else INDEX_VERSION,
        format=task.data_format,
        template_sha256=template_hash(tokenizer) if task.masked else None,
    )
    index.save(state.folder)
    state.remove_downloads()
    return index


# ---------------------------------------------------------------- the program


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
    help = "text, chat for conversations or pairs of answers: JSON lines, with a loss mask beside the shards"
    add("--format", type=DataFormat, default="text", help=help)
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
        index = prepare(args.inputs, args.output, args.tokenizer or "gpt2", data_format=args.format, **chosen)
        print(summary(index))
