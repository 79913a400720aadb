"""`lit_gpt remix`: the share of generated text that is verbatim training text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_gpt.console.messages import note
from lit_gpt.console.options import make_parser
from lit_gpt.data.index import ShardIndex
from lit_gpt.data.matches import Match, longest_matches
from lit_gpt.data.shard_folder import load_index, open_local_split
from lit_gpt.data.token_stream import TokenStream
from lit_gpt.errors import UserError, nearest
from lit_gpt.files.atomic import atomic_write
from lit_gpt.insight.remix.novelty import Novelty, Span, held_out_windows, longest_spans, novelty
from lit_gpt.insight.remix.plot import check_plot, plot_novelty
from lit_gpt.tokenizer.printable import show_bytes
from lit_gpt.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer

_NOTE_SECONDS = 5.0
_SHOWN_ORDERS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20)


@dataclass(frozen=True)
class Corpus:
    """The training and held-out tokens that texts are compared with.

    Attributes:
        path: the folder of shards.
        index: of the folder.
        train: the training tokens.
        held_out: those of another split, or None where there is none.
        tokenizer: that they were made with.
    """

    path: str
    index: ShardIndex
    train: TokenStream
    held_out: TokenStream | None
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Report:
    """The result of a search.

    Attributes:
        corpus: what was searched.
        texts: the samples' ids.
        matches: of each sample.
        samples: figures of the samples.
        held_out: the same of held-out text, the baseline; None where there is none.
        spans: the longest verbatim ones in the samples.
        seconds: that the search took.
    """

    corpus: Corpus
    texts: list[NDArray[np.int64]]
    matches: list[Match]
    samples: Novelty
    held_out: Novelty | None
    spans: list[Span]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the JSON report has them; `Any`, since JSON nests."""
        decode = self.corpus.tokenizer.decode
        return {
            "data": {
                "path": self.corpus.path,
                "train_tokens": len(self.corpus.train),
                "train_documents": self.corpus.train.documents,
                "fingerprint": self.corpus.train.fingerprint,
            },
            "samples": self.samples.to_dict(),
            "held_out": None if self.held_out is None else self.held_out.to_dict(),
            "spans": [span.to_dict() for span in self.spans],
            "texts": [
                {"text": decode(ids), "ids": ids.tolist(), "longest_match": match.lengths.tolist()}
                for ids, match in zip(self.texts, self.matches)
            ],
            "seconds": self.seconds,
        }


def remix(texts: list[NDArray[np.int64]], corpus: Corpus, progress: Callable[[int], None] | None = None) -> Report:
    """Search the training tokens for `texts`, and for as much held-out text, in one pass.

    Args:
        texts: ids (T,) of each sample.
        corpus: where to search.
        progress: called with the number of tokens done.

    Raises:
        UserError: if there is nothing to search for.
    """
    texts = [np.asarray(ids, np.int64) for ids in texts if len(ids)]
    if not texts:
        raise UserError("the sample is empty: there is no token to search for; raise max_new_tokens or give more text")
    windows = [] if corpus.held_out is None else held_out_windows(corpus.held_out, [len(ids) for ids in texts])
    start = time.perf_counter()
    found = longest_matches([*texts, *windows], corpus.train, progress)
    seconds = time.perf_counter() - start
    ours, theirs = found[: len(texts)], found[len(texts) :]
    spans = longest_spans(ours, corpus.train, corpus.tokenizer, corpus.index.eot_position != "before")
    return Report(corpus, texts, ours, novelty(ours), novelty(theirs) if theirs else None, spans, seconds)


def open_corpus(path: str, tokenizer: Tokenizer | None = None) -> Corpus:
    """The shards of a folder, for texts of `tokenizer` (the folder's own if None).

    Raises:
        UserError: no such folder, no training shards, no tokenizer, or shards of another tokenizer.
    """
    index = load_index(path)
    own = Path(path) / TOKENIZER_FILE
    if tokenizer is None:
        if not own.is_file():
            raise UserError(f"{path} has no {TOKENIZER_FILE}: give --ckpt_path, whose tokenizer made these shards")
        tokenizer = Tokenizer.load(own)
    made_with = index.tokenizer_hash or (Tokenizer.load(own).hash if own.is_file() else None)
    if made_with is not None and made_with != tokenizer.hash:
        raise UserError(
            f'the shards in {path} are of another tokenizer ("{index.tokenizer}") than the text ("{tokenizer.name}"): '
            "give the folder that the model was trained on"
        )

    def split(name: str) -> TokenStream:
        return open_local_split(index, name, path)

    others = [name for name in ("val", "test") if index.split(name)]
    return Corpus(path, index, split("train"), split(others[0]) if others else None, tokenizer)


# The program ---------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int | None:
    """`lit_gpt remix`."""
    args = _parser().parse_args(argv)
    if args.format not in ("table", "json"):
        raise UserError(f"format {args.format!r} is unknown: {nearest(args.format, ['table', 'json'])}")
    if args.ckpt_path is None and args.text is None:
        raise UserError("nothing to compare: give --ckpt_path to sample from a model, or --text FILE")
    if args.plot is not None:
        check_plot(args.plot)
    tokenizer, folder = _from_checkpoint(args.ckpt_path) if args.ckpt_path else (None, None)
    path = _existing(args.data.path, folder, args.ckpt_path)
    corpus = open_corpus(path, tokenizer)
    texts = _given(args.text, corpus.tokenizer) if args.text else _sampled(args, corpus.tokenizer)
    report = remix(texts, corpus, _progress(len(corpus.train)))
    if args.output is not None:
        with atomic_write(args.output, "w") as file:
            json.dump(report.to_dict(), file, ensure_ascii=False, indent=1)
    if args.plot is not None:
        plot_novelty(args.plot, report.samples, report.held_out)
    if args.format == "json":
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        print_report(report)
    return 0


def _from_checkpoint(path: str) -> tuple[Tokenizer, str | None]:
    """Its tokenizer, and the folder that it was trained on, if it says."""
    from lit_gpt.checkpoint.format import read_header, resolve_ckpt_path

    header = read_header(resolve_ckpt_path(path))
    if header.tokenizer is None:
        raise UserError(f"checkpoint {path} was trained on bare ids and has no tokenizer: remix needs text to show")
    return Tokenizer.from_dict(header.tokenizer, path), header.data.get("path")


def _existing(given: str | None, trained_on: str | None, ckpt_path: str | None) -> str:
    if given is not None:
        return given
    if trained_on is None:
        raise UserError("which shards? give --data.path, the folder that the model was trained on")
    if not Path(trained_on).is_dir():
        raise UserError(
            f"{ckpt_path} was trained on {trained_on}, and that folder is gone: give its new path as --data.path"
        )
    return trained_on


def _given(path: str, tokenizer: Tokenizer) -> list[NDArray[np.int64]]:
    """The ids of a text file, one text."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"text {path}: {error.strerror or error}; give a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"text {path} is not UTF-8 (byte {error.start}): convert it first") from None
    if not text:
        raise UserError(f"text {path} is empty: there is no token to search for")
    return [np.asarray(tokenizer.encode(text))]


def _sampled(args: Any, tokenizer: Tokenizer) -> list[NDArray[np.int64]]:
    """The ids of samples from the checkpoint, without prompt and end-of-text."""
    from lit_gpt.api import load

    start: Any = args.start
    if start is None:
        start = "\n" if tokenizer.eot_id is None else [tokenizer.eot_id]
    names = ("num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    settings = {name: args[name] for name in names}
    note(f"sampling {args.num_samples} texts of up to {args.max_new_tokens} tokens")
    (completions,) = load(args.ckpt_path).complete([start], **settings)
    return [np.array([token for token in item.ids if token != tokenizer.eot_id], np.int64) for item in completions]


def _progress(total: int) -> Callable[[int], None]:
    """Notes on stderr, a few seconds apart."""
    last = time.monotonic()

    def show(done: int) -> None:
        nonlocal last
        if time.monotonic() - last > _NOTE_SECONDS:
            last = time.monotonic()
            note(f"searched {done:,} of {total:,} training tokens")

    return show


def print_report(report: Report) -> None:
    """Two tables: the shares, and the longest spans with where they come from."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    title = f"Not in the {len(report.corpus.train):,} training tokens of {report.corpus.path}"
    table = Table("", title=title, title_justify="left")
    table.add_column(f"{report.samples.texts} samples", justify="right")
    table.add_column("held-out text", justify="right")
    for n in _SHOWN_ORDERS:
        shares = (report.samples.novel[n], report.held_out.novel[n] if report.held_out else None)
        table.add_row(f"new {n}-grams", *("–" if share is None else f"{share:.1%}" for share in shares))
    table.add_section()
    for label, name in (("tokens", "tokens"), ("mean match", "mean"), ("longest match", "longest")):
        values = [getattr(part, name) if part else None for part in (report.samples, report.held_out)]
        table.add_row(label, *("–" if value is None else f"{value:,.4g}" for value in values))
    console.print(table)
    for number, span in enumerate(report.spans, 1):
        where = f"{span.shard}, token {span.position:,}"
        if span.document is not None:
            where = f"document {span.document}, its token {span.offset:,} ({where})"
        console.print(
            f"\n[bold]{number}. {span.length} tokens[/bold] of sample {span.text} from {span.start} on: {where}"
        )
        before, piece, after = (escape(show_bytes(part.encode())) for part in (span.before, span.piece, span.after))
        console.print(f"[dim]…{before}[/dim][bold green]{piece}[/bold green][dim]{after}…[/dim]")


def _parser() -> Any:
    parser = make_parser("remix", "How much of what a model writes stands word for word in its training text.")
    parser.add_argument("--ckpt_path", type=str | None, help="a checkpoint to sample from, or last or best")
    parser.add_argument("--text", type=str | None, help="a text file to compare instead of samples")
    parser.add_argument("--data.path", type=str | None, help="the folder of shards it was trained on")
    parser.add_argument("--start", type=str | None, help="what the samples continue; the end of a text if left out")
    parser.add_argument("--num_samples", type=int, default=8, help="how many texts to sample")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="the most tokens of a sample")
    parser.add_argument("--temperature", type=float, default=1.0, help="1 is the model's own distribution")
    parser.add_argument("--top_k", type=int | None, help="draw among this many likeliest tokens")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest with this mass")
    parser.add_argument("--seed", type=int, default=1, help="of the draws")
    parser.add_argument("--format", type=str, default="table", help="table or json")
    parser.add_argument("--output", type=str | None, help="write the report as JSON")
    parser.add_argument("--plot", type=str | None, help="draw the share of new n-grams by n: a .png, .svg or .pdf")
    return parser
