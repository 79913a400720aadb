"""Preparations of text, killed and with their state damaged: the folder that comes out is the undisturbed one's."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

from preparing import CHINESE, CODE, files

from torture_sections.children import Work, is_refusal, program, run
from torture_sections.damage import damaged_bytes
from torture_sections.faults import BYTE, size_of, stop_once
from torture_sections.materials import must_end
from torture_sections.section import Section, check

TOKENIZERS = ("byte", "bpe:300", "char")
POINTS = {"fsync": 20, "replace": 12, "unlink": 4, "mkdir": 3}
KILLS_OF_A_RUN = 8


def write_corpus(folder: Path) -> None:
    """A dozen files, one of them larger than a job: about 250 kB."""
    folder.mkdir()
    for number in range(12):
        lines = (f"{CHINESE if line % 3 else CODE}{number * line}\n" for line in range(900 if number == 5 else 180))
        (folder / f"{number:02d}.txt").write_text("".join(lines), "utf-8")


def preparation(corpus: Path, tokenizer: str, output: str = "out", workers: int = 1, overwrite: bool = False) -> Work:
    """Prepare the corpus, in small jobs and small shards."""
    flags = ["--val_split", "hash:0.2", "--shard_tokens", "20000", "--workers", str(workers)]

    def work() -> int | None:
        from lit_gpt.data import prepare, write_shards

        write_shards.JOB_CHARACTERS = 20_000
        prepare.BYTES_PER_WORKER = 1
        more = ["--overwrite"] if overwrite else []
        return program("prepare", corpus, "--output", output, "--tokenizer", tokenizer, *flags, *more)()

    return work


class PrepareSection(Section):
    """A trial is one preparation, from its first process to its index."""

    name = "prepare"
    share = 10
    short_trials = 2

    def set_up(self) -> None:
        """The texts, and what undisturbed runs make of them."""
        self.corpus = self.folder / "corpus"
        write_corpus(self.corpus)
        self.whole: dict[str, dict[str, str]] = {}
        for tokenizer in TOKENIZERS[: 1 if self.short else None]:
            ended = run(self.folder, preparation(self.corpus, tokenizer, f"whole-{tokenizer}"))
            check(ended.status == 0, f"the undisturbed run failed: {ended}")
            self.whole[tokenizer] = files(self.folder / f"whole-{tokenizer}")
        self.bytes = size_of(self.folder / "whole-byte")
        self.seconds = ended.seconds

    def trial(self, random: Random) -> None:
        """Kill, damage the state now and then, and compare what comes out."""
        folder, tokenizer = self.fresh(), random.choice(sorted(self.whole))
        with self.trying("whole preparations, resumed to their end: the same folder"):
            for _ in range(KILLS_OF_A_RUN):
                if self._was_finished(folder, tokenizer, random):
                    break
                if (folder / "out/prepare.json").exists() and random.random() < 0.4:
                    self._damage_state(folder, tokenizer, random)
            else:
                must_end(run(folder, preparation(self.corpus, tokenizer)), 0)
            check(files(folder / "out") == self.whole[tokenizer], f"another folder with the tokenizer {tokenizer}")

    def _was_finished(self, folder: Path, tokenizer: str, random: Random) -> bool:
        """One process of the preparation, which is to be killed; whether it reached the end."""
        aimed, workers = random.random() < 0.7, 1 if self.short or random.random() < 0.7 else 2
        work, points = preparation(self.corpus, tokenizer, workers=workers), {**POINTS, BYTE: self.bytes}
        with self.trying("killed at a fault point" if aimed else "killed at a random time", count=0) as tally:
            stopped = stop_once(folder, work, random, points if aimed else {}, self.seconds)
            if not stopped.count(tally):
                return True
        return False

    def _damage_state(self, folder: Path, tokenizer: str, random: Random) -> None:
        """A damaged state is refused, or it does no harm; then it is put back."""
        out, kept = folder / "out", folder / "kept"
        shutil.copytree(out, kept)
        state = out / "prepare.json"
        state.write_bytes(damaged_bytes(random, state.read_bytes()))
        before = _finished_files(out)
        with self.trying("state of an unfinished preparation damaged: refused, nothing changed, or the same folder"):
            ended = run(folder, preparation(self.corpus, tokenizer))
            if ended.status == 0:
                check(files(out) == self.whole[tokenizer], "a damaged state was believed")
            else:
                check(is_refusal(ended), f"ended with {ended}")
                check(_finished_files(out) == before, "files were changed")
        shutil.rmtree(out)
        kept.rename(out)


def _finished_files(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in files(folder).items() if not name.endswith(".partial")}
