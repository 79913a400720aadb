"""The table of a trace, for the terminal. Imports no Lightning, so that a chat starts fast."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lit_gpt.generation.trace import Step, Trace

_SHOWN = 5  # candidates in a row


def to_table(trace: Trace) -> Table:
    """One row for each decision of a prompt's continuation."""
    return steps_table(trace.steps, f"prompt {trace.prompt_index + 1}, sample {trace.sample + 1}")


def steps_table(steps: Sequence[Step], title: str) -> Table:
    """One row for each decision."""
    table = Table(title=title, title_justify="left", caption=_CAPTION, caption_justify="left")
    table.add_column("#", justify="right")
    table.add_column("token", style="bold")
    for name in ("before", "after", "bits", "kept"):
        table.add_column(name, justify="right")
    table.add_column("choice")
    table.add_column("alternatives, before → after")
    for step in steps:
        table.add_row(
            str(step.position + 1),
            Text(step.chosen.piece),
            percent(step.chosen.before),
            percent(step.chosen.after),
            f"{step.entropy_before:.1f}",
            f"{step.kept:,}",
            _choice(step),
            _alternatives(step),
        )
    return table


_CAPTION = "bits: entropy of the model's distribution; kept: tokens left to draw from; struck out: cut"


def _choice(step: Step) -> str:
    if step.draw is None or step.interval is None:
        return step.how
    return f"{step.draw:.3f} in {step.interval[0]:.3f}…{step.interval[1]:.3f}"


def _alternatives(step: Step) -> Text:
    others = [one for one in step.candidates if one.id != step.chosen.id][:_SHOWN]
    text = Text()
    for one in others:
        text.append("  " if text else "")
        text.append(one.piece, style="dim strike" if one.cut_by else "")
        after = f"→{one.cut_by}" if one.cut_by else f"→{percent(one.after)}"
        text.append(f" {percent(one.before)}{after}", style="dim")
    return text


def percent(share: float) -> str:
    """A probability as a short percentage.

    >>> percent(0.5), percent(0.034), percent(0.00001)
    ('50%', '3.4%', '<0.1%')
    """
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}"
