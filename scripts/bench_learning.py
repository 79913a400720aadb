"""Learning per minute: nanoGPT's CPU recipe and ours in turn, on one machine, measured the same way.

    git clone https://github.com/karpathy/nanoGPT
    python scripts/bench_learning.py --nanogpt nanoGPT --text tinyshakespeare.txt

Each run is a process of its own. Its training time is counted from the first batch to the end of the last step:
compilation, validation and checkpoints on the way are in it, the start of Python is not. Afterwards both models are
judged by one function: fp32 loss over the whole held-out tenth, in windows of the block's length, none overlapping.
nanoGPT is run from the folder that is given and not changed; only its data folder and its output are added.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from lit_gpt.api import load
from lit_gpt.model import IGNORE_INDEX

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
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
]
"""The arguments that nanoGPT's README gives for a laptop."""


def main() -> None:
    """Run all, print a line for each run and the means at the end, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT; without it only ours runs")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--output", type=Path, default=Path("bench_learning"), help="folder for runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--configs", nargs="+", default=["shakespeare_char_cpu", "shakespeare_char_modern"])
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="the rest goes to `lit_gpt fit`")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
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
    """(seconds, loss) of nanoGPT's recipe. Its seed is a number in its source, so it is replaced on the way in."""
    data = folder / "data" / "shakespeare_char"
    if not (data / "val.bin").exists():
        (data / "input.txt").write_text(options.text.read_text())
        subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, stdout=subprocess.DEVNULL)
    source = (folder / "train.py").read_text().replace("manual_seed(1337 +", f"manual_seed({1336 + seed} +")
    out = (options.output / f"nanogpt_{seed}").resolve()
    command = [sys.executable, "-c", source, "config/train_shakespeare_char.py", *NANOGPT, f"--out_dir={out}"]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    seconds = sum(float(found) for found in re.findall(r"time ([\d.]+)ms", done.stdout)) / 1000
    return seconds, held_out_loss(out / "ckpt.pt", options)


def run_ours(config: str, options: argparse.Namespace, seed: int) -> tuple[float, float]:
    """(seconds, loss) of `lit_gpt fit` with one of our configurations."""
    root = options.output / f"{config}_{seed}_{time.time_ns()}"
    command = [
        sys.executable, "-m", "lit_gpt", "fit", "--config", str(ROOT / "configs" / f"{config}.yaml"),
        "--data.source", str(options.text), "--data.path", str(options.output / "tokens"),
        "--seed_everything", str(seed), "--data.seed", str(seed), "--trainer.default_root_dir", str(root),
        "--samples.prompts", "[]", "--trainer.enable_progress_bar", "false", *options.extra,
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    found = re.search(r"tokens in ([\d.]+) s", done.stderr)
    assert found is not None, done.stderr
    return float(found[1]), held_out_loss(next(root.rglob("last.ckpt")), options)


@torch.inference_mode()
def held_out_loss(checkpoint: Path, options: argparse.Namespace) -> float:
    """Mean loss in nats per character over the last tenth, in fp32, in windows of the model's block."""
    gpt = load(str(checkpoint), precision="fp32", device="cpu")
    text = options.text.read_text()
    held_out = text[int(0.9 * len(text)) :]
    if gpt.tokenizer is not None:
        ids = gpt.tokenizer.encode(held_out)
    else:  # a nanoGPT checkpoint has no vocabulary in it: characters in sorted order
        place = {character: index for index, character in enumerate(sorted(set(text)))}
        ids = [place[character] for character in held_out]
    size = gpt.config.block_size
    nll = 0.0
    for start in range(0, len(ids) - 1, size):
        idx = torch.tensor([ids[start : start + size]])
        targets = torch.tensor([ids[start + 1 : start + size + 1]])
        targets = torch.nn.functional.pad(targets, (0, idx.size(1) - targets.size(1)), value=IGNORE_INDEX)
        nll += float(gpt.model(idx, targets)[0])
    return nll / (len(ids) - 1)


if __name__ == "__main__":
    main()
