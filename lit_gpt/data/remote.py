"""Token shards behind an address: fetched whole, verified, renamed into a cache, the least recently used removed.

fsspec is a transport only: its own file caches write to the final name while others read. Here one process of a machine
downloads at a time, under a lock, and what is read was complete and verified before it had its name.

A cached shard goes by its content, not by its name alone: by the sha256 of the index, or where there is no index by the
version that the server tells (ETag, checksum or time of change). A data set that is published anew at the same address
is fetched anew. A server that tells none of these is refused: what is cached could be anything.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from lit_gpt.data.index import INDEX, Shard, ShardIndex
from lit_gpt.data.masks import MASK_DTYPE
from lit_gpt.data.shard_folder import check_against_index, index_from_headers
from lit_gpt.data.shards import HEADER_BYTES, MASK_SUFFIX, check_hash, file_hash, parse_shard_header
from lit_gpt.data.small_json import MAX_JSON_BYTES
from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_write

ATTEMPTS = 5
FIRST_DELAY = 1.0  # seconds before the second attempt; each later one waits twice as long
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
MISSING = (FileNotFoundError, IsADirectoryError)
FINAL = (*MISSING, PermissionError)  # trying again would not help
VERSION_KEYS = ("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "checksum", "blob_id", "oid")
TIME_KEYS = ("Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created")  # where there are none
MAX_TOKENIZER_BYTES = 1 << 26
Value = TypeVar("Value")


def _read_head(path: Path) -> bytes:
    """The bytes that may be a shard's header."""
    with path.open("rb") as file:
        return file.read(HEADER_BYTES)


def is_remote(path: str) -> bool:
    """Whether a path is an address."""
    return "://" in path


class RemoteFolder:
    """A folder of shards at an address, and its cache on this machine.

    Filesystems are made when they are needed and never shared between processes: a forked one would hang.
    """

    def __init__(self, url: str, cache_dir: str | os.PathLike[str] | None = None, cache_gb: float = 50.0) -> None:
        """Nothing is fetched yet.

        Args:
            url: of the folder.
            cache_dir: where to keep shards; `$XDG_CACHE_HOME/lit_gpt`, or `~/.cache/lit_gpt`, by default.
            cache_gb: remove the least recently used shards of this address above so many GB (10⁹ bytes).
        """
        self.url, self._limit = url.rstrip("/"), int(cache_gb * 1e9)
        cache = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_gpt")
        self.folder = cache / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self._dtype = ""
        self._versions: dict[str, str] = {}  # of shards without a hash, by name
        self._queue: list[Shard] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    # What there is ------------------------------------------------------------------------------------------------

    def load_index(self) -> ShardIndex:
        """The index, fetched anew; of a set without one, made from sizes and headers.

        Raises:
            UserError: the address can't be read, or is no folder of shards.
        """
        file = self.fetch_optional(INDEX)
        if file is not None:
            index = ShardIndex.from_json(file.read_bytes(), f"{self.url}/{INDEX}")
            unhashed = [shard for shard in index.shards if not shard.sha256]
            self._retried(self.url, lambda: self._ask_versions(unhashed))
        else:
            try:
                index = self._retried(self.url, self._list)
            except MISSING as error:
                raise UserError(f"{self.url}: no {INDEX} there, and no list of shards; check the address") from error
        self._dtype = index.dtype
        return index

    def fetch_optional(self, name: str) -> Path | None:
        """A small JSON file of the folder, fetched anew; None where it has none.

        Raises:
            UserError: the server does not give it, or the cache cannot be written to: neither means that there is none.
        """
        limit = MAX_JSON_BYTES if name == INDEX else MAX_TOKENIZER_BYTES

        def get() -> bytes:
            system, root = self._connect()
            buffer = io.BytesIO()
            system.get_file(f"{root.rstrip('/')}/{name}", _Limited(buffer, limit))
            data = buffer.getvalue()
            if not data.rstrip().endswith(b"}"):  # what a server cut short is fetched again
                raise UserError("truncated")
            return data

        with self._locked():
            try:
                data = self._retried(f"{self.url}/{name}", get)
            except MISSING:
                return None
            with atomic_write(self.folder / name) as file:
                file.write(data)
        return self.folder / name

    def _list(self) -> ShardIndex:
        system, root = self._connect()
        entries = []
        with suppress(*FINAL):
            entries = system.ls(root, detail=True)
        found = []
        for path in sorted(entry["name"] for entry in entries):
            name = path.rstrip("/").rpartition("/")[2]
            if name.endswith(".bin") and Shard(name, 0, 0).split:
                about = system.info(path)
                size = about.get("size")
                if size is None:
                    raise UserError(f"{name}: the server does not tell its size")
                head = system.cat_file(path, start=0, end=min(size, HEADER_BYTES))
                found.append(parse_shard_header(name, head[:HEADER_BYTES], size, f"{self.url}/{name}"))
                self._versions[name] = version_of(about)
        if not found:
            raise FileNotFoundError(self.url)
        return index_from_headers(found, self.url)

    def _ask_versions(self, shards: list[Shard]) -> None:
        for shard in shards:
            system, root = self._connect()
            self._versions[shard.name] = version_of(system.info(f"{root.rstrip('/')}/{shard.name}"))

    @property
    def versions(self) -> str | None:
        """A hash of which content the server has of the shards whose hash is not known; None if all are."""
        if not self._versions:
            return None
        return hashlib.sha256("\n".join(map(" ".join, sorted(self._versions.items()))).encode()).hexdigest()

    # Shards -------------------------------------------------------------------------------------------------------

    def locate(self, shard: Shard) -> Path:
        """A shard's verified file in the cache, fetched first if need be.

        Raises:
            UserError: the server does not give it, whole and undamaged; names the address and what was wrong.
        """
        path = self._cached_path(shard)
        if not self._touch(path):
            with self._locked():
                if not self._touch(path):  # another process may have fetched it while this one waited
                    try:
                        self._retried(f"{self.url}/{shard.name}", lambda: self._fetch(shard, path))
                    except MISSING as error:
                        raise UserError(f"{self.url}/{shard.name}: not there, but {INDEX} lists it") from error
                    self._evict(path)
        return path

    def _cached_path(self, shard: Shard) -> Path:
        """Where this very content is, or will be, in the cache.

        Raises:
            UserError: neither an index nor the server says which content it is.
        """
        known = shard.sha256 or self._versions.get(shard.name)
        if not known:
            raise UserError(
                f"{self.url}/{shard.name}: no {INDEX} has its hash, and the server tells no ETag and no time of "
                f"change, so a cached shard could be an older one: publish an {INDEX} too, or copy all to a folder"
            )
        name = Path(shard.name)
        return self.folder / f"{name.stem}.{known[:32]}{name.suffix}"

    def prefetch(self, shards: list[Shard]) -> None:
        """Fetch these in the background, soonest needed first; a later call replaces an earlier one."""
        with self._changed:
            self._queue = shards
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._fetch_ahead, name="lit_gpt shards", daemon=True)
            self._thread.start()

    def _fetch_ahead(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue))
                shard = self._queue.pop(0)
            with suppress(UserError, OSError):  # whoever needs it will ask for it, and learn why it can't be had
                self.locate(shard)

    def _fetch(self, shard: Shard, path: Path) -> None:
        """Download and verify; only then does the file get its name."""
        if self._adopt(shard, path):
            return
        partial = path.with_name(f".{path.name}.partial")  # one at a time, under the lock: no other name is needed
        try:
            with partial.open("wb") as file:
                system, root = self._connect()
                address = f"{root.rstrip('/')}/{shard.name}"
                system.get_file(address, _Limited(file, shard.bytes))
                file.flush()
                os.fsync(file.fileno())
            check_against_index(
                shard,
                MASK_DTYPE if shard.name.endswith(MASK_SUFFIX) else self._dtype,
                *parse_shard_header(shard.name, _read_head(partial), partial.stat().st_size, shard.name),
                shard.name,
            )
            check_hash(partial, shard)
            if not shard.sha256 and version_of(system.info(address)) != self._versions[shard.name]:
                raise UserError("published anew while it was read; run this again")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _adopt(self, shard: Shard, path: Path) -> bool:
        """Give a shard that an earlier version cached by its name the name of its content, or remove it."""
        old = self.folder / shard.name
        if not old.is_file():
            return False
        if shard.sha256 and old.stat().st_size == shard.bytes and file_hash(old) == shard.sha256:
            os.replace(old, path)
            return True
        old.unlink()
        return False

    def _touch(self, path: Path) -> bool:
        """Whether a file is there; if so it is the most recently used."""
        with suppress(FileNotFoundError):
            os.utime(path)
            return True
        return False

    def _evict(self, keep: Path) -> None:
        """Remove the least recently used shards above the limit. A reader that has one open goes on reading it."""
        paths = [path for suffix in (".bin", MASK_SUFFIX) for path in self.folder.glob(f"*{suffix}")]
        paths.sort(key=lambda path: path.stat().st_mtime_ns)
        total = sum(path.stat().st_size for path in paths)
        for path in paths:
            if total <= self._limit:
                break
            if path != keep:
                total -= path.stat().st_size
                path.unlink()

    # Transport ----------------------------------------------------------------------------------------------------

    def _connect(self) -> tuple[Any, str]:
        """A filesystem of this process, and the folder's path in it."""
        from fsspec.core import url_to_fs

        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if self.url.startswith(("http://", "https://")):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
            options["client_kwargs"] = {"timeout": timeout}
        try:
            return url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url}: {error}") from error

    def _retried(self, what: str, attempt: Callable[[], Value]) -> Value:
        """The result of `attempt`, tried again with back-off.

        Raises:
            UserError: what was wrong the last time. What `MISSING` holds is raised as it is, at once.
        """
        for number in range(ATTEMPTS):
            if number:
                time.sleep(FIRST_DELAY * 2 ** (number - 1))
            try:
                return attempt()
            except PermissionError as error:
                raise UserError(f"{what}: may not be read ({error}); check the address and your permissions") from error
            except MISSING:
                raise
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{what}: cannot be fetched, tried {ATTEMPTS} times ({reason}); check the server and the network"
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among this machine's processes and threads that download from this address.

        Raises:
            UserError: the cache cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"{self.folder}: shards cannot be cached there ({error.strerror}); name another --data.cache_dir"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def version_of(about: dict[str, Any]) -> str:
    """A hash of what a server tells about a file's content, "" where that says nothing; `Any` as fsspec has it.

    A checksum or ETag counts before a time of change, which has a granularity of a second on many servers.
    """
    for keys in (VERSION_KEYS, TIME_KEYS):
        told = [f"{key}: {about[key]}" for key in keys if about.get(key)]
        if told:
            return hashlib.sha256("\n".join([str(about.get("size")), *told]).encode()).hexdigest()
    return ""


class _Limited:
    """A file to write to that refuses more than was promised: a server must not fill memory or disk."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._left = file, limit

    def write(self, data: bytes) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise UserError("longer than it should be")
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
