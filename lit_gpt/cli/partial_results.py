"""The .partial files of a `predict` run: results so far, from which a killed run resumes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_write
from lit_gpt.files.locks import Lock


class PartialResults:
    """The results so far of a run that writes to `output`: `output.partial`, and one more file for each further rank.

    A line is one continuation. The lines of a prompt are written together; the first line says what the run is.
    """

    def __init__(self, output: str | os.PathLike[str], run: str) -> None:
        """Results of the run with the fingerprint `run`."""
        self.output = Path(output)
        self._run = run
        self._total: int | None = None
        self._lock: Lock | None = None

    def reserve(self) -> None:
        """Exclude every other run that writes to the same output, until `release` or the end of the process.

        Raises:
            UserError: if another run holds it, or nothing can be written there.
        """
        if self.output.is_dir():
            raise UserError(f"{self.output} is a folder: name a .jsonl file in it")
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            refusal = f"another run writes to {self.output}: wait for its end, or name another file"
            self._lock = Lock(self.output, refusal)
        except OSError as error:
            raise UserError(f"{self.output} cannot be written ({error.strerror or error}): name another file") from None

    def release(self) -> None:
        """Let other runs write to the output; nothing if it is not reserved."""
        if self._lock is not None:
            self._lock.release(remove=True)
            self._lock = None

    def path(self, rank: int) -> Path:
        """The file of one rank."""
        return self.output.with_name(f"{self.output.name}.partial{'' if rank == 0 else f'.{rank}'}")

    def _paths(self) -> list[Path]:
        """The files that exist. Names are compared, not matched as a glob: `res[1].jsonl` is a name."""
        name = re.compile(rf"{re.escape(self.output.name)}\.partial(\.\d+)?")
        folder = self.output.parent
        return sorted(path for path in folder.iterdir() if name.fullmatch(path.name)) if folder.is_dir() else []

    def finished(self, resume: bool, total: int) -> set[int]:
        """Prompts, of `total`, that need not be done again.

        Raises:
            UserError: if a run would be overwritten, or was begun with other prompts, settings or weights.
        """
        self._total = total
        if self.output.exists() and resume:
            return set(range(total))
        if self.output.exists():
            raise UserError(f"{self.output} exists already and is complete: delete it, or name another file")
        if not self._paths():
            return set()
        if not resume:
            raise UserError(f"{self._paths()[0]} is an unfinished run: go on with --resume, or delete it")
        return {index for path in self._paths() for index, _, _ in self._groups(path)}

    def _groups(self, path: Path) -> Iterator[tuple[int, int, int]]:
        """(prompt, offset, length in bytes) of every prompt whose lines are all there."""
        with path.open("rb") as file:
            head = file.readline()
            if head.endswith(b"\n") and _parse(path, head).get("run") != self._run:
                raise UserError(f"{path} was begun with other prompts, settings or weights: delete it to begin anew")
            offset = end = len(head)
            for line in file:
                if not line.endswith(b"\n"):  # killed in the middle of it
                    return
                end += len(line)
                record = _parse(path, line)
                index, sample, samples = (record.get(name) for name in ("index", "sample", "samples"))
                if not (isinstance(index, int) and isinstance(sample, int) and isinstance(samples, int)):
                    raise UserError(_damaged(path))
                if sample + 1 == samples:
                    yield index, offset, end - offset
                    offset = end

    def append(self, rank: int) -> IO[bytes]:
        """The file of one rank, open at the end of what is whole in it."""
        path = self.path(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        groups = list(self._groups(path)) if path.exists() else []
        file = path.open("r+b" if path.exists() else "w+b")
        if groups:
            _, offset, size = groups[-1]
            file.truncate(offset + size)
        else:
            file.truncate(0)
            file.write(self._head())
            file.flush()
        file.seek(0, os.SEEK_END)
        return file

    def merged(self) -> Iterator[bytes]:
        """The lines of all ranks in the order of the input."""
        paths = self._paths()
        groups = sorted(
            (index, number, offset, size)
            for number, path in enumerate(paths)
            for index, offset, size in self._groups(path)
        )
        files = [path.open("rb") for path in paths]
        try:
            for _, number, offset, size in groups:
                files[number].seek(offset)
                yield from files[number].read(size).splitlines(keepends=True)
        finally:
            for file in files:
                file.close()

    def finish(self) -> None:
        """Write the output, whole and in order, and drop the partial files.

        Raises:
            RuntimeError: if results are missing; what is there stays.
        """
        done = {index for path in self._paths() for index, _, _ in self._groups(path)}
        if self._total is not None and len(done) < self._total:
            raise RuntimeError(
                f"{self.path(0)} has the results of {len(done)} of {self._total} prompts: go on with --resume"
            )
        with atomic_write(self.output) as file:
            for lines in self.merged():
                file.write(lines)
        for path in self._paths():
            path.unlink()

    def remove_left_over(self) -> None:
        """Drop the partial files of this run that are beside its whole output: it was killed before it dropped them."""
        for path in self._paths():
            with path.open("rb") as file:
                is_of_this_run = file.readline() == self._head()
            if is_of_this_run:
                path.unlink()

    def _head(self) -> bytes:
        """The first line, which says what the run is."""
        return json.dumps({"run": self._run}).encode() + b"\n"


def _parse(path: Path, line: bytes) -> dict[str, Any]:
    """A line of `path`. Raises UserError if it is no JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(_damaged(path))
    return record


def _damaged(path: Path) -> str:
    return f"{path} is damaged: delete it to begin anew"
