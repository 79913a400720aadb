"""A disk that fills while `fit`, `prepare`, `predict` or `convert` writes: nothing half-written, and the work goes on.

Where a small file system in memory can be mounted, half of the trials run on one that has a few bytes left; in the
others the n-th byte that is written fails as it does on a full disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import yaml
from preparing import files

from torture_sections.children import Ended, Work, run
from torture_sections.faults import BYTE, Fault, size_of
from torture_sections.materials import check_readable, must_end, tiny_fit, tiny_model
from torture_sections.prepare import preparation, write_corpus
from torture_sections.results import converted
from torture_sections.section import Section, Tally, check

MEGABYTES = 24


class SmallDisk:
    """A file system in memory, of which all but a few bytes can be filled."""

    def __init__(self, folder: Path) -> None:
        """Mount it, if this process may.

        Raises:
            OSError: it may not.
        """
        self.folder = folder
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "lit_gpt_torture", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            folder.rmdir()
            raise OSError(done.stderr.strip())
        self._filler = folder / "filler"

    def leave(self, n_bytes: int) -> None:
        """Fill it until so many bytes are left, rounded down to pages."""
        self.empty()
        space = os.statvfs(self.folder)
        with open(self._filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, space.f_bavail * space.f_frsize - n_bytes))

    def empty(self) -> None:
        """Make room again."""
        self._filler.unlink(missing_ok=True)

    def unmount(self) -> None:
        """Give the memory back."""
        subprocess.run(["umount", str(self.folder)], check=True)


class DiskFullSection(Section):
    """A trial is one command on a disk that fills, and the same command when there is room again."""

    name = "disk"
    share = 10
    short_trials = 4
    disk: SmallDisk | None = None
    current: Tally

    def set_up(self) -> None:
        """Undisturbed runs of all four."""
        self.fit, self.model = tiny_fit(self.root, self.short), tiny_model(self.root)
        self.corpus = self.folder / "corpus"
        write_corpus(self.corpus)
        for work in (preparation(self.corpus, "byte", "whole"), self.model.from_hf("whole.ckpt")):
            must_end(run(self.folder, work), 0)
        self.prepared = files(self.folder / "whole")
        self.converted = converted(self.folder / "whole.ckpt")["whole.ckpt"]
        try:
            self.disk = SmallDisk(self.folder / "small")
        except OSError as error:
            self.tally("no small file system can be mounted here: only writes that fail").remark = str(error)

    def finish(self) -> None:
        """Unmount."""
        if self.disk is not None:
            self.disk.unmount()

    def trial(self, random: Random) -> None:
        """One command, on either kind of full disk."""
        command = ("fit", "prepare", "predict", "convert")[self.number % 4]
        on_disk = self.disk is not None and (self.number // 4) % 2 == (0 if command in ("fit", "convert") else 1)
        what = f"{command} on {'a small file system' if on_disk else 'a disk whose writes fail'}"
        with self.trying(what) as self.current:
            folder = self.disk.folder / f"trial-{self.number}" if self.disk and on_disk else self.fresh()
            folder.mkdir(exist_ok=True)
            try:
                getattr(self, f"_{command}")(folder, on_disk, random)
            finally:
                if on_disk:
                    shutil.rmtree(folder)

    def _on_full_disk(self, folder: Path, work: Work, room: int, on_disk: bool) -> Ended:
        """Do some work in `folder`, in which there is so much room."""
        self.current.how = f"room for {room} bytes"
        if self.disk is None or not on_disk:
            return run(folder, Fault(BYTE, max(1, room), ()).within(work))
        self.disk.leave(room)
        try:
            return run(folder, work)
        finally:
            self.disk.empty()

    def _attempt(
        self, folder: Path, work: Callable[[], Work], most: int, on_disk: bool, random: Random, *statuses: int
    ) -> None:
        """The command on a full disk, twice but in the short form; it says so and leaves with one of these."""
        for _ in range(1 if self.short else 2):
            room = random.randint(1, random.choice([8_000, most]))  # the first files are small
            must_end(self._on_full_disk(folder, work(), room, on_disk), 0, *statuses)

    def _fit(self, folder: Path, on_disk: bool, random: Random) -> None:
        self.fit.copy_of_begun(folder)
        self._attempt(folder, lambda: self.fit.work(folder), 2 * size_of(folder), on_disk, random, 1, 2)
        check_readable(folder)
        for path in folder.rglob("config.yaml"):
            check(_is_whole(path), f"half a {path.name} over the whole one")
        must_end(run(folder, self.fit.work(folder)), 0)
        self.fit.check_whole(folder)

    def _prepare(self, folder: Path, on_disk: bool, random: Random) -> None:
        work = preparation(self.corpus, "byte")
        self._attempt(folder, lambda: work, size_of(self.folder / "whole"), on_disk, random, 2)
        must_end(run(folder, work), 0)
        check(files(folder / "out") == self.prepared, "another folder")

    def _predict(self, folder: Path, on_disk: bool, random: Random) -> None:
        work = self.model.predict("out.jsonl")
        self._attempt(folder, lambda: work, 2 * self.model.predicted.stat().st_size, on_disk, random, 1, 2)
        must_end(run(folder, work), 0)
        self.model.check_predicted(folder / "out.jsonl")

    def _convert(self, folder: Path, on_disk: bool, random: Random) -> None:
        output, work = folder / "out.ckpt", self.model.from_hf("out.ckpt")
        room = random.randint(1, (self.folder / "whole.ckpt").stat().st_size - 1)
        ended = self._on_full_disk(folder, work, room, on_disk)
        must_end(ended, 1, 2)
        left = [path.name for path in folder.iterdir()]
        check(not left, f"left behind: {', '.join(left)}")
        must_end(run(folder, work), 0)
        check(converted(output)["out.ckpt"] == self.converted, "another output")


def _is_whole(path: Path) -> bool:
    """Whether a run's config.yaml is all there."""
    try:
        settings = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError:
        return False
    return isinstance(settings, dict) and {"seed_everything", "trainer", "model", "data"} <= set(settings)
