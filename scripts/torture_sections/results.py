"""`predict --output` and `convert`, killed: each prompt once and the same texts; a converted model whole or absent."""

from __future__ import annotations

from pathlib import Path
from random import Random

from preparing import files

from torture_sections.children import run
from torture_sections.faults import BYTE, size_of, stop_once
from torture_sections.materials import must_end, tiny_model
from torture_sections.section import Section, check

KILLS_OF_A_RUN, SHORT_KILLS = 8, 3
PREDICT = {"fsync": 2, "replace": 1, "unlink": 1, BYTE: 0}
CONVERT = {"fsync": 12, "replace": 6, "rename": 1, "mkdir": 1, BYTE: 0}


def converted(path: Path) -> dict[str, str]:
    """The hashes of a converted model, which is a file or a folder."""
    return files(path) if path.is_dir() else files(path.parent) and {path.name: files(path.parent)[path.name]}


class ResultsSection(Section):
    """A trial is one output, from its first process to the whole of it."""

    name = "results"
    share = 13
    short_trials = 3

    def set_up(self) -> None:
        """Undisturbed runs of both."""
        self.model = tiny_model(self.root)
        whole = self.folder / "whole"
        whole.mkdir()
        ended = run(whole, self.model.from_hf("out.ckpt"))
        check(ended.status == 0, f"the undisturbed conversion failed: {ended}")
        self.seconds = ended.seconds
        self.sizes = {"out.ckpt": size_of(whole)}
        ended = run(whole, self.model.to_hf("out_hf"))  # by the same name, which its model card has
        check(ended.status == 0, f"the undisturbed conversion failed: {ended}")
        self.expected = {name: converted(whole / name) for name in ("out.ckpt", "out_hf")}
        self.sizes["out_hf"] = size_of(whole / "out_hf")

    def trial(self, random: Random) -> None:
        """Both in turn."""
        folder = self.fresh()
        if self.number % 3 == 0:
            self._predict(folder, random)
        else:
            self._convert(folder, "out.ckpt" if self.number % 3 == 1 else "out_hf", random)

    def _predict(self, folder: Path, random: Random) -> None:
        output = folder / "out.jsonl"
        work, points = self.model.predict("out.jsonl"), PREDICT | {BYTE: self.model.predicted.stat().st_size}
        with self.trying("predict: whole outputs, resumed to their end: each prompt once, the same texts"):
            for _ in range(SHORT_KILLS if self.short else KILLS_OF_A_RUN):
                with self.trying("predict: killed", count=0) as tally:
                    stopped = stop_once(folder, work, random, points if random.random() < 0.7 else {}, 2.0, "out.jsonl")
                    if not stopped.count(tally):
                        break
                    if output.exists():
                        check(output.read_bytes() == self.model.predicted.read_bytes(), "half an output")
            else:
                must_end(run(folder, work), 0)
            self.model.check_predicted(output)

    def _convert(self, folder: Path, name: str, random: Random) -> None:
        output = folder / name
        work = self.model.from_hf(name) if name == "out.ckpt" else self.model.to_hf(name)
        points, expected = CONVERT | {BYTE: self.sizes[name]}, self.expected[name]
        what = "from Hugging Face" if name == "out.ckpt" else "to Hugging Face"
        for _ in range(SHORT_KILLS if self.short else KILLS_OF_A_RUN):
            with self.trying(f"convert {what}: killed: its output is whole or absent", count=0) as tally:
                stopped = stop_once(folder, work, random, points if random.random() < 0.8 else {}, self.seconds)
                if not stopped.count(tally):
                    break
                if output.exists():
                    check(converted(output) == expected, "half an output")
            if output.exists():
                break
        else:
            run(folder, work)
        with self.trying(f"convert {what}: whole outputs afterwards"):
            check(output.exists() and converted(output) == expected, "the output is another, or is not there")
