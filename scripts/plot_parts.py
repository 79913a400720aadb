"""The pictures of docs/parts.md: layer normalisation, GELU, residual paths, the causal mask, dropout.

python scripts/plot_parts.py --output docs/parts
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import nn

from lit_gpt.files.atomic import atomic_write
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.norm import make_norm

WIDTH, DEPTH = 64, 12


def norm(before: Axes, after: Axes) -> None:
    """The numbers of one token."""
    torch.manual_seed(1)
    x = 3 * torch.randn(1, 768) + 5
    y = make_norm(GPTConfig.from_preset("gpt2"), 768)(x)
    for axes, values, title in ((before, x, "before"), (after, y, "after")):
        axes.hist(values.detach().flatten().numpy(), bins=30, color="#4878a8")
        axes.set_title(f"{title}: mean {abs(values.mean()):.1f}, variance {values.var(correction=0):.1f}")
        axes.set_xlim(-6, 15)


def gelu(curves: Axes, slopes: Axes) -> None:
    """The activations, and their derivatives."""
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "GELU": nn.GELU(),
        "GELU, tanh": nn.GELU(approximate="tanh"),
        "ReLU": nn.ReLU(),
    }
    for (name, function), style in zip(functions.items(), ("-", "--", ":")):
        x = torch.linspace(-4, 4, 401, requires_grad=True)
        y = function(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        curves.plot(x.detach().numpy(), y.detach().numpy(), style, label=name)
        slopes.plot(x.detach().numpy(), slope.numpy(), style, label=name)
    curves.set_title("value")
    slopes.set_title("derivative")
    curves.legend()


def residual(without: Axes, with_it: Axes) -> None:
    """The mean size of each layer's gradient."""
    for axes, adds, title in ((without, False, "x ← f(x)"), (with_it, True, "x ← x + f(x)")):
        torch.manual_seed(123)
        layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        x = torch.randn(32, WIDTH)
        for layer in layers:
            y = nn.functional.gelu(layer(x))
            x = x + y if adds else y
        x.square().mean().backward()
        sizes = [
            layer.weight.grad.abs().mean().item() for layer in layers if isinstance(layer.weight.grad, torch.Tensor)
        ]
        axes.semilogy(range(1, DEPTH + 1), sizes, "o-")
        axes.set_ylim(1e-11, 10)
        axes.set_title(title)
        axes.set_xlabel("layer")
    without.set_ylabel("mean |gradient|")


def mask(scores_axes: Axes, weights_axes: Axes) -> None:
    """Scores with the mask, and what softmax makes of them."""
    torch.manual_seed(2)
    scores = torch.randn(8, 8) + torch.full((8, 8), -torch.inf).triu(1)
    for axes, values, title in (
        (scores_axes, scores, "scores, −∞ white"),
        (weights_axes, scores.softmax(-1), "weights"),
    ):
        axes.imshow(values.masked_fill(scores == -torch.inf, torch.nan).numpy(), cmap="viridis")
        axes.set_title(title)
        axes.set_xlabel("key")
        axes.set_ylabel("query")


def dropout(training: Axes, evaluation: Axes) -> None:
    """Forty ones."""
    torch.manual_seed(3)
    drop = nn.Dropout(0.5)
    for axes, values, title in (
        (training, drop(torch.ones(40)), "training"),
        (evaluation, torch.ones(40), "evaluation"),
    ):
        axes.bar(range(40), values.numpy(), color="#4878a8")
        axes.axhline(values.mean().item(), color="#b04040", label=f"mean {values.mean():.2f}")
        axes.set_ylim(0, 2.2)
        axes.set_title(title)
        axes.legend()


PICTURES = {"norm": norm, "gelu": gelu, "residual": residual, "mask": mask, "dropout": dropout}


def main() -> None:
    """Write every picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/parts"), help="a folder")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "lit_gpt"  # the same file each time
    for name, draw in PICTURES.items():
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        draw(left, right)
        with atomic_write(folder / f"{name}.svg") as file:
            figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
