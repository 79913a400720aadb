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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from ablation_parts import CautiousMuon, ExtendedGPT
from torch import Tensor

from lit_gpt.files.atomic import atomic_write
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.train.optim import CompositeOptimizer, OptimizerConfig, clip_gradients, make_optimizer
from lit_gpt.train.precision import cpu_has_bf16, muon_arithmetic
from lit_gpt.train.schedule import ScheduleConfig

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "shakespeare_char_modern.yaml"


@dataclass(frozen=True)
class Variant:
    """What is changed.

    Attributes:
        model: fields of the model's configuration.
        optimizer: fields of the optimizer's.
        parts: of `ablation_parts.py`.
        rows: sizes of the batch, each for an equal share of the time, and the learning rate as the root of the size.
    """

    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()


_RELU2 = {"mlp": "relu2", "intermediate_size": None}
_SCALARS = ("residual scalars", "x0 scalars")
VARIANTS: dict[str, Variant] = {
    "the recipe": Variant(),
    "learned positions instead of RoPE": Variant({"position": "learned"}),
    "LayerNorm instead of RMSNorm": Variant({"norm": "layernorm"}),
    "no QK-norm": Variant({"qk_norm": False}),
    "GELU instead of SwiGLU": Variant({"mlp": "gelu", "intermediate_size": None}),
    "ReLU² instead of SwiGLU": Variant(_RELU2),
    "with biases": Variant({"qkv_bias": True, "proj_bias": True, "mlp_bias": True}),
    "zero-initialised projections": Variant({"zero_init_proj": True}),
    "ReLU² and zero-initialised projections": Variant(_RELU2 | {"zero_init_proj": True}),
    "with a logit soft-cap of 15": Variant({"logit_softcap": 15.0}),
    "embeddings not tied": Variant({"tie_embeddings": False}),
    "AdamW at 0.002 instead of Muon": Variant({}, {"name": "adamw", "lr": 0.002}),
    "AdamW at 0.004 instead of Muon": Variant({}, {"name": "adamw", "lr": 0.004}),
    "AdamW at 0.008 instead of Muon": Variant({}, {"name": "adamw", "lr": 0.008}),
    "residual scalars": Variant(parts=("residual scalars",)),
    "x0 scalars": Variant(parts=("x0 scalars",)),
    "residual and x0 scalars": Variant(parts=_SCALARS),
    "value embeddings": Variant(parts=("value embeddings",)),
    "U-net skips": Variant(parts=("U-net skips",)),
    "Muon instead of NorMuon": Variant({}, {"muon_beta2": 0.0}),
    "cautious decay of 0.1": Variant({}, {"muon_weight_decay": 0.1}, ("cautious decay",)),
    "cautious decay of 0.4": Variant({}, {"muon_weight_decay": 0.4}, ("cautious decay",)),
    "a batch of 6, 9, 12 rows": Variant(rows=(6, 9, 12)),
    "a batch of 8, 12, 16 rows": Variant(rows=(8, 12, 16)),
    "a batch of 6 rows": Variant(rows=(6,)),
    "scalars and value embeddings": Variant(parts=(*_SCALARS, "value embeddings")),
}

Batches = Callable[[int], tuple[Tensor, Tensor]]
SHARES = 100_000
"""The learning rate is scheduled over the share of the time that is over, in so many parts."""


class Trainee:
    """One variant of the recipe with fresh weights and its optimizer."""

    def __init__(self, variant: Variant, recipe: dict[str, Any], n_vocab: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.config = GPTConfig.from_dict({**recipe["model"]["config"], "vocab_size": n_vocab, **variant.model})
        is_cautious = "cautious decay" in variant.parts
        extended = variant.parts and not is_cautious
        self.model = (ExtendedGPT(self.config, variant.parts) if extended else GPT(self.config)).train()
        for block in self.model.h:
            block.compile()
        settings = replace(OptimizerConfig(**recipe["model"]["optimizer"]), **variant.optimizer)
        self.optimizer = make_optimizer(self.model, settings, muon_arithmetic=muon_arithmetic("cpu"))
        if isinstance(self.optimizer, CompositeOptimizer) and is_cautious:
            muon, *rest = self.optimizer.parts
            arithmetic = muon_arithmetic("cpu")
            self.muon = CautiousMuon(muon.param_groups, settings.muon_momentum, arithmetic, settings.muon_beta2)
            self.optimizer = CompositeOptimizer(self.muon, *rest)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.clip = recipe["trainer"]["gradient_clip_val"]

    def step(self, batch: tuple[Tensor, Tensor], factor: float) -> None:
        """One optimizer step at `factor` of the peak rates."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * factor
        if hasattr(self, "muon"):
            self.muon.factor = factor
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


def batches(ids: Tensor, size: int, seed: int) -> Batches:
    """So many random windows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(ids) - size, (rows, 1), generator=generator)
        windows = ids[starts + torch.arange(size + 1)]
        return windows[:, :-1], windows[:, 1:]

    return draw


def step_seconds(
    variants: list[str], recipe: dict[str, Any], ids: Tensor, n_vocab: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of one step of each variant, at each size of its batch: the lower quartile of `rounds`, all in turn."""
    trainees = {name: Trainee(VARIANTS[name], recipe, n_vocab, 0) for name in variants}
    draw = batches(ids, recipe["model"]["config"]["block_size"], 0)
    kinds = [(name, rows) for name in variants for rows in batch_sizes(name, recipe)]
    for name, rows in kinds:
        print(f"compiling: {name}, {rows} rows", file=sys.stderr, flush=True)
        for _ in range(3):
            trainees[name].step(draw(rows), 0.1)
    seconds: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for name, rows in kinds:
            batch = draw(rows)
            for warm in (True, False):  # the caches of the processor belong to somebody else after a turn
                start = time.process_time()
                trainees[name].step(batch, 0.1)
                if not warm:
                    seconds[name, rows].append(time.process_time() - start)
    lower = {kind: statistics.quantiles(taken, n=4)[0] for kind, taken in seconds.items()}
    return {name: [lower[name, rows] for rows in batch_sizes(name, recipe)] for name in variants}


def batch_sizes(name: str, recipe: dict[str, Any]) -> tuple[int, ...]:
    """Of a variant, one after another."""
    return VARIANTS[name].rows or (recipe["data"]["batch_size"],)


def steps_of(seconds: float, each: list[float]) -> list[int]:
    """How many steps an equal share of the time holds, for each size of the batch."""
    return [int(seconds / len(each) / step) for step in each]


def train(name: str, recipe: dict[str, Any], draw: Batches, n_vocab: int, seed: int, counts: list[int]) -> Trainee:
    """A run of so many steps at each size of the batch."""
    trainee = Trainee(VARIANTS[name], recipe, n_vocab, seed)
    at = ScheduleConfig(**recipe["model"]["schedule"]).factor(SHARES)
    for phase, (rows, count) in enumerate(zip(batch_sizes(name, recipe), counts, strict=True)):
        scale = (rows / recipe["data"]["batch_size"]) ** 0.5
        for i in range(count):
            share = (phase + i / count) / len(counts)
            trainee.step(draw(rows), scale * at(int(share * SHARES)))
    return trainee


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
    training, held_out = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    results: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    if not set(options.variants) <= results.get("seconds", {}).keys():
        results["seconds"] = step_seconds(options.variants, recipe, training, len(char_ids), options.rounds)
        keep(results, options.output)
    torch._dynamo.reset()
    for seed in options.seeds:
        for name in options.variants:
            runs = results.setdefault("loss", {}).setdefault(name, {})
            if str(seed) in runs:
                continue
            counts = steps_of(options.seconds, results["seconds"][name])
            draw = batches(training, recipe["model"]["config"]["block_size"], seed)
            runs[str(seed)] = train(name, recipe, draw, len(char_ids), seed, counts).loss(held_out)
            print(f"{name}, seed {seed}: {runs[str(seed)]:.4f} after {sum(counts)} steps", file=sys.stderr, flush=True)
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
    for name, runs in results["loss"].items():
        losses, each = list(runs.values()), results["seconds"][name]
        times = ", ".join(f"{step * 1e3:.1f}" for step in each)
        row = f"| {name} | {times} | {sum(steps_of(seconds, each))} | {statistics.mean(losses):.4f} "
        print(row + f"| {statistics.mean(losses) - base:+.4f} | {min(losses):.4f} … {max(losses):.4f} |")


if __name__ == "__main__":
    main()
