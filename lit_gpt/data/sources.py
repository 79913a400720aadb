"""The inputs of a preparation: files, folders, globs, addresses, and the standard library of this Python."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import IO

from lit_gpt.data.readers import READERS
from lit_gpt.data.text_source import OnRead, TextSource
from lit_gpt.errors import UserError, nearest
from lit_gpt.files.atomic import atomic_write

STDLIB = "stdlib"
# Plain text that is read from a folder, beside the formats of `READERS`; a file that is named is read whatever its
# suffix.
_PLAIN_TEXT = """
    .txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml .css .json .yaml .yml .toml .ini .cfg .log .srt .sql
    .py .pyi .pyx .js .mjs .ts .jsx .tsx .c .h .cc .cpp .hpp .cu .cs .go .rs .java .kt .scala .swift .rb .php .pl .lua
    .r .jl .hs .ml .clj .ex .erl .sh .bash .zsh .ps1 .vim .el .lisp .f90 .m .proto .cmake
"""
PLAIN_TEXT_SUFFIXES = frozenset(_PLAIN_TEXT.split())
SKIPPED_STDLIB_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
)
CONNECT_SECONDS, READ_SECONDS = 10, 60
HASH_MARK = "#sha256="
"""In an address, before the SHA-256 of the file there, as pip has it."""
_HASHED_BYTES = 1 << 20  # at a time


def find_sources(
    inputs: Iterable[str],
    downloads: Path,
    text_field: str = "text",
    suffixes: Collection[str] | None = None,
    generated: Collection[str] = (),
) -> list[TextSource]:
    """The files that `inputs` name, each once, in the order given and sorted within a folder or glob.

    Args:
        inputs: files, folders (their text files and tables, hidden ones left out), globs, addresses (`scheme://…`, with
            `#sha256=…` at the end if the file there has to be the one of this hash), or "stdlib".
        downloads: the folder, in the output folder, where what an address names will be.
        text_field: the field that holds the text, in files that have fields.
        suffixes: of the files that are read from a folder, if not those of all texts and tables.
        generated: names of inputs that whoever prepares makes, where an address would be fetched.

    Raises:
        UserError: nothing there, an empty file, or a folder without texts.
    """
    found: dict[Path, TextSource] = {}
    output = downloads.absolute().parent
    for name in inputs:
        for source in _generated(name, downloads) if name in generated else _find(name, downloads, suffixes):
            if source.url or output not in source.path.absolute().parents:  # what we write is no input
                found.setdefault(source.path.absolute(), replace(source, text_field=text_field))
    if not found:
        raise UserError("no input: name files, folders, globs, addresses, or stdlib")
    return list(found.values())


def _generated(name: str, downloads: Path) -> list[TextSource]:
    return [TextSource(downloads / f"{name}.jsonl", name, url=name)]


def _find(name: str, downloads: Path, suffixes: Collection[str] | None) -> list[TextSource]:
    if name == STDLIB:
        return _standard_library()
    if "://" in name:
        address, mark, digest = name.partition(HASH_MARK)
        if mark and not re.fullmatch("[0-9a-f]{64}", digest):
            raise UserError(f"{name}: {HASH_MARK} is followed by the 64 hexadecimal digits of a SHA-256, in lower case")
        return [TextSource(downloads / _download_name(name), address, url=name)]
    if os.path.isdir(name):
        return _in_folder(name, suffixes)
    if os.path.isfile(name):
        return [_explicit(name)]
    if glob.has_magic(name):
        matches = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if not matches:
            raise UserError(f'"{name}" matches no file; check the pattern')
        return [_explicit(path) for path in matches]
    siblings = sorted(os.listdir(os.path.dirname(name) or ".")) if os.path.isdir(os.path.dirname(name) or ".") else []
    remedy = nearest(os.path.basename(name), siblings) if siblings else "check the path"
    raise UserError(f'no file or folder "{name}": {remedy if len(remedy) < 200 else "check the path"}')


def _explicit(name: str) -> TextSource:
    if os.path.getsize(name) == 0:
        raise UserError(f"{name}: the file is empty; name one that holds text")
    return TextSource(Path(name), name)


def _in_folder(name: str, suffixes: Collection[str] | None) -> list[TextSource]:
    wanted = suffixes if suffixes is not None else (*PLAIN_TEXT_SUFFIXES, *READERS)
    paths = [path for path in _walk(Path(name), frozenset()) if TextSource(path, "").suffix in wanted]
    if not paths:
        known = ".txt, .md, .py, .jsonl, .csv, .parquet" if suffixes is None else ", ".join(suffixes)
        raise UserError(f"{name}: no text files in this folder (such as {known})")
    return [TextSource(path, str(path)) for path in paths]


def _walk(root: Path, skipped: frozenset[str]) -> list[Path]:
    """The files below `root` that are neither hidden nor empty nor in a skipped folder, ordered by their path in it."""
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [entry for entry in folders if not entry.startswith(".") and entry not in skipped]
        paths += [Path(folder, file) for file in files if not file.startswith(".")]
    return sorted(
        (path for path in paths if path.is_file() and path.stat().st_size),
        key=lambda path: path.relative_to(root).as_posix(),
    )


def _standard_library() -> list[TextSource]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in _walk(root, SKIPPED_STDLIB_FOLDERS) if path.suffix == ".py"]
    if not paths:
        raise UserError(f"stdlib: this Python has no source files in {root}; name texts of your own")
    return [TextSource(path, f"{STDLIB}:{path.relative_to(root).as_posix()}") for path in paths]


def _download_name(url: str) -> str:
    """A file name that keeps the suffixes of what `url` names, and differs for every address."""
    stem = url.split("?")[0].split("#")[0].rstrip("/").rpartition("/")[2]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{stem[-100:]}"


def fetch(source: TextSource, on_read: OnRead = lambda count: None) -> None:
    """Download a source that is an address, whole or not at all; one that is here already is left as it is.

    Raises:
        UserError: it cannot be had, or is not the file whose hash the address has; the message names the address.
    """
    if source.url is None or source.path.exists():
        return
    address, _, digest = source.url.partition(HASH_MARK)
    try:
        import aiohttp
        from fsspec.callbacks import Callback
        from fsspec.core import url_to_fs

        web = address.startswith(("http://", "https://"))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        system, path = url_to_fs(address, **({"client_kwargs": {"timeout": timeout}} if web else {}))
        with atomic_write(source.path) as file:
            system.get_file(path, file, callback=Callback(hooks={"read": lambda size, value, **_: on_read(value)}))
            file.flush()
            _check_hash(file, digest, address)
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{address}: cannot be fetched ({reason}); check the address and the network, or give a file that is here "
            "(--data.source FILE)"
        ) from error
    if source.size == 0:
        source.path.unlink()  # or the next run would take it for what it wants
        raise UserError(f"{address}: is empty; name one that holds text")


def _check_hash(file: IO[bytes], digest: str, address: str) -> None:
    """Refuse a file, open for reading too, that has another SHA-256. Raises UserError."""
    if not digest:
        return
    found = hashlib.sha256()
    for start in count(0, _HASHED_BYTES):
        data = os.pread(file.fileno(), _HASHED_BYTES, start)
        if not data:
            break
        found.update(data)
    if found.hexdigest() != digest:
        raise UserError(
            f"{address}: what is there is another file than expected (its SHA-256 is {found.hexdigest()[:16]}…, not "
            f"{digest[:16]}…); give one that is here (--data.source FILE)"
        )
