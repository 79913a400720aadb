"""The tables of a comparison: for the terminal, and as the parts of its page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len

from lit_gpt.runs.comparison import ComparedRun, Comparison
from lit_gpt.runs.groups import RunGroup, shown_value, value_text
from lit_gpt.runs.judgement import GroupDifference, Interval, mean_interval

_UNKNOWN = "–"


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Attributes:
        title: above it.
        columns: their headings.
        cells: row by row.
        numeric: the headings of columns that are aligned to the right.
    """

    title: str
    columns: Sequence[str]
    cells: Sequence[Sequence[str]]
    numeric: frozenset[str] = frozenset()

    def lines(self) -> list[str]:
        """As text in columns."""
        rows = [list(self.columns), *map(list, self.cells)]
        widths = [max(cell_len(row[index]) for row in rows) for index in range(len(self.columns))]
        lines = [self.title]
        for row in rows:
            shown = [_padded(cell, width, name in self.numeric) for cell, width, name in zip(row, widths, self.columns)]
            lines.append("  ".join(shown).rstrip())
        lines.insert(2, "  ".join("-" * width for width in widths))
        return lines


def tables_of(found: Comparison) -> list[TextTable]:
    """All tables: the runs, what differs, the groups, and the judgement where there are two groups."""
    tables = [_runs(found), _groups(found)]
    if found.differing:
        tables.insert(1, _differing(found))
    if found.differences:
        tables.append(_judgement(found))
    return tables


def print_comparison(found: Comparison) -> None:
    """Tables, samples and remarks, to stdout."""
    for table in tables_of(found):
        print("\n".join(visible(line) for line in table.lines()), end="\n\n")
    labels = {group.name: group.label for group in found.groups}
    for sample in found.samples:
        print(f"after {shown_value(repr(sample.prompt))}, seed {sample.seed}:")
        for name, text in sample.texts.items():
            print(f"--- {name} ({visible(labels[name])})\n{visible(text, lines=True)}")
        print()
    for remark in found.remarks:
        print(f"- {visible(remark)}")


def visible(text: str, lines: bool = False) -> str:
    """What a terminal shows as it is: no control characters, which could give it orders; line ends if `lines`."""
    return "".join(c if c.isprintable() or (lines and c in "\n\t") else "\ufffd" for c in text)


def _padded(cell: str, width: int, to_the_right: bool) -> str:
    blank = " " * (width - cell_len(cell))
    return blank + cell if to_the_right else cell + blank


def _runs(found: Comparison) -> TextTable:
    columns: dict[str, list[str]] = {"run": [f"{run.name} {run.record.name}" for run in found.runs]}
    if found.comparable:
        columns["loss"] = [_figure(run.loss) for run in found.runs]
        columns["bits/byte"] = [_figure(run.bits_per_byte) for run in found.runs]
    if found.by_text:
        columns["text bits/byte"] = [_figure(run.text.bits_per_byte) if run.text else _UNKNOWN for run in found.runs]
    columns |= {
        "parameters": [_count(run.parameters) for run in found.runs],
        "steps": [_count(run.record.steps) for run in found.runs],
        "tokens": [_count(run.record.tokens) for run in found.runs],
        "seconds": [_seconds(run) for run in found.runs],
        "FLOPs": [_flops(run) for run in found.runs],
        "peak memory": [_memory(run) for run in found.runs],
    }
    return TextTable("Runs", list(columns), list(zip(*columns.values())), frozenset(columns) - {"run"})


def _differing(found: Comparison) -> TextTable:
    """Each key with its values, and the groups or runs that have them."""
    cells = [(key, ";  ".join(_values(found, values))) for key, values in found.differing.items()]
    return TextTable("What differs in the configurations", ("key", "values"), cells)


def _values(found: Comparison, values: Sequence[Any]) -> Iterable[str]:
    texts = list(map(value_text, values))
    for text in dict.fromkeys(texts):
        having = {index for index, other in enumerate(texts) if other == text}
        names: list[str] = []
        for group in found.groups:
            if having.issuperset(group.members):
                names.append(group.name)
            else:
                names += [found.runs[index].name for index in group.members if index in having]
        yield f"{shown_value(text)}: {' '.join(names)}"


def _groups(found: Comparison) -> TextTable:
    columns = ["group", "configuration", "seeds", "mean", "95 % over seeds"]
    if found.by_text:
        columns.append("95 % over windows")
    cells = [_group_cells(found, group) for group in found.groups]
    what = "bits per byte of the text" if found.by_text else "validation loss"
    return TextTable(f"Groups, by {what}", columns, cells, frozenset({"seeds", "mean"}))


def _group_cells(found: Comparison, group: RunGroup) -> list[str]:
    mean = statistics.fmean(found.figures[index] for index in group.members)
    cells = [group.name, group.label, str(len(group.members)), _figure(mean), _ends(found.spread(group))]
    return [*cells, _ends(mean_interval(found.windows(group)))] if found.by_text else cells


def _judgement(found: Comparison) -> TextTable:
    columns = ["groups", "difference", "95 % over seeds", "seeds", "p", "p (Holm)", "corrected interval", "verdict"]
    if found.by_text:
        columns.insert(3, "95 % over windows")
    cells = [_difference_cells(each, found.by_text) for each in found.differences]
    return TextTable("Judgement", columns, cells, frozenset({"difference", "p", "p (Holm)"}))


def _difference_cells(each: GroupDifference, by_text: bool) -> list[str]:
    windows = [_ends(each.windows, signed=True)] if by_text else []
    corrected = _UNKNOWN if each.low is None or each.high is None else f"{each.low:+.4f} … {each.high:+.4f}"
    return [
        f"{each.first} − {each.second}",
        f"{each.mean:+.4f}",
        _ends(each.interval, signed=True),
        *windows,
        f"{each.seeds} {'paired' if each.paired else 'unpaired'}",
        _p(None if each.interval is None else each.interval.p),
        _p(each.p_holm),
        corrected,
        each.verdict,
    ]


def _ends(interval: Interval | None, signed: bool = False) -> str:
    if interval is None:
        return _UNKNOWN
    sign = "+" if signed else ""
    return f"{interval.low:{sign}.4f} … {interval.high:{sign}.4f}"


def _p(p: float | None) -> str:
    return _UNKNOWN if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"


def _figure(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.4f}"


def _count(value: int | None) -> str:
    return _UNKNOWN if value is None else f"{value:,}"


def _seconds(run: ComparedRun) -> str:
    return _UNKNOWN if run.record.seconds is None else f"{run.record.seconds:,.1f}"


def _flops(run: ComparedRun) -> str:
    return _UNKNOWN if run.record.flops is None else f"{run.record.flops:.3g}"


def _memory(run: ComparedRun) -> str:
    return _UNKNOWN if run.record.peak_memory is None else f"{run.record.peak_memory / 2**20:,.0f} MiB"
