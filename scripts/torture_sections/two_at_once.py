"""Two processes on the same files: one writes, the other is refused in one line or comes after it; nothing is mixed."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

from preparing import files

from torture_sections.children import Child, Ended, Work, is_refusal, program, run
from torture_sections.materials import check_readable, checkpoints, must_end, tiny_fit, tiny_model
from torture_sections.prepare import preparation, write_corpus
from torture_sections.section import Section, check

KINDS = ("one_run", "two_runs", "predict", "prepare", "reader", "training_reader")


class TwoAtOnceSection(Section):
    """A trial is two processes that are started at nearly the same moment."""

    name = "two"
    share = 8
    short_trials = 4

    def set_up(self) -> None:
        """Undisturbed runs of what is tried."""
        self.fit, self.model = tiny_fit(self.root, self.short), tiny_model(self.root)
        self.corpus = self.folder / "corpus"
        write_corpus(self.corpus)
        self.prepared: dict[str, dict[str, str]] = {}
        for tokenizer in ("byte", "char"):
            ended = run(self.folder, preparation(self.corpus, tokenizer, f"whole-{tokenizer}"))
            must_end(ended, 0)
            self.prepared[tokenizer] = files(self.folder / f"whole-{tokenizer}")
        self.seconds = ended.seconds

    def trial(self, random: Random) -> None:
        """One kind of two processes."""
        kinds = ("prepare", "predict", "one_run", "reader") if self.short else KINDS
        getattr(self, f"_{kinds[self.number % len(kinds)]}")(self.fresh(), random)

    def _both(self, folder: Path, works: tuple[Work, Work], latest: float, random: Random) -> list[Ended]:
        """Start both, the second up to so many seconds after the first."""
        first = Child(folder, works[0])
        time.sleep(random.uniform(0, latest))
        second = Child(folder, works[1])
        return [first.end(), second.end()]

    def _check_one_was_refused(self, both: list[Ended], *words: str) -> str:
        """Raise Wrong unless each succeeded or was refused with one of these words; how it came out."""
        for ended in both:
            refused = is_refusal(ended) and any(word in ended.last_line for word in words)
            check(ended.status == 0 or refused, f"ended with {ended}")
        check(any(ended.status == 0 for ended in both), f"both were refused: {both[0].last_line} {both[1].last_line}")
        return "one refused" if any(ended.status for ended in both) else "one after the other"

    def _one_run(self, folder: Path, random: Random) -> None:
        with self.trying("two fits that go on with one run: its bits are those of one") as tally:
            self.fit.copy_of_begun(folder)
            work = self.fit.work(folder)
            both = self._both(folder, (work, work), self.fit.seconds / 2, random)
            tally.details[self._check_one_was_refused(both, "another run is writing to it")] += 1
            self.fit.check_whole(folder)

    def _two_runs(self, folder: Path, random: Random) -> None:
        with self.trying("two new fits in one folder: each in a run folder of its own, both with the same bits"):
            work = self.fit.work(folder)
            for ended in self._both(folder, (work, work), 0.2, random):
                must_end(ended, 0)
            check(len(checkpoints(folder)) == 2, f"{len(checkpoints(folder))} runs")
            for last in checkpoints(folder):
                self.fit.check_checkpoints(last.parent)

    def _predict(self, folder: Path, random: Random) -> None:
        with self.trying("two predicts of one output: each prompt once") as tally:
            work = self.model.predict("out.jsonl")
            both = self._both(folder, (work, work), 1.0, random)
            tally.details[self._check_one_was_refused(both, "another run writes to")] += 1
            self.model.check_predicted(folder / "out.jsonl")

    def _prepare(self, folder: Path, random: Random) -> None:
        with self.trying("two preparations of one folder: the same folder") as tally:
            work = preparation(self.corpus, "byte")
            both = self._both(folder, (work, work), self.seconds, random)
            words = ("another lit_gpt prepare is writing to it", "another program is reading its shards")
            tally.details[self._check_one_was_refused(both, *words, "lit_gpt prepare is writing")] += 1
            check(files(folder / "out") == self.prepared["byte"], "another folder")

    def _reader(self, folder: Path, random: Random) -> None:
        with self.trying("a reader and prepare --overwrite: old or new tokens, never both") as tally:
            must_end(run(folder, preparation(self.corpus, "byte")), 0)
            works = program("prepare", "--check", "out"), preparation(self.corpus, "char", overwrite=True)
            both = self._both(folder, works if random.random() < 0.5 else works[::-1], 0.1, random)
            self._check_overwritten(folder, both)
            tally.details[self._check_one_was_refused(both, *BETWEEN)] += 1

    def _training_reader(self, folder: Path, random: Random) -> None:
        with self.trying("a fit and prepare --overwrite of its shards: old or new tokens, never both") as tally:
            must_end(run(folder, preparation(self.corpus, "byte")), 0)
            fit = program("fit", "--config", self.fit.settings, "--data.path", "out", "--trainer.max_steps", 20)
            works = fit, preparation(self.corpus, "char", overwrite=True)
            both = self._both(folder, works, self.fit.seconds, random)
            self._check_overwritten(folder, both)
            tally.details[self._check_one_was_refused(both, *BETWEEN)] += 1
            check_readable(folder)

    def _check_overwritten(self, folder: Path, both: list[Ended]) -> None:
        """The folder is one of the two as a whole."""
        check(files(folder / "out") in self.prepared.values(), f"a mixed folder; {both[0]}; {both[1]}")


BETWEEN = (
    "lit_gpt prepare is writing to it",
    "another program is reading its shards",
    "lit_gpt prepare has replaced its shards",
    "its preparation was not finished",
    "no such folder",
    "has no token shards",
    "missing, but index.json lists it",
    "holds shards of the tokenizer",
    "list other shards",
    "not the tokenizer that made the shards",
)
"""Ways in which a reader or a writer is refused."""
