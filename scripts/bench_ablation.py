"""Effect of each part of the modern block on the loss: the recipe with one part changed, at equal time.

    python scripts/bench_ablation.py --text tinyshakespeare.txt --seeds 1 2 3

The recipe is `configs/shakespeare_char_modern.yaml`: its model, optimizer, schedule and batch, in bf16 autocast where a
CPU has that, its blocks compiled. First the training steps of all variants are timed in turn; then every variant gets
as many steps as `--seconds` hold, its learning rate falling to 0 with the last. Compilation is not counted: it is much
the same for all. The loss is over the whole held-out tenth in fp32.
Each is run with several seeds. Runs already in the results file are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lit_gpt.files.atomic import atomic_write
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.train.optim import OptimizerConfig, clip_gradients, make_optimizer
from lit_gpt.train.precision import cpu_has_bf16, muon_arithmetic
from lit_gpt.train.schedule import ScheduleConfig

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "shakespeare_char_modern.yaml"

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the recipe": ({}, {}),
    "learned positions instead of RoPE": ({"position": "learned"}, {}),
    "LayerNorm instead of RMSNorm": ({"norm": "layernorm"}, {}),
    "no QK-norm": ({"qk_norm": False}, {}),
    "GELU instead of SwiGLU": ({"mlp": "gelu", "intermediate_size": None}, {}),
    "ReLU² instead of SwiGLU": ({"mlp": "relu2", "intermediate_size": None}, {}),
    "with biases": ({"qkv_bias": True, "proj_bias": True, "mlp_bias": True}, {}),
    "zero-initialised projections": ({"zero_init_proj": True}, {}),
    "ReLU² and zero-initialised projections": (
        {"mlp": "relu2", "intermediate_size": None, "zero_init_proj": True},
        {},
    ),
    "with a logit soft-cap of 15": ({"logit_softcap": 15.0}, {}),
    "embeddings not tied": ({"tie_embeddings": False}, {}),
    "AdamW at 0.002 instead of Muon": ({}, {"name": "adamw", "lr": 0.002}),
    "AdamW at 0.004 instead of Muon": ({}, {"name": "adamw", "lr": 0.004}),
    "AdamW at 0.008 instead of Muon": ({}, {"name": "adamw", "lr": 0.008}),
}
"""What is changed in the model, and in the optimizer."""

Batches = Callable[[], tuple[Tensor, Tensor]]


class Trainee:
    """One variant of the recipe with fresh weights and its optimizer."""

    def __init__(self, variant: str, recipe: dict[str, Any], n_vocab: int, seed: int) -> None:
        model, optimizer = VARIANTS[variant]
        torch.manual_seed(seed)
        self.config = GPTConfig.from_dict({**recipe["model"]["config"], "vocab_size": n_vocab, **model})
        self.model = GPT(self.config).train()
        for block in self.model.h:
            block.compile()
        settings = replace(OptimizerConfig(**recipe["model"]["optimizer"]), **optimizer)
        self.optimizer = make_optimizer(self.model, settings, muon_arithmetic=muon_arithmetic("cpu"))
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.clip = recipe["trainer"]["gradient_clip_val"]

    def step(self, batch: tuple[Tensor, Tensor], factor: float) -> None:
        """One optimizer step at `factor` of the peak rates."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            output = self.model(*batch)
        (output.loss_sum / output.n_targets).backward()
        clip_gradients(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def loss(self, ids: Tensor) -> float:
        """Nats per character of `ids`, in windows of the block's length, none overlapping."""
        size = self.config.block_size
        self.model.eval()
        pieces = [(ids[i : i + size], ids[i + 1 : i + size + 1]) for i in range(0, len(ids) - 1, size)]
        total = sum(float(self.model(x[None][:, : len(y)], y[None]).loss_sum) for x, y in pieces)
        return total / (len(ids) - 1)


def batches(ids: Tensor, rows: int, size: int, seed: int) -> Batches:
    """Random windows."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(ids) - size, (rows, 1), generator=generator)
        windows = ids[starts + torch.arange(size + 1)]
        return windows[:, :-1], windows[:, 1:]

    return draw


def step_seconds(
    variants: list[str], recipe: dict[str, Any], ids: Tensor, n_vocab: int, rounds: int
) -> dict[str, float]:
    """Seconds of one step of each variant: the lower quartile of `rounds` steps, all variants in turn."""
    trainees = {variant: Trainee(variant, recipe, n_vocab, 0) for variant in variants}
    draw = batches(ids, recipe["data"]["batch_size"], recipe["model"]["config"]["block_size"], 0)
    for variant, trainee in trainees.items():
        print(f"compiling: {variant}", file=sys.stderr, flush=True)
        for _ in range(3):
            trainee.step(draw(), 0.1)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, trainee in trainees.items():
            batch = draw()
            for warm in (True, False):  # the caches of the processor belong to somebody else after a turn
                start = time.process_time()
                trainee.step(batch, 0.1)
                if not warm:
                    seconds[variant].append(time.process_time() - start)
    return {variant: statistics.quantiles(taken, n=4)[0] for variant, taken in seconds.items()}


def main() -> None:
    """Time, train, print a table; results are kept run by run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--output", type=Path, default=Path("bench_ablation.json"), help="results, added to")
    parser.add_argument("--seconds", type=float, default=60, help="processor time of one run's steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each variant")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 1000
    recipe = yaml.safe_load(RECIPE.read_text())
    text = options.text.read_text()
    char_ids = {character: index for index, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([char_ids[character] for character in text])
    train, held_out = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    results: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    if not set(options.variants) <= results.get("seconds", {}).keys():
        results["seconds"] = step_seconds(options.variants, recipe, train, len(char_ids), options.rounds)
        keep(results, options.output)
    torch._dynamo.reset()
    schedule = ScheduleConfig(**recipe["model"]["schedule"])
    for seed in options.seeds:
        for variant in options.variants:
            runs = results.setdefault("loss", {}).setdefault(variant, {})
            if str(seed) in runs:
                continue
            n_step = int(options.seconds / results["seconds"][variant])
            trainee, factor = Trainee(variant, recipe, len(char_ids), seed), schedule.factor(n_step)
            draw = batches(train, recipe["data"]["batch_size"], trainee.config.block_size, seed)
            for i in range(n_step):
                trainee.step(draw(), factor(i))
            runs[str(seed)] = trainee.loss(held_out)
            print(f"{variant}, seed {seed}: {runs[str(seed)]:.4f} after {n_step} steps", file=sys.stderr, flush=True)
            keep(results, options.output)
    report(results, options.seconds)


def keep(results: dict[str, Any], path: Path) -> None:
    """Write what there is."""
    with atomic_write(path, "w") as file:
        json.dump(results, file, indent=1, ensure_ascii=False)


def report(results: dict[str, Any], seconds: float) -> None:
    """Markdown on stdout: the mean of each variant, its distance from the recipe's, and the range of its seeds."""
    base = statistics.mean(results["loss"]["the recipe"].values()) if "the recipe" in results["loss"] else float("nan")
    print("| variant | ms a step | steps | mean loss | against the recipe | range |\n|---|---|---|---|---|---|")
    for variant, runs in results["loss"].items():
        losses, step = list(runs.values()), results["seconds"][variant]
        row = f"| {variant} | {step * 1e3:.1f} | {int(seconds / step)} | {statistics.mean(losses):.4f} "
        print(row + f"| {statistics.mean(losses) - base:+.4f} | {min(losses):.4f} … {max(losses):.4f} |")


if __name__ == "__main__":
    main()
