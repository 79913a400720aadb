"""Texts as pieces of bounded size, from plain files and from tables, compressed or not.

Whatever the input, what comes out is a stream of `Text`s: at most `PIECE_CHARACTERS` long, cut where a tokenizer would
cut too, and marked where a document ends. Memory stays bounded by the longest line of a table, never by a file.

A format is a function that yields a file's documents, and a line of `READERS`, from the suffix to that function; every
other suffix is plain text. Nothing else knows which formats there are.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import IO, Any, NamedTuple

from lit_gpt.data.text_source import BadText, OnRead, TextSource
from lit_gpt.errors import UserError, nearest

PIECE_CHARACTERS = 1 << 18  # characters: long enough to keep a tokenizer busy, short enough to share among workers
DOCUMENT_CHARACTERS = 1 << 24  # characters after which one text goes on as another document, cut at a line end
MAX_LINE_CHARACTERS = 1 << 26  # characters of one line of a .jsonl or .csv, which has to be in memory as a whole


class Text(NamedTuple):
    """Up to `PIECE_CHARACTERS` characters of a document; `ends` if the document ends with them.

    `where` names the document in errors, where one can still be found in it after it was read.
    """

    text: str
    ends: bool
    where: str = ""


def read_texts(source: TextSource, on_read: OnRead = lambda count: None) -> Iterator[Text]:
    """The documents of one source, in pieces; a text file is one document, a row of a table is one.

    Raises:
        BadText: binary, not UTF-8 (with the byte offset), damaged, or without the field.
        UserError: it cannot be read now.
    """
    with readable(source):
        reader = READERS.get(source.suffix)
        if reader is None:
            yield from pieces(_characters(source, on_read))
        else:
            for document in reader(source, on_read):
                yield from pieces([document])


@contextmanager
def readable(source: TextSource) -> Iterator[None]:
    """Name the source in what a read of it raises.

    Raises:
        BadText: a file that cannot be decoded.
        UserError: one that cannot be read now.
    """
    try:
        yield
    except OSError as error:  # what a read raises; the caller's own errors do not come through here
        if error.errno is None:  # pyarrow's, for a file that it cannot decode
            raise BadText(f"{source.name}: damaged ({' '.join(str(error).split())})") from error
        gone = isinstance(error, FileNotFoundError)
        why = "vanished while it was read" if gone else f"cannot be read ({error.strerror})"
        raise UserError(f"{source.name}: {why}; make it readable and run the same again") from error


def pieces(parts: Iterable[str]) -> Iterator[Text]:
    """One document, given in parts of any size, as pieces; how it comes in does not change how it is cut.

    A document longer than `DOCUMENT_CHARACTERS` becomes several. An empty one gives nothing.
    """
    rest, length = "", 0
    for part in parts:
        rest += part
        while len(rest) > PIECE_CHARACTERS:
            cut = best_cut(rest, PIECE_CHARACTERS)
            length += cut
            ends = length >= DOCUMENT_CHARACTERS
            yield Text(rest[:cut], ends)
            rest, length = rest[cut:], 0 if ends else length
    if rest:
        yield Text(rest, True)


def best_cut(text: str, limit: int) -> int:
    """Where to cut a text that is longer than `limit`: in 1 … limit, if possible where a tokenizer's pieces end too.

    That is after a line end before something that is no space, since GPT-2's, GPT-4's and our own patterns start a
    piece there; failing that any line end, a space, and at last anywhere.
    """
    line = stop = text.rfind("\n", 0, limit) + 1
    for _ in range(1000):  # a bound for texts of empty lines
        if stop == 0:
            break
        if not text[stop].isspace():
            return stop
        stop = text.rfind("\n", 0, stop - 1) + 1
    return line or max(text.rfind(" ", 1, limit), 0) or limit


def _characters(source: TextSource, on_read: OnRead) -> Iterator[str]:
    """The text of a file, decoded as it comes; a byte-order mark at its start is no text."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset = 0
    for data in chain(_decompressed(source, on_read), [b""]):
        start = offset - len(decoder.getstate()[0])  # of what is decoded now
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            zero, position = data.find(b"\0"), start + error.start
            if zero < 0 or offset + zero > position:
                raise BadText(
                    f"{source.name}: not UTF-8 at byte {position} (0x{error.object[error.start]:02x}); "
                    "convert it, for example with iconv -f GB18030 -t UTF-8, or -f LATIN1, or -f UTF-16"
                ) from error
            text = "\0"
        if "\0" in text:
            raise BadText(f"{source.name}: binary, not text: byte {offset + data.find(0)} is zero; name files of text")
        yield text.removeprefix("\ufeff") if offset == 0 else text
        offset += len(data)


def _decompressed(source: TextSource, on_read: OnRead) -> Iterator[bytes]:
    """A file's content, decompressed, in parts of about 256 KiB."""
    with open(source.path, "rb") as file:
        raw = _CountedReads(file, on_read)
        if source.compression == ".zst":
            yield from _zstd(source, raw)
            return
        stream: Any = gzip.GzipFile(fileobj=raw) if source.compression == ".gz" else raw  # type: ignore[call-overload]
        try:
            while data := stream.read(PIECE_CHARACTERS):
                yield data
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise BadText(f"{source.name}: damaged or truncated gzip ({error}); fetch it again") from error


class _CountedReads:
    """A file that tells how many bytes were read from it."""

    def __init__(self, file: IO[bytes], on_read: OnRead) -> None:
        self._file, self._on_read = file, on_read

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._on_read(len(data))
        return data


def _zstd(source: TextSource, raw: _CountedReads) -> Iterator[bytes]:
    """Frames one after another. The library's own reader reads a truncated file as if it were a short one."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{source.name}: reading .zst needs zstandard: pip install 'lit_gpt[zstd]'") from error
    frame, whole = zstandard.ZstdDecompressor().decompressobj(), True
    try:
        while data := raw.read(1 << 14):  # small, for a frame of few bytes can unfold to very many
            while data:
                if whole and frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                whole = frame.eof
                data = frame.unused_data if whole else b""
    except zstandard.ZstdError as error:
        raise BadText(f"{source.name}: damaged zstd ({error}); fetch it again") from error
    if not whole:
        raise BadText(f"{source.name}: truncated zstd; fetch it again")


# ---------------------------------------------------------------- tables


def _lines(source: TextSource, on_read: OnRead) -> Iterator[str]:
    """Lines with their ends; only "\\n" ends one, so that a quoted field keeps other line separators."""
    rest = ""
    for characters in _characters(source, on_read):
        *lines, rest = (rest + characters).split("\n")
        for line in lines:
            yield line + "\n"
        if len(rest) > MAX_LINE_CHARACTERS:
            raise BadText(
                f"{source.name}: a line is longer than {MAX_LINE_CHARACTERS} characters; is it really a table?"
            )
    if rest:
        yield rest


def _read_jsonl(source: TextSource, on_read: OnRead) -> Iterator[str]:
    for row, where in json_lines(source, on_read, f'{{"{source.text_field}": "…"}}'):
        yield _text_of(row, source, where)


def json_lines(source: TextSource, on_read: OnRead, example: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file of JSON lines, each with what to call it in errors: its file and line.

    Args:
        source: the file.
        on_read: told of what was read.
        example: of an object, for the message about a line that holds something else.

    Raises:
        BadText: a line that is not JSON, nested too deeply, or no object.
    """
    for number, line in enumerate(_lines(source, on_read), 1):
        if line.isspace():
            continue
        where = f"{source.name}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadText(f"{where} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise BadText(f"{where} is not an object such as {example}")
        yield row, where


def _read_csv(source: TextSource, on_read: OnRead) -> Iterator[str]:
    csv.field_size_limit(MAX_LINE_CHARACTERS)
    rows = csv.reader(_lines(source, on_read), delimiter="\t" if source.suffix == ".tsv" else ",", strict=True)
    try:
        header = next(rows, [])
        _text_of(dict.fromkeys(header, ""), source, f"{source.name}: the header")
        for row in rows:
            if row:
                yield _text_of(dict(zip(header, row)), source, f"{source.name}: line {rows.line_num}")
    except csv.Error as error:
        raise BadText(f"{source.name}: line {rows.line_num} is not CSV ({error})") from error


def _read_parquet(source: TextSource, on_read: OnRead) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{source.name}: reading .parquet needs pyarrow: pip install 'lit_gpt[parquet]'") from error
    try:
        # Read as a stream: by default whole column chunks are fetched ahead, hundreds of megabytes.
        with pyarrow.parquet.ParquetFile(source.path, pre_buffer=False, buffer_size=1 << 20) as table:
            _text_of(dict.fromkeys(table.schema_arrow.names, ""), source, f"{source.name}: the table")
            size, groups, field = source.size, table.num_row_groups, source.text_field
            for group in range(groups):
                for batch in table.iter_batches(64, [group], [field], use_threads=False):
                    for value in batch.column(0):
                        yield _text_of({field: value.as_py()}, source, f"{source.name}: row group {group}")
                on_read(size * (group + 1) // groups - size * group // groups)
    except pyarrow.ArrowInvalid as error:
        raise BadText(f"{source.name}: not a parquet file, or damaged ({error})") from error


Reader = Callable[[TextSource, OnRead], Iterator[str]]
"""Yields a file's documents, and calls `OnRead` with each number of bytes read; raises `UserError` for bad content."""

READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
"""Suffix, without that of a compression → reader."""


def _text_of(row: dict[str, Any], source: TextSource, where: str) -> str:
    """The text of a row, which `where` names in errors.

    Raises:
        UserError: no such field, no string in it, or one that is no Unicode text.
    """
    text_field = source.text_field
    if text_field not in row:
        raise BadText(f'{where} has no field "{text_field}", name it with --text_field: {nearest(text_field, row)}')
    text = row[text_field]
    if not isinstance(text, str):
        raise BadText(f'{where}: field "{text_field}" is not a string but {type(text).__name__}')
    check_unicode(text, where)
    return text


def check_unicode(text: str, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell. Raises BadText; `where` names the text."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadText(f"{where}: a lone surrogate at character {error.start}, which is no Unicode text") from error
