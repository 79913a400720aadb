"""Atomic file writes and links: a path holds the old content or the whole new one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`; on success flush it to disk and rename it into place.

    If the body raises, or the disk is full, the temporary file is removed and `path` is what it was before.

    Args:
        path: the final name. Its folder is made if it is missing.
        mode: "wb" or "w" (UTF-8, with "\\n" line ends).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
        with open(descriptor, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's own 0600 would lock other users out
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


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
