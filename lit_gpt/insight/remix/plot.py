"""Plots of the novelty figures, by matplotlib without a display."""

from __future__ import annotations

from pathlib import Path

from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_write
from lit_gpt.insight.remix.novelty import ORDERS, Novelty

KINDS = ("png", "svg", "pdf")


def check_plot(path: str) -> str:
    """The kind of file that `path` asks for. Raises UserError if it cannot be drawn."""
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in KINDS:
        raise UserError(f"plot {path} must end in .{', .'.join(KINDS)}")
    return kind


def plot_novelty(path: str, samples: Novelty, held_out: Novelty | None) -> None:
    """The share of new n-grams by n, of samples and of held-out text.

    Raises:
        UserError: for a kind of file that cannot be drawn.
    """
    from matplotlib.figure import Figure

    kind = check_plot(path)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for label, part, style in (("samples", samples, "o-"), ("held-out text", held_out, "s--")):
        if part is not None:
            shown = [(n, share) for n in ORDERS if (share := part.novel[n]) is not None]
            axes.plot([n for n, _ in shown], [share for _, share in shown], style, label=label, markersize=4)
    axes.set(
        xlabel="n", ylabel="share of n-grams not in the training text", ylim=(-0.02, 1.02), xticks=list(ORDERS)[::2]
    )
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format=kind, dpi=150)
