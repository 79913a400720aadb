"""Advisory locks between processes: one writer or many readers of a folder or file, freed when their process ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from types import TracebackType

from lit_gpt.errors import UserError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # a network file system without them
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}


class InUse(UserError):
    """Another process holds the lock."""


class Lock:
    """A lock on a folder or file, held from construction until `release` or the end of the process.

    The operating system frees it however the process ends, so that no stale lock can stay; the lock file itself stays
    and means nothing. Processes that are forked share the lock, programs that are started do not. It is advisory: it
    excludes only those that ask for it too. On a file system without locks it holds nothing, and a warning says so.

    Attributes:
        path: the lock file: `.lock` in a folder, `.NAME.lock` beside a file.
    """

    def __init__(self, target: str | os.PathLike[str], refusal: str, shared: bool = False) -> None:
        """Take the lock at once, or not at all: nothing waits.

        Args:
            target: the folder, which exists, or the file, which need not; its folder does.
            refusal: one line for the user if another process holds it; the holder's id is added.
            shared: as one of many readers, which only a writer excludes and which exclude only a writer. A reader of a
                folder that it cannot write to, where no writer has been either, needs no lock and takes none.

        Raises:
            InUse: another process, or another Lock of this one, holds it in a way that excludes this one.
            OSError: the lock file cannot be made.
        """
        self.path = lock_path(target)
        self._owner = os.getpid()
        self._descriptor: int | None = None
        operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        while (descriptor := _open(self.path, shared)) is not None:
            if not _take(descriptor, operation, self.path, refusal):
                break
            if _is_file(descriptor, self.path):
                self._descriptor = descriptor
                break
            os.close(descriptor)  # its holder has removed the file after it was opened here
        if self._descriptor is not None and not shared:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    @property
    def held(self) -> bool:
        """Whether it excludes others: false after `release` and where there are no locks."""
        return self._descriptor is not None

    def release(self, remove: bool = False) -> None:
        """Free the lock; nothing if it is free.

        Args:
            remove: remove the lock file too. Only a writer may: a reader would take it from under the others.
        """
        if self._descriptor is None:
            return
        if os.getpid() == self._owner:  # a forked process only closes its copy
            if remove:
                self.path.unlink(missing_ok=True)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
        self._descriptor = None

    def __getstate__(self) -> dict[str, object]:
        """A copy, in this process or another, holds nothing: it would close a descriptor that is not its own."""
        return {**self.__dict__, "_descriptor": None}

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.release()


def lock_path(target: str | os.PathLike[str]) -> Path:
    """The lock file of a folder or file."""
    target = Path(target)
    return target / ".lock" if target.is_dir() else target.with_name(f".{target.name}.lock")


def _open(path: Path, shared: bool) -> int | None:
    """A descriptor of the lock file; None for a reader that may not make it, or only where nobody has."""
    flags = os.O_RDWR | os.O_CREAT  # network file systems want a descriptor to write for a writer's lock
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if not shared or error.errno not in _NOT_WRITABLE:
            raise
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None


def _take(descriptor: int, operation: int, path: Path, refusal: str) -> bool:
    """Lock the open file; False, with the file closed, where there are no locks. Raises InUse."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
        os.close(descriptor)
        if error.errno == errno.EWOULDBLOCK:
            raise InUse(f"{refusal} ({holder})" if holder else refusal) from None
        if error.errno not in _NO_LOCKS:
            raise
        logging.getLogger(__name__).warning("%s: this file system has no locks, none is held", path)
        return False
    return True


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at `path` still."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
