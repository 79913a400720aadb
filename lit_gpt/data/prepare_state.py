"""The state of a preparation on disk, so that a killed one goes on where it was."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_gpt.data.index import INDEX, Shard, is_count, shard_from_json
from lit_gpt.data.shard_folder import STATE_FILE, check_against_index, is_prepared, read_index
from lit_gpt.data.shards import MASK_SUFFIX, check_hash, mask_of, read_shard_header
from lit_gpt.data.small_json import parse_small_json, read_limited, shown
from lit_gpt.data.splits import SplitRule
from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_write, remove_unfinished
from lit_gpt.files.locks import InUse, Lock
from lit_gpt.tokenizer.tokenizer import TOKENIZER_FILE

DOWNLOADS = ".downloads"
BEGIN_AGAIN = "begin again with --overwrite"
_UNHASHED_KEYS = {"recipe", "val_split", "size", "jobs", "shards"}  # of states as they were written at first


@dataclass
class PrepareState:
    """The state of a preparation, in `prepare.json`, which ends with a hash of all the rest.

    It stays beside the finished index: the same command then knows that there is nothing to do, and `--check` compares
    the two.

    Attributes:
        folder: where the shards are.
        recipe: hash of all that decides what the shards contain.
        split: the rule, resolved; None before that.
        size: bytes of text, as the rule counts them.
        downloads: hash of what each address gave.
        tokenizer: hash of the tokenizer; "" before it is known.
        sources: hash of what tells the inputs from others.
        jobs: how many jobs the finished shards hold.
        shards: the finished ones, in order of writing.
        replaceable: whether what is in the folder may be thrown away; not written down.
    """

    folder: Path
    recipe: str
    split: SplitRule | None = None
    size: int = 0
    downloads: list[str] = field(default_factory=list)
    tokenizer: str = ""
    sources: str = ""
    jobs: int = 0
    shards: list[Shard] = field(default_factory=list)
    replaceable: bool = False

    @classmethod
    def open(cls, folder: Path, recipe: dict[str, object], overwrite: bool) -> PrepareState:
        """Go on with what `folder` holds, or start in an empty one.

        Raises:
            UserError: it holds something else, or something damaged, and `overwrite` is false.
        """
        wanted = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        complete = (folder / INDEX).exists()
        try:
            state = cls.read(folder)
            if state and state.recipe == wanted and not (complete and overwrite):
                state.check_shards()
                return replace(state, replaceable=overwrite)
        except UserError:
            if not overwrite:
                raise
        occupied = is_prepared(folder) or any((folder / name).exists() for name in (STATE_FILE, TOKENIZER_FILE))
        if occupied and not overwrite:
            what = "shards made otherwise" if complete or not state else "an unfinished preparation of something else"
            raise UserError(f"{folder} already holds {what}: choose another --output, or replace them with --overwrite")
        return cls(folder, wanted, sources=sources_hash(recipe.get("sources")), replaceable=overwrite)

    @classmethod
    def read(cls, folder: Path) -> PrepareState | None:
        """The state in `folder`, None where there is none.

        Raises:
            UserError: it is damaged, or has no hash and there is no index to compare it with.
        """
        path = folder / STATE_FILE
        if not path.exists():
            return None
        values = parse_small_json(read_limited(path, BEGIN_AGAIN), str(path), BEGIN_AGAIN)
        known = values.pop("sha256", None)
        if known is None and set(values) == _UNHASHED_KEYS:  # of an earlier version
            if not (folder / INDEX).exists():
                raise UserError(f"{path}: an earlier version's, whose work cannot be verified; {BEGIN_AGAIN}")
        elif known != _hash(values):
            raise UserError(f"{path}: damaged, its sha256 is another; {BEGIN_AGAIN}")
        try:
            return cls._from_values(folder, values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not the state of a preparation ({shown(error)}); {BEGIN_AGAIN}") from error

    @classmethod
    def _from_values(cls, folder: Path, values: dict[str, Any]) -> PrepareState:
        """Raises one of several exceptions for values that no state has."""
        if not (is_count(values["size"]) and is_count(values["jobs"]) and isinstance(values["recipe"], str)):
            raise ValueError("a recipe or a count that is none")
        return cls(
            folder,
            values["recipe"],
            SplitRule.parse(values["val_split"]),
            values["size"],
            list(values.get("downloads", ())),
            str(values.get("tokenizer", "")),
            str(values.get("sources", "")),
            values["jobs"],
            [shard_from_json(shard) for shard in values["shards"]],
        )

    def check_shards(self) -> None:
        """Compare the state with the index, or where there is none yet with every byte of the finished shards.

        Raises:
            UserError: naming what differs.
        """
        if self.finished:
            if sorted(self.shards, key=lambda shard: shard.name) != list(read_index(self.folder).shards):
                raise UserError(f"{self.folder}: {INDEX} and {STATE_FILE} list other shards; {BEGIN_AGAIN}")
            return
        masks = [mask_of(shard) for shard in self.shards if shard.mask_sha256]
        for shard in [*self.shards, *masks]:
            path = self.folder / shard.name
            try:
                dtype, found = read_shard_header(path)
                check_against_index(shard, dtype, dtype, found, str(path))
                check_hash(path, shard)
            except UserError as error:
                raise UserError(f"a finished shard was changed: {error}, or {BEGIN_AGAIN}") from error

    @property
    def finished(self) -> bool:
        """Whether the index exists, which is written last."""
        return (self.folder / INDEX).exists()

    def use_downloads(self, hashes: list[str]) -> None:
        """What the addresses gave: the same as when the preparation was begun, or all begins anew if that is allowed.

        Raises:
            UserError: another text.
        """
        if self.split and self.downloads != hashes:
            if not self.replaceable:
                raise UserError(f"{self.folder}: an address gives other text than when this was begun; {BEGIN_AGAIN}")
            self._clear()
            self.split, self.tokenizer, self.jobs, self.shards = None, "", 0, []
        self.downloads = hashes

    def start(self, split: SplitRule, size: int) -> None:
        """Empty the folder and write down the plan."""
        self._clear()
        self.split, self.size = split, size
        self._write()

    def use_tokenizer(self, found: str) -> None:
        """The hash of the tokenizer.

        Raises:
            UserError: the shards so far were made with another.
        """
        if self.tokenizer not in ("", found):
            path = self.folder / TOKENIZER_FILE
            raise UserError(f"{path}: not the tokenizer of the finished shards; {BEGIN_AGAIN}")
        if not self.tokenizer:
            self.tokenizer = found
            self._write()

    def add(self, jobs: int, shards: list[Shard]) -> None:
        """Some more jobs are in these shards, which are on disk."""
        self.jobs += jobs
        self.shards += shards
        self._write()

    def _write(self) -> None:
        values: dict[str, object] = {
            "recipe": self.recipe,
            "val_split": str(self.split),
            "size": self.size,
            "downloads": self.downloads,
            "tokenizer": self.tokenizer,
            "sources": self.sources,
            "jobs": self.jobs,
            "shards": [shard.to_json() for shard in self.shards],
        }
        with atomic_write(self.folder / STATE_FILE, "w") as file:
            json.dump({**values, "sha256": _hash(values)}, file, indent=1)

    def abandon(self, keep_downloads: bool) -> None:
        """Remove all that was written since `start`; what stood there before it is left alone."""
        if keep_downloads:
            with suppress(OSError):
                (self.folder / DOWNLOADS).rmdir()  # if nothing is in it
        else:
            self.remove_downloads()
        if self.split:
            self._clear()

    def remove_downloads(self) -> None:
        """Remove what was fetched."""
        shutil.rmtree(self.folder / DOWNLOADS, ignore_errors=True)

    def _clear(self) -> None:
        """Remove what makes a folder of shards, the index first: without it nothing counts as complete."""
        (self.folder / INDEX).unlink(missing_ok=True)
        for suffix in (".bin", MASK_SUFFIX):
            for path in self.folder.glob(f"*{suffix}"):
                if Shard(path.name, 0, 0).split:
                    path.unlink()
        for name in (TOKENIZER_FILE, STATE_FILE):
            (self.folder / name).unlink(missing_ok=True)


def sources_hash(fingerprints: object) -> str:
    """A hash of the fingerprints of the inputs, a JSON value."""
    return hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and keep others out of it; what a killed process left half-written in it is removed.

    A folder that was made here and is still empty at the end is removed again.

    Raises:
        UserError: it cannot be made, or another process is writing to it or reading its shards.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _writer_lock(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be the output folder ({error.strerror}); choose another") from error
    try:
        remove_unfinished(folder)
        remove_unfinished(folder / DOWNLOADS)
        yield
    finally:
        lock.release(remove=True)
        if made:
            with suppress(OSError):
                folder.rmdir()


def _writer_lock(folder: Path) -> Lock:
    refusal = f"{folder}: another lit_gpt prepare is writing to it; wait for it to end"
    with suppress(InUse):
        return Lock(folder, refusal)
    gc.collect()  # readers of this process that are in no one's hands any more
    try:
        return Lock(folder, refusal)
    except InUse:
        Lock(folder, refusal, shared=True).release()  # refused by a writer, but not by readers
        raise InUse(
            f"{folder}: another program is reading its shards; wait for it to end, or choose another --output"
        ) from None
