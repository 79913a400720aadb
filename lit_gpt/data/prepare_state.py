"""The state of a preparation on disk, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lit_gpt.atomic import atomic_write, remove_unfinished
from lit_gpt.data.index import INDEX, Shard
from lit_gpt.data.shard_folder import STATE_FILE, is_prepared
from lit_gpt.data.shards import read_shard_header
from lit_gpt.data.splits import SplitRule
from lit_gpt.errors import UserError
from lit_gpt.locks import Lock
from lit_gpt.tokenizer.tokenizer import TOKENIZER_FILE

DOWNLOADS = ".downloads"


@dataclass
class PrepareState:
    """The state of a preparation, in `prepare.json`.

    It stays beside the finished index: the same command then knows that there is nothing to do.

    Attributes:
        folder: where the shards are.
        recipe: hash of all that decides what the shards contain.
        split: the rule, resolved; None before that.
        size: bytes of text, as the rule counts them.
        jobs: how many jobs the finished shards hold.
        shards: the finished ones, in order of writing.
    """

    folder: Path
    recipe: str
    split: SplitRule | None = None
    size: int = 0
    jobs: int = 0
    shards: list[Shard] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, recipe: dict[str, object], overwrite: bool) -> PrepareState:
        """Go on with what `folder` holds, or start in an empty one.

        Raises:
            UserError: it holds something else, and `overwrite` is false.
        """
        wanted = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        state = cls._read(folder)
        complete = (folder / INDEX).exists()
        if state and state.recipe == wanted and not (complete and overwrite):
            return state
        occupied = is_prepared(folder) or any((folder / name).exists() for name in (STATE_FILE, TOKENIZER_FILE))
        if occupied and not overwrite:
            what = "shards made otherwise" if complete or not state else "an unfinished preparation of something else"
            raise UserError(f"{folder} already holds {what}: choose another --output, or replace them with --overwrite")
        return cls(folder, wanted)

    @classmethod
    def _read(cls, folder: Path) -> PrepareState | None:
        """The state in `folder`, if there is one that can be gone on with."""
        if not (folder / STATE_FILE).exists():
            return None
        try:
            values = json.loads((folder / STATE_FILE).read_text("utf-8"))
            shards = [Shard(**shard) for shard in values["shards"]]
            intact = all(read_shard_header(folder / shard.name)[1].tokens == shard.tokens for shard in shards)
            split = SplitRule.parse(values["val_split"])
            return cls(folder, values["recipe"] if intact else "", split, values["size"], values["jobs"], shards)
        except (OSError, ValueError, KeyError, TypeError):
            return cls(folder, "")

    @property
    def finished(self) -> bool:
        """Whether the index stands, which is written last."""
        return (self.folder / INDEX).exists()

    def start(self, split: SplitRule, size: int) -> None:
        """Empty the folder and write down the plan."""
        self._clear()
        self.split, self.size = split, size
        self._write()

    def add(self, jobs: int, shards: list[Shard]) -> None:
        """Some more jobs are in these shards, which are on disk."""
        self.jobs += jobs
        self.shards += shards
        self._write()

    def _write(self) -> None:
        values = {
            "recipe": self.recipe,
            "val_split": str(self.split),
            "size": self.size,
            "jobs": self.jobs,
            "shards": [asdict(shard) for shard in self.shards],
        }
        with atomic_write(self.folder / STATE_FILE, "w") as file:
            json.dump(values, file, indent=1)

    def abandon(self) -> None:
        """Remove all that was written since `start`; what stood there before it is left alone."""
        self.remove_downloads()
        if self.split:
            self._clear()

    def remove_downloads(self) -> None:
        """Remove what was fetched."""
        shutil.rmtree(self.folder / DOWNLOADS, ignore_errors=True)

    def _clear(self) -> None:
        """Remove what makes a folder of shards, the index first: without it nothing counts as complete."""
        (self.folder / INDEX).unlink(missing_ok=True)
        for path in self.folder.glob("*.bin"):
            if Shard(path.name, 0, 0).split:
                path.unlink()
        for name in (TOKENIZER_FILE, STATE_FILE):
            (self.folder / name).unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and keep others out of it; what a killed process left half-written in it is removed.

    A folder that was made here and is still empty at the end is removed again.

    Raises:
        UserError: it cannot be made, or another process is writing to it.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder, f"{folder}: another lit_gpt prepare is writing to it; wait for it to end")
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
