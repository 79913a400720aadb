"""The table of a trace, for the terminal. Imports no Lightning, so that a chat starts fast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat

from rich.table import Table
from rich.text import Text

from lit_gpt.generation.trace import Step, Trace
from lit_gpt.tokenizer.printable import show_end
from lit_gpt.tokenizer.tokenizer import Tokenizer

_SHOWN = 5  # candidates in a row
_SHOWN_IDS = 32  # of the prompt
_PROMPT_CHARACTERS, _SEQUENCE_CHARACTERS = 200, 24


def to_table(trace: Trace, tokenizer: Tokenizer | None) -> Table:
    """The initial prompt, then one row for each decision, with the end of the sequence that it continues."""
    title = Text(f"prompt {trace.prompt_index + 1}, sample {trace.sample + 1}", style="table.title")
    title.append("\ninitial prompt: ").append(show_end(trace.prompt, _PROMPT_CHARACTERS), style="bold")
    title.append(f"\nids {_ids(trace.prompt_ids)}, shape {trace.prompt_shape}")
    ends = (show_end(text, _SEQUENCE_CHARACTERS) for text in trace.sequences(tokenizer))
    return steps_table(trace.steps, title, ends)


def _ids(ids: Sequence[int]) -> str:
    """All of them if they are few, else the first and their number."""
    shown = ", ".join(map(str, ids[:_SHOWN_IDS]))
    return f"[{shown}]" if len(ids) <= _SHOWN_IDS else f"[{shown}, …] ({len(ids):,})"


def steps_table(steps: Sequence[Step], title: str | Text, sequences: Iterable[str] = ()) -> Table:
    """One row for each decision.

    Args:
        steps: the decisions.
        title: of the table.
        sequences: what each of them continues; none to leave that out.
    """
    table = Table(title=title, title_justify="left", caption=_CAPTION, caption_justify="left")
    table.add_column("#", justify="right")
    table.add_column("token" if sequences == () else "token, after the sequence so far", max_width=28)
    for name in ("before", "after", "bits", "kept"):
        table.add_column(name, justify="right")
    table.add_column("choice")
    table.add_column("alternatives, before → after")
    before: Iterator[str] = chain(sequences, repeat(""))
    for step, sequence in zip(steps, before):
        table.add_row(
            str(step.position + 1),
            _token(step, sequence),
            percent(step.chosen.before),
            percent(step.chosen.after),
            f"{step.entropy_before:.1f}",
            f"{step.kept:,}",
            _choice(step),
            _alternatives(step),
        )
    return table


_CAPTION = "bits: entropy of the model's distribution; kept: tokens left to draw from; struck out: cut"


def _token(step: Step, sequence: str) -> Text:
    text = Text(step.chosen.piece, style="bold")
    return text.append(f"\nafter {sequence}", style="not bold dim") if sequence else text


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
