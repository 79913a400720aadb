"""Groups of runs that differ in nothing but their seeds, and what differs between configurations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.runs.record import RunRecord, flat_config

SEEDS = ("seed_everything", "data.seed")
_OUTSIDE = (
    "ckpt_path",
    "data.cache_dir",
    "data.cache_gb",
    "remix",
    "samples",
    "trainer.default_root_dir",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.logger",
)
"""Keys, or groups of keys, that say where a run goes on, is written and is shown, and not how it learns."""
_ABSENT = "not there"


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in nothing but their seeds.

    Attributes:
        name: A, B, …
        label: what sets it apart from the other groups: `key=value, …`.
        members: the numbers of its runs, from 0, in the order in which they were given.
    """

    name: str
    label: str
    members: tuple[int, ...]


def differing_keys(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Dotted key → its value in each run, of those keys that do not have one value in all of them."""
    configs = [flat_config(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key, _ABSENT) for config in configs] for key in keys}
    return {key: found for key, found in values.items() if len(set(map(value_text, found))) > 1}


def seed_of(run: RunRecord) -> tuple[str, ...]:
    """What a run of one group is known by: its seeds, as text."""
    config = flat_config(run.config)
    return tuple(value_text(config.get(key, _ABSENT)) for key in SEEDS)


def group_runs(runs: Sequence[RunRecord], differing: Mapping[str, Sequence[Any]]) -> list[RunGroup]:
    """The groups, in the order of their first runs; `differing` is what `differing_keys` gave.

    Raises:
        UserError: for a run that is given twice.
    """
    for number, run in enumerate(runs):
        for other in runs[:number]:
            if run.folder.resolve() == other.folder.resolve():
                raise UserError(f"{run.name} is the same run as {other.name}: give each once")
    telling = [key for key in differing if key not in SEEDS and not _is_outside(key)]
    members: dict[tuple[str, ...], list[int]] = {}
    for number in range(len(runs)):
        members.setdefault(tuple(value_text(differing[key][number]) for key in telling), []).append(number)
    short = _short_names(telling)
    return [
        RunGroup(
            _letters(index),
            ", ".join(f"{short[key]}={shown_value(differing[key][numbers[0]])}" for key in telling) or "all runs",
            tuple(numbers),
        )
        for index, numbers in enumerate(members.values())
    ]


def _is_outside(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _OUTSIDE)


def value_text(value: Any) -> str:
    """A value of YAML in one line, by which values are compared: 1 and 1.0 are one learning rate, true is not 1."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def shown_value(value: Any) -> str:
    """A value of a configuration as tables show it: in one line, and not long."""
    line = "".join(c if c.isprintable() else " " for c in value_text(value))
    return line if len(line) <= 60 else f"{line[:57]}…"


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key's last part, with as many parts before it as tell it from the others."""
    short: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        tails = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        alone = (tail for tail in tails if sum(other == tail or other.endswith(f".{tail}") for other in keys) == 1)
        short[key] = next(alone, key)
    return short


def _letters(index: int) -> str:
    """A, B, … Z, AA, AB, …"""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters
