"""The curves of runs in one picture: validation loss over steps, time and FLOPs, by matplotlib without a display."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_write
from lit_gpt.runs.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("png", "svg", "pdf")
_AXES = {"steps": "step", "seconds": "seconds", "FLOPs": "flops"}  # label → field of `CurvePoint`


def check_kind(path: str) -> str:
    """The kind of file that `path` asks for. Raises UserError if it cannot be drawn."""
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in KINDS:
        raise UserError(f"--plot {path} must end in .{', .'.join(KINDS)}")
    return kind


def draw_curves(found: Comparison) -> Figure | None:
    """A panel for each measure of what was spent, a line for each run, a colour for each group.

    None where no run has a curve.
    """
    from matplotlib.figure import Figure

    if not any(run.record.curve for run in found.runs):
        return None
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    panels = figure.subplots(1, len(_AXES), sharey=True)
    for axes, (label, name) in zip(panels, _AXES.items()):
        named: set[str] = set()
        for number, group in enumerate(found.groups):
            for index in group.members:
                run = found.runs[index]
                points = [(x, point.loss) for point in run.record.curve if (x := getattr(point, name)) is not None]
                if points:
                    once = None if group.name in named else group.name
                    named.add(group.name)
                    axes.plot(*zip(*points), marker=".", linewidth=1, label=once, **_style(number))
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss" + ("" if found.comparable else ", each its own"))
    panels[0].legend()
    return figure


def _style(number: int) -> dict[str, str]:
    """Colour and dashes of a group."""
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}


def svg_of(figure: Figure) -> str:
    """The picture as an `svg` element for a page. Its texts are drawn as paths: no font is needed, nothing fetched."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": "lit_gpt", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def save_curves(found: Comparison, path: str) -> None:
    """Write the picture.

    Raises:
        UserError: for a kind of file that cannot be drawn, or runs without curves.
    """
    kind, figure = check_kind(path), draw_curves(found)
    if figure is None:
        raise UserError(f"--plot {path}: none of the runs has recorded a curve: leave it out")
    with atomic_write(path) as file:
        figure.savefig(file, format=kind, dpi=150)
