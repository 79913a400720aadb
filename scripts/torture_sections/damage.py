"""Damaged and hostile files: each is refused in one line, soon and in bounded memory, or it loads as the whole one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from fuzzing import changed

from torture_sections.children import Work, is_refusal, program, run, value_of
from torture_sections.materials import TEXT, must_end, tiny_model
from torture_sections.section import Section, check, drawn

SECONDS, MEGABYTES = 10.0, 200.0
"""Limits of one command; the seconds are five times those that are promised, for a machine that does other things."""
VARIANTS, SHORT_VARIANTS = 60, 4
"""Changed values that are drawn at a time; the first are the simplest, and are taken last."""


def damaged_bytes(random: Random, content: bytes, first: int | None = None) -> bytes:
    """`content` with one to three of its `first` bytes changed, or a piece of it cut out, doubled or cut off."""
    limit = max(1, len(content) if first is None else min(first, len(content)))
    data = bytearray(content)
    kind = random.choice(["flip", "flip", "flip", "byte", "cut", "remove", "double", "digit"])
    for _ in range(random.randint(1, 3)):
        position = random.randrange(min(limit, max(1, len(data))))
        if kind == "cut":
            del data[position:]
        elif kind == "remove":
            del data[position : position + random.randint(1, 40)]
        elif kind == "double":
            data[position:position] = data[position : position + random.randint(1, 40)]
        elif data:
            byte = {"flip": data[position] ^ 1 << random.randrange(8), "byte": random.randrange(256)}
            data[position] = byte.get(kind, ord("0") + random.randrange(10))
    return bytes(data)


@dataclass(frozen=True)
class Target:
    """A file to be damaged.

    Attributes:
        what: for the table.
        original: the folder that it is in, or the file itself.
        name: the file's name in the folder.
        work: the command that reads a copy of the original called `copy`.
        first: damage only so many of the first bytes.
        values: whether to change its JSON values, too.
        content: what a copy holds that was accepted, to be compared with the original's; None where a changed file
            can be a good one of something else.
    """

    what: str
    original: Path
    name: str
    work: Callable[[], Work]
    first: int | None = None
    values: bool = False
    content: Callable[[Path], Any] | None = None


class DamageSection(Section):
    """A trial is one damaged file."""

    name = "damage"
    share = 13
    short_trials = 10

    def set_up(self) -> None:
        """The good files."""
        self.model = tiny_model(self.root)
        flags = ("--tokenizer", "bpe:300", "--val_split", "tail:0.2", "--shard_tokens", "2000")
        must_end(run(self.folder, program("prepare", TEXT, "--output", "shards", *flags)), 0)
        self.targets = self._targets()
        contents = {target.what: partial(target.content, target.original) for target in self.targets if target.content}
        self.expected = {what: value_of(content) for what, content in contents.items()}
        self.variants: dict[str, list[Any]] = {}

    def _targets(self) -> list[Target]:
        shards, hf, checkpoint = self.folder / "shards", self.model.hf, self.model.checkpoint

        def convert() -> Work:
            return program("convert", "copy", "out.ckpt")

        def verify() -> Work:
            return program("prepare", "--check", "copy")

        (weights, *_) = sorted(path.name for path in hf.glob("*.safetensors"))
        return [
            Target("checkpoint, its first bytes", checkpoint, "", convert, 6000, content=_header),
            Target("checkpoint, any byte", checkpoint, "", convert, content=_header),
            Target("config.json", hf, "config.json", convert, values=True),
            Target("tokenizer.json", hf, "tokenizer.json", convert, values=True),
            Target("safetensors, its header", hf, weights, convert, 1500),
            Target("model.safetensors.index.json", hf, "model.safetensors.index.json", convert, values=True),
            Target("index.json of shards", shards, "index.json", verify, values=True, content=_tokens),
            Target("token shard", shards, "train_000000.bin", verify, content=_tokens),
            Target("tokenizer.json of shards", shards, "tokenizer.json", verify, values=True, content=_tokens),
            Target("state of a preparation", shards, "prepare.json", verify, values=True, content=_tokens),
        ]

    def trial(self, random: Random) -> None:
        """Damage one file, have the program read it, and compare."""
        target = self.targets[self.number % len(self.targets)]
        folder = self.fresh()
        copy = folder / "copy"
        (shutil.copytree if target.original.is_dir() else shutil.copyfile)(target.original, copy)
        file = copy / target.name if target.name else copy
        with self.trying(f"{target.what}: refused in one line, within bounds, or loaded") as tally:
            good = file.read_bytes()
            by_value = target.values and random.random() < 0.5
            bad = self._changed(target, good, random) if by_value else damaged_bytes(random, good, target.first)
            file.write_bytes(bad)
            ended = run(folder, target.work())
            tally.how = str(copy)
            check(ended.seconds < SECONDS, f"took {ended.seconds:.1f} s")
            check(ended.grown < MEGABYTES, f"took {ended.grown:.0f} MB")
            if ended.status != 0:
                check(is_refusal(ended), f"ended with {ended}")
                lines = ended.err.strip().splitlines()
                check(all(line.endswith(" is all right") for line in lines[:-1]), f"{len(lines)} lines: {lines[:3]}")
                check(not (folder / "out.ckpt").exists(), "an output was written")
                tally.details["refused"] += 1
                return
            tally.details["loaded"] += 1
            content = target.content
            if content is not None:
                found = value_of(lambda: content(folder / "out.ckpt" if target.original.is_file() else copy))
                check(found == self.expected[target.what], "what was loaded is not what was damaged")

    def _changed(self, target: Target, good: bytes, random: Random) -> bytes:
        """The file with JSON values of any kind in place of some of its own."""
        if not self.variants.get(target.what):
            values = json.loads(good)
            self.variants[target.what] = drawn(
                changed(values), SHORT_VARIANTS if self.short else VARIANTS, random.randrange(2**31)
            )
        return json.dumps(self.variants[target.what].pop()).encode("utf-8", "surrogatepass")


def _header(path: Path) -> Any:
    """Shape and tokenizer of a checkpoint."""
    from lit_gpt.checkpoint.format import read_header

    header = read_header(path)
    return [header.config.to_dict(), header.tokenizer]


def _tokens(folder: Path) -> Any:
    """All tokens of a folder of shards, and what is known of them."""
    from lit_gpt.data.shard_folder import load_index, open_tokens

    index = load_index(folder)
    streams = [open_tokens(folder, split) for split in ("train", "val")]
    known = [index.dtype, index.vocab_size, index.eot_id, index.tokenizer_hash]
    return [known, [stream.read(0, len(stream)).tolist() for stream in streams]]
