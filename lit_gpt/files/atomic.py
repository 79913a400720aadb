"""Atomic file writes and links: a path holds the old content or the whole new one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`; on success flush it to disk and rename it into place.

    If the body raises, or the disk is full, the temporary file is removed and `path` is what it was before. A link to
    elsewhere stays one, and the file that it names is replaced. A link to a file of the same folder is a second name
    for that file, as for a checkpoint that is kept: the link is replaced and that file stays as it is.

    Args:
        path: the final name. Its folder is made if it is missing.
        mode: "wb" or "w" (UTF-8, with "\\n" line ends).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path = _follow(path)
    temporary = temporary_path(path)
    # The mode is the kernel's to limit: to read the umask is to set it, for a moment and for all threads.
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
        with open(descriptor, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def temporary_path(path: Path) -> Path:
    """A new name beside `path` for what is not finished; `remove_unfinished` knows it."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of processes that were killed. For the one process that may write to `folder`."""
    for path in folder.glob(".*.partial"):
        if not path.is_dir():
            path.unlink(missing_ok=True)


def _follow(path: Path) -> Path:
    """What a link to elsewhere names, else the path itself."""
    target = Path(os.path.realpath(path))
    return path if target.parent == Path(os.path.realpath(path.parent)) else target


def atomic_link(target: str | os.PathLike[str], link: str | os.PathLike[str]) -> None:
    """Point the symbolic link `link` at `target`, replacing what was there in one step.

    The link is relative, so that the folder can be moved as a whole.
    """
    link = Path(link)
    temporary = link.with_name(f".{link.name}.{os.getpid()}.partial")
    with suppress(FileNotFoundError):
        temporary.unlink()
    os.symlink(os.path.relpath(target, link.parent), temporary)
    os.replace(temporary, link)
    sync_folder(link.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk: a rename is durable only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
