"""How fast token shards become batches, beside nanoGPT's way; the trainer's wait; seeks in 100 G tokens; memory.

    python scripts/bench_data.py [--rounds 5] [--samples 10000000]

nanoGPT's way opens a memory map for each batch and draws windows at random, with replacement. Rounds are taken in turn
and the medians given; where others use the machine too, processor time tells more than wall time.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from lit_gpt.batch import Batch
from lit_gpt.data.loader import Cursor, RankShare, TrainLoader
from lit_gpt.data.shard_folder import open_tokens
from lit_gpt.data.shards import FORMATS, HEADER_BYTES, MAX_TOKENS, write_shard
from lit_gpt.data.shuffle import Shuffle
from lit_gpt.data.token_stream import TokenStream
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT

ROWS, BLOCK, VOCABULARY = 12, 1024, 4096
HUGE = 100_000_000_000


def loader(stream: TokenStream, rows: int, block: int, cursor: Cursor | None = None) -> TrainLoader:
    """What `fit` would make."""
    return TrainLoader(stream, Shuffle(len(stream), block, 0), cursor or Cursor(), RankShare(rows), VOCABULARY)


def nanogpt_batches(path: Path) -> Iterator[Batch]:
    """Batches the way nanoGPT makes them."""
    while True:
        data = np.memmap(path, dtype=np.uint16, mode="r", offset=HEADER_BYTES)
        starts = torch.randint(len(data) - BLOCK, (ROWS,))
        rows = [data[i : i + BLOCK + 1].astype(np.int64) for i in starts.tolist()]
        window = torch.stack([torch.from_numpy(row) for row in rows])
        yield Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous())


def rates(batches: Iterator[Batch], count: int) -> tuple[float, float]:
    """Million tokens per second of wall time, and of processor time."""
    next(batches)
    wall, busy = time.perf_counter(), time.process_time()
    for _ in islice(batches, count):
        pass
    tokens = count * ROWS * BLOCK / 1e6
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - busy)


def bench_rates(folder: Path, rounds: int) -> None:
    """Both ways, in turn, from 100 M tokens in the page cache."""
    path = folder / "train_000000.bin"
    with write_shard(path, "uint16") as writer:
        writer.add(np.random.default_rng(0).integers(0, VOCABULARY, 100_000_000).astype(np.uint16))
    stream = open_tokens(folder, "train")
    ways: dict[str, Callable[[], Iterator[Batch]]] = {
        "lit_gpt": lambda: iter(loader(stream, ROWS, BLOCK)),
        "nanoGPT's way": lambda: nanogpt_batches(path),
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, make in ways.items():
            results[name].append(rates(make(), 1000))
    for name, found in results.items():
        wall, busy = (statistics.median(values) for values in zip(*found))
        print(f"{name:14} {wall:7.1f} M tokens/s, {busy:7.1f} M tokens per second of processor time")


def bench_wait(folder: Path) -> None:
    """The share of a training step that is spent waiting for its batch."""
    stream = open_tokens(folder, "train")
    shapes = {"4 layers × 128, 12 × 64": (4, 128, 64), "6 layers × 384, 12 × 64": (6, 384, 64)}
    for name, (layers, width, block) in shapes.items():
        model = GPT(GPTConfig(n_layer=layers, n_head=4, n_embd=width, vocab_size=VOCABULARY, block_size=block))
        waited = spent = 0.0
        batches = iter(loader(stream, ROWS, block))
        for number in range(12):
            start = time.perf_counter()
            idx, targets, _ = next(batches)
            wait = time.perf_counter() - start
            output = model(idx, targets)
            (output.loss_sum / output.n_targets).backward()
            if number > 1:
                waited, spent = waited + wait, spent + time.perf_counter() - start
        print(f"{name:26} a step takes {spent * 100:6.1f} ms, of which the wait for data is {waited / spent:.3%}")


def make_huge(folder: Path) -> None:
    """Sparse shards of 100 G tokens: zeros that use no disk."""
    for number, start in enumerate(range(0, HUGE, MAX_TOKENS)):
        tokens = min(MAX_TOKENS, HUGE - start)
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = (*FORMATS["uint16"], tokens)
        with (folder / f"huge_train_{number:06}.bin").open("wb") as file:
            file.write(header.tobytes())
            file.truncate(HEADER_BYTES + 2 * tokens)


def bench_huge(folder: Path, samples: int) -> None:
    """Opening and seeking; then memory while samples are read."""
    make_huge(folder)
    start = time.perf_counter()
    stream = open_tokens(folder, "train")
    print(f"{len(stream):,} tokens opened in {time.perf_counter() - start:.3f} s")
    total = Shuffle(len(stream), BLOCK, 0).samples
    seconds = []
    for position in np.random.default_rng(0).integers(0, total - ROWS, 20).tolist():
        start = time.perf_counter()
        next(iter(loader(stream, ROWS, BLOCK, Cursor(3, position))))
        seconds.append(time.perf_counter() - start)
    print(
        f"first batch after a seek: median {statistics.median(seconds) * 1e3:.1f} ms, worst {max(seconds) * 1e3:.1f} ms"
    )
    rows, block = 500, 64
    batches = iter(loader(stream, rows, block))
    for number in range(samples // rows):
        next(batches)
        if number == samples // rows // 100:
            first = memory()
    print(f"resident memory after 1 % of {samples:,} samples {first:.1f} MiB, after all {memory():.1f} MiB")


def memory() -> float:
    """The most MiB that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=10_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, part) for part in ("huge", "warm")]
        for folder in folders:
            folder.mkdir()
        bench_huge(folders[0], options.samples)
        bench_rates(folders[1], options.rounds)
        bench_wait(folders[1])


if __name__ == "__main__":
    main()
