"""The results of a sweep: its runs by their best validation, and the mean of each configuration over its seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from lit_gpt.runs.grid import Values
from lit_gpt.runs.sweep_options import SweepOptions
from lit_gpt.runs.sweep_source import SweepResult

_MAX_REASON = 100  # characters of a failure's reason in the table


class ConfigurationResult(NamedTuple):
    """The runs of one configuration, with different seeds.

    Attributes:
        values: of the keys that differ between configurations.
        finished: how many of the runs have.
        runs: how many there are.
        mean: of their figures; None if none has finished.
        low: the lowest.
        high: the highest.
    """

    values: Values
    finished: int
    runs: int
    mean: float | None
    low: float | None
    high: float | None


def print_results(options: SweepOptions, results: Sequence[SweepResult]) -> None:
    """Print the results to stdout, as a table or JSON. They depend on the runs alone, not on when they were made."""
    ordered = sorted(results, key=lambda result: (_figure(result, options.metric), result.number))
    groups = by_configuration(ordered, options.metric) if options.seeds > 1 else []
    if options.format == "json":
        print(json.dumps(as_json(options, ordered, groups), indent=1))
        return
    print(_run_table(options, ordered))
    if groups:
        print(f"\n{_group_table(options, groups)}")


def _figure(result: SweepResult, metric: str) -> float:
    value = None if result.status is None else result.status.value(metric)
    return math.inf if value is None else value


def by_configuration(results: Sequence[SweepResult], metric: str) -> list[ConfigurationResult]:
    """The runs of each configuration together, by the mean of those that have finished."""
    groups: dict[str, list[SweepResult]] = {}
    for result in sorted(results, key=lambda result: result.number):
        groups.setdefault(json.dumps(result.values), []).append(result)
    found = []
    for runs in groups.values():
        finished = [run for run in runs if run.status is not None and run.status.state == "finished"]
        figures = [figure for run in finished if math.isfinite(figure := _figure(run, metric))]
        mean, low, high = (statistics.fmean(figures), min(figures), max(figures)) if figures else (None, None, None)
        found.append(ConfigurationResult(runs[0].values, len(figures), len(runs), mean, low, high))
    return sorted(found, key=lambda group: math.inf if group.mean is None else group.mean)


def as_json(
    options: SweepOptions, results: Sequence[SweepResult], groups: Sequence[ConfigurationResult]
) -> dict[str, Any]:
    """The results as plain values."""
    runs = []
    for result in results:
        status = {} if result.status is None else result.status._asdict()
        machine = {"machine": result.machine} if result.machine else {}
        about = {"number": result.number, "values": result.values, "seed": result.seed}
        runs.append({**about, "state": "open", **status, **machine})
    found: dict[str, Any] = {"sweep": str(options.output), "method": options.method, "metric": options.metric}
    found["budget"] = None if options.budget is None else [options.budget.unit, options.budget.amount]
    found["runs"] = runs
    if groups:
        found["configurations"] = [group._asdict() for group in groups]
    return found


def _run_table(options: SweepOptions, results: Sequence[SweepResult]) -> str:
    has_seeds = any(result.seed is not None for result in results)
    has_bytes = any(result.status is not None and result.status.bits_per_byte is not None for result in results)
    head = ["run", *options.swept, *(["seed"] if has_seeds else []), "loss"]
    head += [*(["bits per byte"] if has_bytes else []), "at step", "state"]
    rows = []
    for result in results:
        status = result.status
        row = [f"{result.number:04d}", *(result.values.get(key, "") for key in options.swept)]
        row += [str(result.seed)] if has_seeds else []
        row.append(_number(None if status is None else status.loss))
        row += [_number(None if status is None else status.bits_per_byte)] if has_bytes else []
        row.append("" if status is None or status.step is None else str(status.step))
        row.append(_state(result))
        rows.append(row)
    return aligned([head, *rows])


def _state(result: SweepResult) -> str:
    if result.status is None:
        state = "open"
    elif result.status.state == "failed":
        why = result.status.why
        state = f"failed: {why if len(why) <= _MAX_REASON else why[: _MAX_REASON - 1] + '…'}"
    else:
        state = result.status.state
    return f"{state} on {result.machine}" if result.machine else state


def _group_table(options: SweepOptions, groups: Sequence[ConfigurationResult]) -> str:
    name = options.metric.replace("_", " ")
    head = [*options.swept, f"mean {name}", "lowest", "highest", "finished"]
    rows = [
        [
            *(group.values.get(key, "") for key in options.swept),
            *map(_number, (group.mean, group.low, group.high)),
            f"{group.finished} of {group.runs}",
        ]
        for group in groups
    ]
    return aligned([head, *rows])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines whose columns begin at the same character."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
