"""Training steps beside nanoGPT: the same shape, the same batch, in turn; and the peak memory of each.

    git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT
    python scripts/bench_train.py --nanogpt /tmp/nanoGPT --plot docs/training.svg

A step is forward and backward pass, gradient clipping, the optimizer, and clearing the gradients. nanoGPT runs as its
train.py does on the device: fp32 on a CPU, bf16 autocast on a GPU. lit_gpt runs in the precision that `auto` finds, and
in fp32. All see the same random batch, each in a process of its own. A figure is the fastest step of all rounds, which
a busy machine hurts least. `--profile` tells which share of a step is matrix products, and at what rate they are done
beside that of one large product: what two ways share, neither can win. Memory is the largest resident set of a process
that does nothing else (on a GPU: the most that was allocated).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_gpt.files.atomic import atomic_write
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.train.optim import OptimizerConfig, make_optimizer
from lit_gpt.train.precision import resolve_precision

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
    "124M, 8 × 1,024": Work(GPTConfig(), 8, 1024, 1, 0.6),
}
*TIMED, MEMORY = WORKS
ONEDNN_PRODUCT = "mkldnn::_linear_pointwise"
"""What the profiler calls it."""


def ours(work: Work, precision: str, device: str, compile: bool = False, checkpointing: bool = False) -> Step:
    """This project's model and optimizer, as `fit` runs them."""
    torch.manual_seed(0)
    model = GPT(work.config).to(device).train()
    model.activation_checkpointing = checkpointing
    optimizer = make_optimizer(model, OptimizerConfig(), fused=True)
    if compile:  # on a CPU block by block, as `fit` does
        for part in model.h if device == "cpu" else [model]:
            part.compile()
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed")

    def step(idx: Tensor, targets: Tensor) -> float:
        with autocast:
            output = model(idx, targets)
            loss = output.loss_sum / output.n_targets
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


class Worker:
    """One way to train, in a process of its own: what one does for its memory and threads is no gift to the others."""

    def __init__(self, way: str, work: str, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--device", arguments.device, "--worker", way, "--works", work]
        if arguments.nanogpt:
            command += ["--nanogpt", arguments.nanogpt]
        # Huge pages are asked for by lit_gpt as it is imported; nanoGPT as published does not.
        env = {**os.environ, **({"THP_MEM_ALLOC_ENABLE": "0"} if way.startswith("nanoGPT") else {})}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, what: str) -> Any:
        """Seconds of the fastest of so many steps; for "memory" the peak in GiB, for "profile" those of `products`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(arguments: argparse.Namespace) -> None:
    """The other side of `Worker`."""
    way, device, work = arguments.worker, arguments.device, WORKS[arguments.works[0]]
    compile, checkpointing = "compiled" in way, "checkpointing" in way
    if way.startswith("nanoGPT"):
        step = nanogpt(work, arguments.nanogpt, device, compile)
    else:
        step = ours(work, "32-true" if "32-true" in way else "bf16-mixed", device, compile, checkpointing)
    batch = batch_of(work, device)
    for line in sys.stdin:
        if line.strip() == "profile":
            print(json.dumps(products(step, batch, work.steps)), flush=True)
            continue
        if line.strip() == "memory":
            print(torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else peak_gib(), flush=True)
            continue
        best = float("inf")
        for _ in range(int(line)):
            start = time.perf_counter()
            step(*batch)  # ends with the loss on the host, hence with the device's work done
            best = min(best, time.perf_counter() - start)
        print(best, flush=True)


def products(step: Step, batch: tuple[Tensor, Tensor], n_steps: int) -> list[float]:
    """Seconds of a step, of the matrix products in it, and their floating-point operations, under the profiler."""
    names = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", ONEDNN_PRODUCT)
    n_steps, cpu = max(3, n_steps), [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, with_flops=True, record_shapes=True) as profile:
        start = time.perf_counter()
        for _ in range(n_steps):
            step(*batch)
        total = time.perf_counter() - start
    events = [event for event in profile.key_averages(group_by_input_shape=True) if event.key in names]
    seconds = sum(event.self_cpu_time_total for event in events) / 1e6
    return [total / n_steps, seconds / n_steps, sum(map(operations, events)) / n_steps]


def operations(event: Any) -> int:
    """Floating-point operations of a kind of product, of all its calls: the profiler does not know oneDNN's."""
    if event.key != ONEDNN_PRODUCT:
        return int(event.flops)
    x, weight, *_ = event.input_shapes
    return int(2 * event.count * math.prod(x) * weight[0])


def peak_rate() -> float:
    """Floating-point operations a second of one large product in fp32."""
    a, b, best = torch.randn(2048, 2048), torch.randn(2048, 2048), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def peak_gib() -> float:
    """The most that this process has had resident. Not getrusage: that counts what the process was forked from."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def measure(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of every way to do a work."""
    work, device = WORKS[name], arguments.device
    decision = resolve_precision("auto", work.config, work.batch, work.length, device)
    print(decision, file=sys.stderr)
    ways = [f"lit_gpt auto ({decision.precision})", "lit_gpt 32-true"]
    ways += [f"{way}, compiled" for way in ways if arguments.compile]
    if arguments.nanogpt:
        ways += ["nanoGPT", "nanoGPT, compiled"] if arguments.compile else ["nanoGPT"]
    workers = {way: Worker(way, name, arguments) for way in ways}
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(arguments.rounds + 1):  # the first warms up
        for way, worker in workers.items():
            seconds = worker.ask(str(work.steps))
            best[way] = min(best[way], seconds if turn else float("inf"))
            time.sleep(0.2)  # threads spin for a while after their work
        print(f"round {turn} of {arguments.rounds}", file=sys.stderr, flush=True)
    if arguments.profile:
        print(f"\n{name}; one large product in fp32: {peak_rate() / 1e9:.0f} GFLOP/s")
        print("\n| under the profiler | ms a step | of it products | GFLOP/s in these |\n|---|---|---|---|")
        for way, worker in workers.items():
            total, seconds, flops = worker.ask("profile")
            rate = flops / seconds / 1e9
            print(
                f"| {way} | {total * 1e3:.1f} | {seconds * 1e3:.1f} ({seconds / total:.0%}) | {rate:.0f} |", flush=True
            )
    for worker in workers.values():
        worker.close()
    return {way: work.batch * work.length / seconds for way, seconds in best.items()}


def peak_memory(way: str, arguments: argparse.Namespace) -> float:
    """GiB that two steps of the memory's work take, in a process of their own."""
    worker = Worker(way, MEMORY, arguments)
    worker.ask("2")
    size = worker.ask("memory")
    worker.close()
    return size


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
        print(f"\nAim: at most {WORKS[MEMORY].aim}.")


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
    parser.add_argument("--works", nargs="*", choices=list(WORKS), default=TIMED)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="time compiled models too")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too: some minutes and 16 GiB")
    parser.add_argument("--profile", action="store_true", help="tell what share of a step is matrix products (CPU)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--plot", help="write an SVG here")
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments)
        return
    speeds = {name: measure(name, arguments) for name in arguments.works}
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
