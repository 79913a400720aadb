"""Training steps beside nanoGPT: the same shape, the same batch, one process, in turn; and the peak memory of each.

    git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT
    python scripts/bench_train.py --nanogpt /tmp/nanoGPT --plot docs/training.svg

A step is forward and backward pass, gradient clipping, the optimizer, and clearing the gradients. nanoGPT runs as its
train.py does on the device: fp32 on a CPU, bf16 autocast on a GPU. lit_gpt runs in the precision that `auto` finds, and
in fp32. All see the same random batch. A figure is the fastest step of all rounds, which a busy machine hurts least.
Memory is the largest resident set of a process that does nothing else (on a GPU: the most that was allocated).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_gpt.config import GPTConfig
from lit_gpt.files import atomic_write
from lit_gpt.model import GPT
from lit_gpt.optim import OptimizerConfig, make_optimizer
from lit_gpt.precision import resolve_precision

Step = Callable[[Tensor, Tensor], float]
"""One training step on (idx, targets); its loss."""

NANO = {"vocab_size": 65, "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}  # nanoGPT's recipe for a CPU


class Work(NamedTuple):
    """What is trained, on how much, how often it is timed, and the ratio to nanoGPT that was aimed at."""

    config: GPTConfig
    batch: int
    length: int
    steps: int
    aim: float


WORKS = {
    "124M, 2 × 512": Work(GPTConfig(), 2, 512, 1, 3.5),
    "0.8M, 12 × 64": Work(GPTConfig(**NANO), 12, 64, 20, 1.15),  # type: ignore[arg-type]
}
MEMORY_WORK = Work(GPTConfig(), 8, 1024, 1, 0.6)


def ours(work: Work, precision: str, device: str, compile: bool = False, checkpointing: bool = False) -> Step:
    """This project's model and optimizer, as `fit` runs them."""
    torch.manual_seed(0)
    model = GPT(work.config).to(device).train()
    model.activation_checkpointing = checkpointing
    optimizer = make_optimizer(model, OptimizerConfig(), fused=True)
    if compile:
        model.compile()
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed")

    def step(idx: Tensor, targets: Tensor) -> float:
        with autocast:
            nll, tokens = model(idx, targets)
            loss = nll / tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def nanogpt(work: Work, folder: str, device: str, compile: bool = False) -> Step:
    """karpathy/nanoGPT's model, optimizer and loop body."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from model import GPT as NanoGPT  # type: ignore[import-not-found]
    from model import GPTConfig as NanoConfig

    torch.manual_seed(0)
    shape = {name: getattr(work.config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")}
    with contextlib.redirect_stdout(sys.stderr):
        model = NanoGPT(NanoConfig(**shape, bias=True, dropout=0.0)).to(device).train()
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
    run: Any = torch.compile(model) if compile else model
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def step(idx: Tensor, targets: Tensor) -> float:
        with autocast:
            _, loss = run(idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def batch_of(work: Work, device: str) -> tuple[Tensor, Tensor]:
    """Random ids and targets, (B, T) each."""
    ids = torch.randint(
        work.config.vocab_size, (2, work.batch, work.length), generator=torch.Generator().manual_seed(1)
    )
    return ids[0].to(device), ids[1].to(device)


def measure(work: Work, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of every way to train `work`."""
    device = arguments.device
    decision = resolve_precision("auto", work.config, work.batch, work.length, device)
    print(decision, file=sys.stderr)
    ways = {
        f"lit_gpt auto ({decision.precision})": ours(work, decision.precision, device),
        "lit_gpt 32-true": ours(work, "32-true", device),
    }
    if arguments.compile:
        ways[f"lit_gpt auto ({decision.precision}), compiled"] = ours(work, decision.precision, device, compile=True)
        ways["lit_gpt 32-true, compiled"] = ours(work, "32-true", device, compile=True)
    if arguments.nanogpt:
        ways["nanoGPT"] = nanogpt(work, arguments.nanogpt, device)
        if arguments.compile:
            ways["nanoGPT, compiled"] = nanogpt(work, arguments.nanogpt, device, compile=True)
    idx, targets = batch_of(work, device)
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(arguments.rounds + 1):  # the first warms up
        for name, step in ways.items():
            for _ in range(work.steps):
                start = time.perf_counter()
                step(idx, targets)  # ends with the loss on the host, hence with the device's work done
                best[name] = min(best[name], time.perf_counter() - start if turn else float("inf"))
        print(f"round {turn} of {arguments.rounds}", file=sys.stderr, flush=True)
    return {name: idx.numel() / seconds for name, seconds in best.items()}


def peak_memory(way: str, arguments: argparse.Namespace) -> float:
    """GiB that two steps of `MEMORY_WORK` take, in a process of their own."""
    command = [sys.executable, __file__, "--device", arguments.device, "--memory_of", way]
    if arguments.nanogpt:
        command += ["--nanogpt", arguments.nanogpt]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def print_peak_memory(way: str, arguments: argparse.Namespace) -> None:
    """The other side of `peak_memory`."""
    device = arguments.device
    if way == "nanoGPT":
        step = nanogpt(MEMORY_WORK, arguments.nanogpt, device)
    else:
        step = ours(MEMORY_WORK, "bf16-mixed", device, checkpointing="checkpointing" in way)
    for _ in range(2):
        step(*batch_of(MEMORY_WORK, device))
    if device == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**30)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def report(speeds: dict[str, dict[str, float]], memory: dict[str, float]) -> None:
    """Markdown on stdout."""
    for name, figures in speeds.items():
        print(f"\n| {name} | tok/s | ratio to nanoGPT |\n|---|---|---|")
        for way, speed in sorted(figures.items(), key=lambda item: -item[1]):
            ratio = speed / figures["nanoGPT"] if "nanoGPT" in figures else float("nan")
            print(f"| {way} | {speed:.0f} | {ratio:.2f} |")
        print(f"\nAim: {WORKS[name].aim} times nanoGPT.")
    if memory:
        print("\n| peak memory, 124M, 8 × 1,024 | GiB | ratio to nanoGPT |\n|---|---|---|")
        for way, size in memory.items():
            print(f"| {way} | {size:.2f} | {size / memory.get('nanoGPT', float('nan')):.2f} |")
        print(f"\nAim: at most {MEMORY_WORK.aim}.")


def plot(speeds: dict[str, dict[str, float]], path: str) -> None:
    """Bars of tokens per second, one panel for each work."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(speeds), figsize=(5.5 * len(speeds), 2.6), squeeze=False, layout="constrained")
    for axis, (name, figures) in zip(axes[0], speeds.items()):
        ordered = sorted(figures.items(), key=lambda item: item[1])
        colors = ["#c2410c" if way.startswith("lit_gpt") else "#94a3b8" for way, _ in ordered]
        bars = axis.barh([way for way, _ in ordered], [speed for _, speed in ordered], color=colors)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.set(title=f"training step, {name}", xlabel="tokens per second")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    with atomic_write(path) as file:
        figure.savefig(file, format="svg")


def main() -> None:
    """Measure, print, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a clone of karpathy/nanoGPT")
    parser.add_argument("--works", nargs="*", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="time compiled models too")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too: some minutes and 16 GiB")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--plot", help="write an SVG here")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_peak_memory(arguments.memory_of, arguments)
        return
    speeds = {name: measure(WORKS[name], arguments) for name in arguments.works}
    ways = ["lit_gpt", "lit_gpt, activation checkpointing", *(["nanoGPT"] if arguments.nanogpt else [])]
    memory = {way: peak_memory(way, arguments) for way in ways} if arguments.memory else {}
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    report(speeds, memory)
    if arguments.json:
        with atomic_write(arguments.json, "w") as file:
            json.dump({"speeds": speeds, "memory": memory}, file, indent=1)
    if arguments.plot:
        plot(speeds, arguments.plot)


if __name__ == "__main__":
    main()
