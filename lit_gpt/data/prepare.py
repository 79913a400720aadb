"""`lit_gpt prepare`: from text to token shards, in parallel, in bounded memory, resumed after a kill.

One process reads and cuts, workers tokenize, and the reading process writes their results in order. So what is written
depends on the input alone, however many workers there are and whenever one run ended and the next went on.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo

from lit_gpt.console import note
from lit_gpt.data.index import Shard, ShardIndex
from lit_gpt.data.inspect_shards import check, show
from lit_gpt.data.merge_sample import merge_sample
from lit_gpt.data.prepare_state import DOWNLOADS, PrepareState, locked
from lit_gpt.data.readers import DOCUMENT_CHARACTERS, READERS, Text, read_texts
from lit_gpt.data.shard_folder import load_index
from lit_gpt.data.shards import ShardWriter, dtype_for, write_shard
from lit_gpt.data.sources import fetch, find_sources
from lit_gpt.data.splits import MAX_COUNTED_DOCUMENTS, SplitRule, SplitText
from lit_gpt.data.text_source import OnRead, TextSource
from lit_gpt.data.workers import TokenizeJob, TokenizeResult, Workers
from lit_gpt.errors import UserError
from lit_gpt.options import make_parser
from lit_gpt.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer, is_trained
from lit_gpt.tokenizer.train import train_tokenizer

RULES_VERSION = 1  # raise it when the same input is to give other shards
JOB_CHARACTERS = 1 << 19  # characters that a worker gets at a time
BYTES_PER_WORKER = 1 << 22  # bytes of input below which another process does not pay
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
        UserError: bad input, or a full disk. After bad input nothing is left behind; what was finished when the disk
            was full is kept, and the same call goes on from there.
    """
    rule, folder = SplitRule.parse(val_split), Path(output)
    if shard_tokens < 1 or (workers is not None and workers < 1):
        raise UserError(f"workers {workers} and shard_tokens {shard_tokens} must be at least 1")
    sources = find_sources([inputs] if isinstance(inputs, str) else inputs, folder / DOWNLOADS, text_field)
    chosen = tokenizer if is_trained(tokenizer) else get_tokenizer(tokenizer)
    recipe = _recipe(sources, chosen, [text_field, str(rule), shard_tokens])
    with locked(folder):
        state = PrepareState.open(folder, recipe, overwrite)
        if state.finished and state.split:
            note(f"{folder} already holds exactly this")
            return load_index(folder)
        with _cleared_on_failure(state):
            return _write_folder(state, rule, sources, chosen, workers, shard_tokens)


def _recipe(sources: list[TextSource], tokenizer: Tokenizer | str, options: list[str | int]) -> dict[str, object]:
    """All that decides what the shards contain; an unfinished folder is gone on with if its recipe is the same."""
    fingerprints = [source.fingerprint for source in sources]
    known = tokenizer if isinstance(tokenizer, str) else tokenizer.hash
    return {"rules": RULES_VERSION, "sources": fingerprints, "tokenizer": known, "options": options}


@contextmanager
def _cleared_on_failure(state: PrepareState) -> Iterator[None]:
    """Bad input leaves nothing behind; a full disk leaves what is whole."""
    try:
        yield
    except UserError:
        state.abandon()
        raise
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        if not state.shards:
            state.abandon()
        kept = f"its {len(state.shards)} finished shards are kept" if state.shards else "nothing was kept"
        raise UserError(
            f"{state.folder}: the disk is full ({error.strerror}); {kept}; free some space and run the same again"
        ) from error


def _fetch_all(sources: list[TextSource]) -> None:
    wanted = [source for source in sources if source.url and not source.path.exists()]
    if wanted:
        with _progress("fetch", None) as (on_read, _):
            for source in wanted:
                fetch(source, on_read)


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


def _tokenizer(chosen: Tokenizer | str, sources: list[TextSource], folder: Path) -> Tokenizer:
    """The tokenizer, which is in the folder afterwards; one that an earlier run trained is read from there.

    Args:
        chosen: the tokenizer, or the spec of one that is trained on the sources.
        sources: the texts.
        folder: the output folder.
    """
    if isinstance(chosen, str) and (folder / TOKENIZER_FILE).exists():
        return Tokenizer.load(folder)
    if isinstance(chosen, str):
        with _progress(f"train {chosen}", sum(source.size for source in sources)) as (on_read, _):
            every = (text for text, _ in _texts(sources, on_read))
            chosen = train_tokenizer(chosen, every if chosen == "char" else merge_sample(sources, on_read))
    chosen.save(folder / TOKENIZER_FILE)
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
) -> ShardIndex:
    """Everything that is missing in the folder, in this order: downloads, rule, tokenizer, shards, index."""
    _fetch_all(sources)
    if state.split is None:
        state.start(*_resolve_split(rule, sources))
    tokenizer = _tokenizer(chosen, sources, state.folder)
    _write_shards(state, tokenizer, sources, workers, shard_tokens)
    return _finish(state, tokenizer)


def _write_shards(
    state: PrepareState, tokenizer: Tokenizer, sources: list[TextSource], workers: int | None, shard_tokens: int
) -> None:
    """Write the shards that are not there yet, a train and a validation shard at a time."""
    assert state.split
    size = sum(source.size for source in sources)
    dtype = dtype_for(tokenizer.n_vocab)
    count = min(workers or len(os.sched_getaffinity(0)), 1 + size // BYTES_PER_WORKER)
    with _progress("tokenize", size) as (on_read, on_text), Workers(tokenizer, dtype, count) as pool:
        pieces = state.split.assign(_texts(sources, on_read), state.size)
        # What finished shards hold is read again, at a hundred times the speed of tokenizing, but not tokenized.
        results = pool.map(islice(_jobs(pieces), state.jobs, None))
        while True:
            jobs, shards = _write_pair(results, state, dtype, shard_tokens, on_text)
            if not jobs:
                return
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


def _finish(state: PrepareState, tokenizer: Tokenizer) -> ShardIndex:
    """Write the index, which makes the folder complete.

    Raises:
        UserError: nothing to train on.
    """
    shards = sorted(state.shards, key=lambda shard: shard.name)
    if not any(shard.split == "train" for shard in shards):
        why = "all of the text fell into validation" if shards else "the input holds no text"
        raise UserError(f"nothing to train on: {why}; give more text, or a smaller --val_split such as tail:0.1")
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


# ---------------------------------------------------------------- progress, summary, and the program


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


def summary(index: ShardIndex) -> str:
    """Documents, bytes, tokens and bytes per token, by split and in all."""
    lines = [f"{'':<6}{'documents':>12}{'bytes':>18}{'tokens':>18}{'bytes/token':>13}"]
    for name in ("train", "val", "all"):
        shards = index.shards if name == "all" else index.split(name)
        documents, size = sum(shard.documents for shard in shards), sum(shard.text_bytes for shard in shards)
        tokens = sum(shard.tokens for shard in shards)
        lines.append(f"{name:<6}{documents:>12,}{size:>18,}{tokens:>18,}{size / max(tokens, 1):>13.3f}")
    return "\n".join(lines)


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
