"""LoRA beside full fine-tuning: memory and time of a step; and two adapters served together beside one.

    python scripts/bench_lora.py train
    python scripts/bench_lora.py train --base_precision int8 --steps 2
    python scripts/bench_lora.py serve

`train`: a step of GPT-2 124M on 4 × 256 tokens is forward and backward pass, gradient clipping, AdamW, and clearing the
gradients; LoRA has rank 8 on all linear layers of the blocks. Both are in the same precision and each in a process of
its own. Memory is the largest resident set less what the process had before the model was made; time is that of the
fastest step. What was aimed at: at most 0.5 of the memory, at least 1.25 times as fast.

`serve`: a batch of 16 streams decodes greedily with one adapter, then 8 streams with each of two, in turn, in one
process; a figure is the fastest of all rounds, in tokens a second. Aimed at: at least 0.7 of one adapter's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.inference.prepare import prepare_adapters, prepare_for_inference
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.model.lora import AdapterWeights, LoRAConfig, LoRALinear, NamedAdapters, add_lora
from lit_gpt.train.adapter import AdapterTraining
from lit_gpt.train.optim import OptimizerConfig, make_optimizer
from lit_gpt.train.precision import resolve_precision

BATCH, LENGTH = 4, 256
MEMORY_AIM, SPEED_AIM, SERVE_AIM = 0.5, 1.25, 0.7
STREAMS = 16


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def trained_model(kind: str, precision: str, base_precision: str, preset: str) -> GPT:
    """A random GPT in training, whole or with LoRA over it."""
    torch.manual_seed(0)
    config = GPTConfig.from_preset(preset)
    model = GPT(config).train()
    if kind == "full":
        return model
    training = AdapterTraining(LoRAConfig(rank=8, alpha=16), base_precision)
    return training.build(config, model.state_dict(), precision)


def step_function(model: GPT, precision: str) -> Callable[[Tensor, Tensor], float]:
    """One training step, as `fit` makes it."""
    optimizer = make_optimizer(model, OptimizerConfig(lr=1e-4))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")

    def step(idx: Tensor, targets: Tensor) -> float:
        with autocast:
            output = model(idx, targets)
        loss = output.loss_sum / output.n_targets
        loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(kind: str, precision: str, base_precision: str, preset: str, steps: int) -> dict[str, float]:
    """Memory and time of one kind of training, in this process."""
    idx = torch.randint(1000, (2, BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    tiny = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=8, block_size=8))
    step_function(tiny, precision)(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))
    before = resident("VmRSS")  # with what PyTorch loads at the first step
    step = step_function(trained_model(kind, precision, base_precision, preset), precision)
    ctypes.CDLL(None).malloc_trim(0)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step(idx[0], idx[1])
        seconds.append(time.perf_counter() - start)
    return {"bytes": resident("VmHWM") - before, "whole": resident("VmHWM"), "seconds": min(seconds)}


def compare_training(options: argparse.Namespace) -> None:
    """Print both kinds and their ratios."""
    precision = options.precision
    if precision == "auto":
        precision = str(resolve_precision("auto", GPTConfig.from_preset(options.preset), BATCH, LENGTH).precision)
    results = {}
    for kind in ("full", "lora"):
        words = ["one", "--kind", kind, "--precision", precision, "--base_precision", options.base_precision]
        words += ["--preset", options.preset, "--steps", str(options.steps)]
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
        results[kind] = one = json.loads(done.stdout)
        print(
            f"{kind}: {one['bytes'] / 2**20:.0f} MiB above the start ({one['whole'] / 2**20:.0f} in all), "
            f"{one['seconds']:.3f} s a step, {precision}"
        )
    memory = results["lora"]["bytes"] / results["full"]["bytes"]
    whole = results["lora"]["whole"] / results["full"]["whole"]
    speed = results["full"]["seconds"] / results["lora"]["seconds"]
    print(f"memory {memory:.3f} of full fine-tuning ({whole:.3f} with PyTorch itself); aimed at {MEMORY_AIM} at most")
    print(f"speed  {speed:.3f} of full fine-tuning; aimed at {SPEED_AIM} at least")


def random_adapter(config: GPTConfig, seed: int) -> AdapterWeights:
    """Terms of rank 8 for all linear layers, whose B are not zero."""
    torch.manual_seed(seed)
    model = GPT(config)
    add_lora(model, config, LoRAConfig(rank=8, alpha=16))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    with torch.no_grad():
        for module in layers.values():
            for factor in module.factors():
                factor.b.normal_(std=0.02)
    return AdapterWeights({name: module.factors() for name, module in layers.items()})


def decode(engine: Engine, adapters: list[int], tokens: int) -> float:
    """Tokens a second of one batch of streams."""
    settings = GenerationConfig(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)
    for number, adapter in enumerate(adapters):
        engine.submit([number + 1] * 8, settings, adapter=adapter)
    engine.step()  # the prompts
    start, count = time.perf_counter(), 0
    for output in engine.drain():
        count += len(output.tokens)
    return count / (time.perf_counter() - start)


def compare_serving(options: argparse.Namespace) -> None:
    """Print tokens a second with one adapter and with two, and without any."""
    config = GPTConfig.from_preset(options.preset)
    adapters = {name: random_adapter(config, seed) for seed, name in enumerate(("one", "two"), 1)}
    torch.manual_seed(0)
    model = prepare_for_inference(GPT(config), options.precision)
    bank = prepare_adapters(model, NamedAdapters(adapters, config))
    engine = Engine(model, config, max_slots=STREAMS, adapters=bank)
    half = STREAMS // 2
    kinds = {"none": [0] * STREAMS, "one": [1] * STREAMS, "two": [1] * half + [2] * half}
    best = dict.fromkeys(kinds, 0.0)
    for _ in range(options.rounds):
        for kind, numbers in kinds.items():
            best[kind] = max(best[kind], decode(engine, numbers, options.tokens))
    for kind, speed in best.items():
        print(f"{kind}: {speed:.1f} tokens/s by {STREAMS} streams")
    print(f"two adapters {best['two'] / best['one']:.3f} of one; aimed at {SERVE_AIM} at least")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "serve", "one"))
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--precision", default=None, help="fp32 by default; of training, by the Trainer's name")
    parser.add_argument("--base_precision", default="auto")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--kind", choices=("full", "lora"), default="lora")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    options.precision = options.precision or ("fp32" if options.what == "serve" else "32-true")
    if options.what == "serve":
        compare_serving(options)
    elif options.what == "train":
        compare_training(options)
    else:
        result = measure(options.kind, options.precision, options.base_precision, options.preset, options.steps)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
