"""Learning per minute: nanoGPT's CPU recipe and ours in turn, on one machine, measured the same way.

    git clone https://github.com/karpathy/nanoGPT
    python scripts/bench_learning.py --nanogpt nanoGPT --text tinyshakespeare.txt

Each run is a process of its own. Its training time is counted from the first batch to the end of the last step:
compilation, validation and checkpoints on the way are in it, the start of Python is not. Afterwards both models are
judged by one function: fp32 loss over the whole held-out tenth, in windows of the block's length, none overlapping.
nanoGPT is run from the folder that is given and not changed; only its data folder and its output are added.

With `--quickstart` it is configs/quickstart.yaml against nanoGPT's recipe on the same bytes: the quickstart first, then
nanoGPT, reading bytes, with as many steps as fit into the same time. Both are judged in bits per byte of held-out text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from lit_gpt.api import load
from lit_gpt.batch import IGNORE_INDEX
from lit_gpt.data.shard_folder import open_tokens
from lit_gpt.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
NANOGPT = [
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--log_interval=1",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--dropout=0.0",
]
"""The arguments that nanoGPT's README gives for a laptop, less the 2,000 steps."""


def main() -> None:
    """Run all, print a line for each run and the means at the end, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT; without it only ours runs")
    parser.add_argument("--text", type=Path, help="tinyshakespeare.txt")
    parser.add_argument("--quickstart", action="store_true", help="compare on the quickstart's own text instead")
    parser.add_argument("--output", type=Path, default=Path("bench_learning"), help="folder for runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--configs", nargs="+", default=["shakespeare_char_cpu", "shakespeare_char_modern"])
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="the rest goes to `lit_gpt fit`")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.quickstart:
        compare_quickstart(options)
        return
    if options.text is None:
        parser.error("--text is needed: where tinyshakespeare.txt is")
    results: dict[str, list[tuple[float, float]]] = {}
    for seed in options.seeds:
        if options.nanogpt is not None:
            record(results, "nanoGPT", seed, run_nanogpt(options.nanogpt.resolve(), options, seed))
        for config in options.configs:
            record(results, config, seed, run_ours(config, options, seed))
    for name, pairs in results.items():
        seconds, losses = zip(*pairs)
        print(f"{name}: mean loss {statistics.mean(losses):.4f} in {statistics.mean(seconds):.1f} s, {len(pairs)} runs")
    (options.output / "results.json").write_text(json.dumps(results, indent=1))


def record(results: dict[str, list[tuple[float, float]]], name: str, seed: int, result: tuple[float, float]) -> None:
    """Keep one run's (seconds, loss) and print it."""
    results.setdefault(name, []).append(result)
    print(f"{name} seed {seed}: loss {result[1]:.4f} in {result[0]:.1f} s", flush=True)


def run_nanogpt(folder: Path, options: argparse.Namespace, seed: int) -> tuple[float, float]:
    """(seconds, loss) of nanoGPT's recipe."""
    data = folder / "data" / "shakespeare_char"
    if not (data / "val.bin").exists():
        (data / "input.txt").write_text(options.text.read_text())
        subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, stdout=subprocess.DEVNULL)
    seconds, out = run_nanogpt_on("shakespeare_char", 2000, options, seed)
    return seconds, held_out_loss(out / "ckpt.pt", options)


def run_nanogpt_on(dataset: str, n_step: int, options: argparse.Namespace, seed: int) -> tuple[float, Path]:
    """(seconds, output) of its recipe. Its seed is a number in its source, so it is replaced on the way in."""
    folder, out = options.nanogpt.resolve(), (options.output / f"nanogpt_{dataset}_{seed}").resolve()
    source = (folder / "train.py").read_text().replace("manual_seed(1337 +", f"manual_seed({1336 + seed} +")
    length = [f"--max_iters={n_step}", f"--lr_decay_iters={n_step}", f"--dataset={dataset}", f"--out_dir={out}"]
    command = [sys.executable, "-c", source, "config/train_shakespeare_char.py", *NANOGPT, *length]
    # lit_gpt asks for huge pages; nanoGPT as published does not
    env = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=env)
    return sum(float(found) for found in re.findall(r"time ([\d.]+)ms", done.stdout)) / 1000, out


def run_ours(config: str, options: argparse.Namespace, seed: int) -> tuple[float, float]:
    """(seconds, loss) of `lit_gpt fit` with one of our configurations."""
    root = options.output / f"{config}_{seed}_{time.time_ns()}"
    words = [
        "fit", "--config", str(ROOT / "configs" / f"{config}.yaml"),
        "--data.source", str(options.text), "--data.path", str(options.output / "tokens"),
        "--seed_everything", str(seed), "--data.seed", str(seed), "--trainer.default_root_dir", str(root),
        "--samples.prompts", "[]", "--trainer.enable_progress_bar", "false", *options.extra,
    ]  # fmt: skip
    return training_seconds(program(words).stderr), held_out_loss(next(root.rglob("last.ckpt")), options)


def compare_quickstart(options: argparse.Namespace) -> None:
    """Print seconds and bits per byte of both; each seed trains both anew."""
    for seed in options.seeds:
        root, tokens = options.output / f"quickstart_{seed}_{time.time_ns()}", options.output / "stdlib"
        flags = ["--data.path", str(tokens), "--samples.prompts", "[]", "--trainer.enable_progress_bar", "false"]
        fit = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--seed_everything", str(seed), *flags]
        fit += ["--trainer.default_root_dir", str(root)]
        seconds = training_seconds(program(fit).stderr)
        checkpoint = str(next(root.rglob("last.ckpt")))
        validate = ["validate", "--ckpt_path", checkpoint, *flags[:2]]
        found = re.search(r"val/bits_per_byte ([\d.]+)", program(validate).stdout)
        assert found is not None
        print(f"quickstart seed {seed}: {float(found[1]):.4f} bits per byte in {seconds:.1f} s", flush=True)
        write_bytes(tokens, options.nanogpt.resolve() / "data" / "stdlib_bytes")
        short = run_nanogpt_on("stdlib_bytes", 251, options, seed)[0]  # one evaluation on the way, as the long run has
        n_step = int(251 * seconds / short)
        taken, out = run_nanogpt_on("stdlib_bytes", n_step, options, seed)
        bits = held_out_bits(out / "ckpt.pt", options.nanogpt.resolve() / "data" / "stdlib_bytes" / "val.bin")
        print(f"nanoGPT seed {seed}: {bits:.4f} bits per byte in {taken:.1f} s, {n_step} steps", flush=True)


def write_bytes(tokens: Path, folder: Path) -> None:
    """The text of a prepared folder as nanoGPT reads it: a token is a byte."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer.load(tokens)
    for split in ("train", "val"):
        stream = open_tokens(tokens, split)
        ids = stream.read(0, len(stream))
        text = tokenizer.decode_bytes(ids[ids != tokenizer.eot_id].tolist())
        np.frombuffer(text, np.uint8).astype(np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 256}))


@torch.inference_mode()
def held_out_bits(checkpoint: Path, text: Path) -> float:
    """Bits per byte of a model of bytes, in windows of its block, none overlapping."""
    gpt = load(str(checkpoint), precision="fp32", device="cpu")
    ids, size = torch.from_numpy(np.fromfile(text, np.uint16).astype(np.int64)), gpt.config.block_size
    n_row = (len(ids) - 1) // size
    idx, targets = ids[: n_row * size].view(n_row, size), ids[1 : n_row * size + 1].view(n_row, size)
    nll = sum(float(gpt.model(*rows).loss_sum) for rows in zip(idx.split(256), targets.split(256)))
    return nll / math.log(2) / (n_row * size)


def program(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `lit_gpt` on this checkout."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-m", "lit_gpt", *words], check=True, capture_output=True, text=True, env=env
    )


def training_seconds(said: str) -> float:
    """What `fit` says of its time."""
    found = re.search(r"tokens in ([\d.]+) s", said)
    assert found is not None, said
    return float(found[1])


@torch.inference_mode()
def held_out_loss(checkpoint: Path, options: argparse.Namespace) -> float:
    """Mean loss in nats per character over the last tenth, in fp32, in windows of the model's block."""
    gpt = load(str(checkpoint), precision="fp32", device="cpu")
    text = options.text.read_text()
    held_out = text[int(0.9 * len(text)) :]
    if gpt.tokenizer is not None:
        ids = gpt.tokenizer.encode(held_out)
    else:  # a nanoGPT checkpoint has no vocabulary in it: characters in sorted order
        char_ids = {character: index for index, character in enumerate(sorted(set(text)))}
        ids = [char_ids[character] for character in held_out]
    size = gpt.config.block_size
    nll = 0.0
    for start in range(0, len(ids) - 1, size):
        idx = torch.tensor([ids[start : start + size]])
        targets = torch.tensor([ids[start + 1 : start + size + 1]])
        targets = torch.nn.functional.pad(targets, (0, idx.size(1) - targets.size(1)), value=IGNORE_INDEX)
        nll += float(gpt.model(idx, targets).loss_sum)
    return nll / (len(ids) - 1)


if __name__ == "__main__":
    main()
