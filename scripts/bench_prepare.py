"""How fast `lit_gpt prepare` is beside bare tiktoken and beside nanoGPT's way, in turn, on the same text and cores.

    python scripts/bench_prepare.py [--megabytes 36] [--rounds 3] [--workers 2] [--tokenizer gpt2]

Bare tiktoken encodes texts that are in memory already and throws the ids away; nanoGPT's way makes a list of each
document and copies it into a memory map; prepare reads, checks, tokenizes, hashes and writes. Wall time and processor
time (of all processes) are given, and the ratios to bare tiktoken; where others use the machine too, the processor's
tells more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from lit_gpt.data.prepare import prepare
from lit_gpt.data.sources import find_sources
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer


def corpus(folder: Path, megabytes: int) -> list[Path]:
    """Copies of the standard library's files, so many megabytes in all."""
    paths: list[Path] = []
    size = 0
    while size < megabytes * 1_000_000:
        for source in find_sources(["stdlib"], folder):
            data = source.path.read_bytes()
            paths.append(folder / f"{len(paths):05d}.py")
            paths[-1].write_bytes(data)
            size += len(data)
    return paths


def bare(texts: list[str], tokenizer: Tokenizer, workers: int) -> None:
    """tiktoken's fastest call on so many threads (it releases the GIL)."""
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda text: tokenizer.encoding.encode_to_numpy(text, disallowed_special=()).size, texts):
            pass


_tokenizer: Tokenizer


def _as_list(path: Path) -> list[int]:
    return [*_tokenizer.encoding.encode_ordinary(path.read_text("utf-8")), _tokenizer.eot_id or 0]


def nanogpt_way(paths: list[Path], tokenizer: Tokenizer, workers: int, output: Path) -> None:
    """A process pool that returns lists, written into one memory map of uint16."""
    global _tokenizer
    _tokenizer = tokenizer
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        lists = list(pool.map(_as_list, paths, chunksize=16))
    array = np.memmap(output, np.uint16, "w+", shape=(sum(map(len, lists)),))
    start = 0
    for ids in lists:
        array[start : start + len(ids)] = ids
        start += len(ids)
    array.flush()


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time, and of processor time of this process and its children."""
    wall, before = time.perf_counter(), os.times()
    work()
    after = os.times()
    return time.perf_counter() - wall, sum(after[:4]) - sum(before[:4])


def main() -> None:
    """Print one line a way: median MB/s over the rounds, and the median of the ratios within each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokenizer", default="gpt2")
    args = parser.parse_args()
    tokenizer = get_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as name:
        texts_folder, output = Path(name, "texts"), Path(name, "out")
        texts_folder.mkdir()
        paths = corpus(texts_folder, args.megabytes)
        texts = [path.read_text("utf-8") for path in paths]
        megabytes = sum(path.stat().st_size for path in paths) / 1e6
        ways: dict[str, Callable[[], object]] = {
            "bare tiktoken": lambda: bare(texts, tokenizer, args.workers),
            "nanoGPT's way": lambda: nanogpt_way(paths, tokenizer, args.workers, Path(name, "nano.bin")),
            "lit_gpt prepare": lambda: prepare(
                str(texts_folder), output, args.tokenizer, workers=args.workers, overwrite=True
            ),
        }
        rounds = [{way: timed(work) for way, work in ways.items()} for _ in range(args.rounds)]
    print(f"{megabytes:.0f} MB of Python source, {args.tokenizer}, {args.workers} workers, {args.rounds} rounds")
    print(f"{'':<16}{'MB/s wall':>11}{'of bare':>9}{'MB/s processor':>16}{'of bare':>9}")
    for way in ways:
        line = f"{way:<16}"
        for clock, width in ((0, 11), (1, 16)):
            rate = statistics.median(megabytes / times[way][clock] for times in rounds)
            ratio = statistics.median(times["bare tiktoken"][clock] / times[way][clock] for times in rounds)
            line += f"{rate:>{width}.1f}{ratio:>9.2f}"
        print(line)


if __name__ == "__main__":
    main()
