"""Comparison of all decoding strategies and settings on one checkpoint: text, cost per token, repetition. In Markdown.

python scripts/compare_strategies.py CHECKPOINT PROMPT [--max_new_tokens 100]
python scripts/compare_strategies.py CHECKPOINT PROMPT --sweeps docs/decoding      each setting over its range, plotted
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from lit_gpt import load
from lit_gpt.api import Generator
from lit_gpt.files.atomic import atomic_write
from lit_gpt.generation.complete import encode_prompt
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


SHOWN = 90
"""Characters of a text in the table of a sweep."""
SAMPLES = 8
"""Texts of each value of a setting that draws."""
SWEEPS: list[tuple[str, str, Sequence[float], dict[str, Any]]] = [
    ("temperature", "temperature", (0.1, 0.3, 0.7, 1.0, 1.5, 2.0), {}),
    ("top-k", "top_k", (1, 5, 20, 50, 200), {}),
    ("top-p", "top_p", (0.3, 0.5, 0.8, 0.9, 0.95, 1.0), {}),
    ("min-p", "min_p", (0.0, 0.02, 0.05, 0.1, 0.2, 0.5), {}),
    ("repetition penalty", "repetition_penalty", (1.0, 1.05, 1.1, 1.3, 1.6), {"temperature": 0.7}),
    ("frequency penalty", "frequency_penalty", (0.0, 0.25, 0.5, 1.0, 2.0), {"temperature": 0.7}),
    ("presence penalty", "presence_penalty", (0.0, 0.25, 0.5, 1.0, 2.0), {"temperature": 0.7}),
    ("beams", "num_beams", (1, 2, 4, 8, 16), {"strategy": "beam"}),
    ("contrastive α (k = 4)", "penalty_alpha", (0.0, 0.2, 0.4, 0.6, 0.8), {"strategy": "contrastive", "top_k": 4}),
    ("contrastive k (α = 0.6)", "top_k", (2, 4, 8, 16), {"strategy": "contrastive", "penalty_alpha": 0.6}),
    ("simulations of mcts", "num_simulations", (2, 8, 32), {"strategy": "mcts"}),
]
"""A title, the setting, its values, and the settings beside it."""


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


def repetition(ids: list[int], window: int = 32) -> float:
    """Share of the tokens that are among the `window` before them (rep of Welleck et al. 2020, arXiv 1908.04319)."""
    return sum(token in ids[max(0, i - window) : i] for i, token in enumerate(ids)) / max(1, len(ids))


def log_probabilities(gpt: Generator, prompt: str, ids: list[int]) -> list[float]:
    """Of each token of a continuation of `prompt`, by the unprocessed model, in nats."""
    scored = gpt.logprobs([*encode_prompt(gpt.tokenizer, prompt), *ids])
    return [token.logprob or 0.0 for token in scored[-len(ids) :]]


def measure(gpt: Generator, prompt: str, n: int, settings: dict[str, Any]) -> Measurement:
    """Continue `prompt` by `n` tokens with the keywords of `Generator.complete` in `settings`, whatever their types."""
    engine = gpt.engine()
    gpt._engines = {"ngram": engine}  # no prefix known from the strategy before
    began = time.process_time()
    ((one, *_),) = gpt.complete([prompt], max_new_tokens=n, **settings)
    seconds = time.process_time() - began
    forwards, fed = engine.model_runner.forwards, engine.model_runner.fed
    scores = log_probabilities(gpt, prompt, one.ids)
    return {
        "text": one.text,
        "ms": 1000 * seconds / len(one.ids),
        "forwards": forwards / len(one.ids),
        "fed": fed / len(one.ids),
        "logprob": statistics.mean(scores),
        "distinct": distinct(one.ids, 4),
    }


class Texts(TypedDict):
    """The continuations with one value of a setting.

    `distinct`: the mean share of different n-grams, for n = 2 and 4. `repeated`: `repetition`. `logprob`: the mean
    log-probability of a token by the unprocessed model, in nats.
    """

    value: float
    distinct: tuple[float, float]
    repeated: float
    logprob: float
    sample: str


def sweep(
    gpt: Generator, prompt: str, n: int, name: str, values: Sequence[float], beside: dict[str, Any]
) -> list[Texts]:
    """Continue `prompt` by `n` tokens with each of `values` of the setting `name`."""
    found = []
    for value in values:
        draws = {} if "strategy" in beside else {"seed": 1, "num_samples": SAMPLES}
        settings = {**beside, **draws, name: value}
        (texts,) = gpt.complete([prompt], max_new_tokens=n, **settings)
        grams = [(distinct(one.ids, 2), distinct(one.ids, 4)) for one in texts]
        scores = [score for one in texts for score in log_probabilities(gpt, prompt, one.ids)]
        pairs, fours = (statistics.mean(column) for column in zip(*grams))
        found.append(
            Texts(
                value=value,
                distinct=(pairs, fours),
                repeated=statistics.mean(repetition(one.ids) for one in texts),
                logprob=statistics.mean(scores),
                sample=texts[0].text,
            )
        )
    return found


def print_sweeps(gpt: Generator, prompt: str, n: int, folder: Path) -> None:
    """A table, a picture and a text of each value, for every setting."""
    folder.mkdir(parents=True, exist_ok=True)
    for title, name, values, beside in SWEEPS:
        print(f"{title} …", file=sys.stderr, flush=True)
        rows = sweep(gpt, prompt, n, name, values, beside)
        flags = " ".join(f"--{key} {value}" for key, value in beside.items())
        print(f"\n### {title}\n\n`--{name}`{f' beside `{flags}`' if flags else ''}\n")
        print("| value | distinct-2 | distinct-4 | repeated | mean log-prob. | a text |\n|---|---|---|---|---|---|")
        for row in rows:
            figures = (
                f"{row['distinct'][0]:.2f} | {row['distinct'][1]:.2f} | {row['repeated']:.0%} | {row['logprob']:.2f}"
            )
            print(f"| {row['value']:g} | {figures} | {in_a_cell(row['sample'])} |")
        path = folder / picture_name(name, beside)
        plot_sweep(title, rows, path)
        print(f"\n![{title}]({path.parent.name}/{path.name})")


def picture_name(name: str, beside: dict[str, Any]) -> str:
    """The file of a sweep's picture."""
    return f"{beside['strategy']}_{name}.svg" if "strategy" in beside else f"{name}.svg"


def in_a_cell(text: str) -> str:
    """The beginning of a text as code in a cell of a Markdown table, with its line ends shown."""
    shown = text[:SHOWN].replace("\n", "⏎").replace("|", "\\|") + ("…" if len(text) > SHOWN else "")
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`"


def plot_sweep(title: str, rows: list[Texts], path: Path) -> None:
    """Distinct n-grams, repeated tokens and likelihood over the values."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lit_gpt"  # the same file for the same figures
    matplotlib.rcParams["svg.fonttype"] = "none"  # letters as letters: a third of the size
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    labels = [f"{row['value']:g}" for row in rows]
    left.plot(labels, [row["distinct"][0] for row in rows], "o-", label="distinct-2")
    left.plot(labels, [row["distinct"][1] for row in rows], "o-", label="distinct-4")
    left.plot(labels, [row["repeated"] for row in rows], "o--", label="repeated")
    left.set_ylim(0, 1.05)
    left.legend()
    right.plot(labels, [row["logprob"] for row in rows], "o-", color="#b04040")
    right.set_ylabel("mean log-probability")
    for axes in (left, right):
        axes.set_xlabel(title)
    with atomic_write(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Print the table, then the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("prompt")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many runs counts")
    parser.add_argument(
        "--sweeps", type=Path, help="instead: each setting over its range, with pictures in this folder"
    )
    options = parser.parse_args()
    gpt = load(options.checkpoint)
    if options.sweeps is not None:
        print_sweeps(gpt, options.prompt, options.max_new_tokens, options.sweeps)
        return
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
