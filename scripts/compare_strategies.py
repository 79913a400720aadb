"""Comparison of all decoding strategies on one checkpoint: text, cost per token, repetition. Prints Markdown.

python scripts/compare_strategies.py CHECKPOINT PROMPT [--max_new_tokens 100]
"""

from __future__ import annotations

import argparse
import time
from typing import Any, TypedDict

from lit_gpt import load
from lit_gpt.api import Generator
from lit_gpt.generation.strategy_table import STRATEGIES

CASES: list[tuple[str, dict[str, Any]]] = [
    ("greedy", {"strategy": "greedy"}),
    ("greedy, repetition_penalty 1.3", {"strategy": "greedy", "repetition_penalty": 1.3}),
    ("sample, temperature 1", {"seed": 1}),
    ("sample, temperature 0.8, top_k 20", {"seed": 1, "temperature": 0.8, "top_k": 20}),
    ("sample, top_p 0.9", {"seed": 1, "top_p": 0.9}),
    ("sample, min_p 0.1", {"seed": 1, "min_p": 0.1}),
    ("beam, 4 beams", {"strategy": "beam", "num_beams": 4}),
    ("contrastive, α 0.6, k 4", {"strategy": "contrastive", "penalty_alpha": 0.6, "top_k": 4}),
    ("mcts, 16 simulations of 8 tokens", {"strategy": "mcts", "num_simulations": 16, "rollout_length": 8}),
    ("speculative greedy, n-gram", {"strategy": "speculative", "temperature": 0}),
    ("speculative sample, n-gram", {"strategy": "speculative", "seed": 1, "temperature": 0.8, "top_k": 20}),
]
_COMPARED = {settings.get("strategy", "sample") for _, settings in CASES}
CASES += [(name, {"strategy": name}) for name in STRATEGIES if name not in _COMPARED]


class Measurement(TypedDict):
    """One continuation.

    `ms`, `forwards` and `fed`: milliseconds of processor time, forward passes and tokens fed, for each generated token.
    `logprob`: the mean log-probability of a token. `distinct`: distinct-4.
    """

    text: str
    ms: float
    forwards: float
    fed: float
    logprob: float
    distinct: float


def distinct(ids: list[int], n: int) -> float:
    """Share of the n-grams of `ids` that are different ones (Li et al. 2016, arXiv 1510.03055)."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def measure(gpt: Generator, prompt: str, n: int, settings: dict[str, Any]) -> Measurement:
    """Continue `prompt` by `n` tokens with the keywords of `Generator.complete` in `settings`, whatever their types."""
    engine = gpt.engine()
    gpt._engines = {"ngram": engine}  # no prefix known from the strategy before
    began = time.process_time()
    ((one, *_),) = gpt.complete([prompt], max_new_tokens=n, **settings)
    seconds = time.process_time() - began
    forwards, fed = engine.model_runner.forwards, engine.model_runner.fed
    scored = gpt.logprobs(prompt + one.text)[-len(one.ids) :]
    return {
        "text": one.text,
        "ms": 1000 * seconds / len(one.ids),
        "forwards": forwards / len(one.ids),
        "fed": fed / len(one.ids),
        "logprob": sum(token.logprob or 0.0 for token in scored) / len(scored),
        "distinct": distinct(one.ids, 4),
    }


def main() -> None:
    """Print the table, then the texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("prompt")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many runs counts")
    options = parser.parse_args()
    gpt = load(options.checkpoint)
    results = {}
    for name, settings in CASES:
        runs = [measure(gpt, options.prompt, options.max_new_tokens, settings) for _ in range(options.repeats)]
        results[name] = min(runs, key=lambda run: run["ms"])
    base = results["greedy"]["ms"]
    print("| strategy | CPU ms a token | × greedy | passes a token | tokens fed | mean log-prob. | distinct-4 |")
    print("|---|---|---|---|---|---|---|")
    for name, row in results.items():
        cost = f"{row['ms']:.2f} | {row['ms'] / base:.1f} | {row['forwards']:.2f} | {row['fed']:.1f}"
        print(f"| {name} | {cost} | {row['logprob']:.2f} | {row['distinct']:.2f} |")
    for name, row in results.items():
        print(f"\n**{name}**\n\n```text\n{options.prompt}{row['text']}\n```")


if __name__ == "__main__":
    main()
