"""The options of `sweep` and its help. Imports no torch: `sweep --help` answers at once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionYesNo, Namespace

from lit_gpt.console.options import CommandParser, help_page
from lit_gpt.errors import UserError
from lit_gpt.runs.grid import SweptKey, grid_size, parse_settings

Method = Literal["grid", "random", "search"]
Metric = Literal["loss", "bits_per_byte"]
BudgetUnit = Literal["time", "steps", "tokens", "flops"]

MAX_RUNS = 100
DRAWS = 20

_GROUPS = {
    "what is tried": ("config", "set", "method", "draws", "seeds", "max_runs", "seed"),
    "how long each run is, and how many run at a time": ("budget", "jobs"),
    "the search": ("metric", "prune", "storage"),
    "the results": ("output", "format", "retry_failed"),
    "the options themselves": ("help",),
}
_EXAMPLES = {
    "six configurations with three seeds each, five minutes a run": (
        "lit_gpt sweep --config base.yaml --set model.optimizer.muon_lr=0.01,0.02,0.04 --set model.config.n_layer=4,6 "
        "--seeds 3 --budget 00:05:00"
    ),
    "30 draws of two ranges, at equal FLOPs, two runs at a time": (
        "lit_gpt sweep --config base.yaml --set model.optimizer.lr=log:1e-4..1e-2 --set model.config.n_layer=2..8 "
        "--method random --draws 30 --budget flops:1e14 --jobs 2"
    ),
    "a search that several machines share, each with this command": (
        "lit_gpt sweep --config base.yaml --set model.optimizer.lr=log:1e-4..1e-2 --method search --draws 60 "
        "--budget tokens:20M --storage journal:/shared/lr.journal"
    ),
}
_END = """KEY is any option of `lit_gpt fit`; a single VALUE is for all runs. The same command goes on with a sweep that
was stopped or killed, and repeats no run. Every run is an ordinary run folder: `lit_gpt compare` and `tensorboard
--logdir` take them. --config here names base files of `fit`; options of `sweep` can stand in the environment, as
LIT_GPT_SWEEP__JOBS. docs/sweeps.md has more."""

_BUDGET_KEYS = ("trainer.max_steps", "trainer.max_time", "trainer.max_epochs")
_SEED_KEYS = ("seed_everything", "data.seed")
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class EqualBudget:
    """What every run of a sweep may spend.

    Attributes:
        unit: of what.
        amount: seconds, optimizer steps, tokens, or floating-point operations.
    """

    unit: BudgetUnit
    amount: float


@dataclass(frozen=True)
class SweepOptions:
    """The options of a sweep, checked.

    Attributes:
        configs: base files of `fit`, in their order.
        keys: what is swept, and what is set for all.
        method: how configurations are chosen.
        draws: how many, by the methods that draw.
        seeds: runs of each configuration.
        seed: of the draws.
        max_runs: a sweep of more is refused.
        budget: of each run; None for what the base files say.
        jobs: runs at a time.
        metric: what is lower for a better run.
        prune: whether a search ends runs that are worse than half of the others at the same part of their budget.
        storage: address of what several machines share, "" for none.
        output: folder of the sweep.
        retry_failed: whether runs that failed before are tried again.
        format: of the results.
    """

    configs: tuple[str, ...]
    keys: tuple[SweptKey, ...]
    method: Method
    draws: int
    seeds: int
    seed: int
    max_runs: int
    budget: EqualBudget | None
    jobs: int
    metric: Metric
    prune: bool
    storage: str
    output: Path
    retry_failed: bool
    format: Literal["table", "json"]

    @property
    def swept(self) -> list[str]:
        """The keys that differ between runs."""
        return [key.key for key in self.keys if key.is_range or len(key.choices) > 1]


def parse(argv: list[str]) -> SweepOptions:
    """The options of `lit_gpt sweep`.

    Raises:
        UserError: for an unknown option or value, or options that do not go together.
    """
    options: Namespace = _parser().parse_args(argv)
    for name in ("draws", "seeds", "max_runs", "jobs"):
        if options[name] is not None and options[name] < 1:
            raise UserError(f"--{name} {options[name]} must be at least 1")
    configs = tuple(options["config"])
    budget = None if options.budget is None else parse_budget(options.budget)
    output = options.output or f"sweeps/{Path(configs[-1]).stem if configs else 'sweep'}"
    values: dict[str, Any] = {name: options[name] for name in ("method", "seeds", "seed", "jobs", "metric", "format")}
    parsed = SweepOptions(
        **values,
        configs=configs,
        keys=tuple(parse_settings(options["set"])),
        draws=options.draws or DRAWS,
        max_runs=options.max_runs or MAX_RUNS,
        budget=budget,
        prune=options.prune,
        storage=options.storage or "",
        output=Path(output),
        retry_failed=options.retry_failed,
    )
    _check(parsed, options.draws is not None)
    check_size(parsed)
    return parsed


def parse_budget(text: str) -> EqualBudget:
    """The value of `--budget`.

    >>> parse_budget("tokens:20M")
    EqualBudget(unit='tokens', amount=20000000.0)

    Raises:
        UserError: for what is none.
    """
    if found := re.fullmatch(r"(?:(\d{1,4}):)?(\d\d):(\d\d):(\d\d)", text.strip(), re.ASCII):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        budget = EqualBudget("time", float(((days * 24 + hours) * 60 + minutes) * 60 + seconds))
    elif found := re.fullmatch(r"(steps|tokens|flops):(\d+\.?\d*(?:[eE]\+?\d+)?)([kKMGT]?)", text.strip(), re.ASCII):
        unit: Any = found[1]
        budget = EqualBudget(unit, float(found[2]) * _FACTORS[found[3].lower()])
    else:
        raise UserError(
            f"--budget {text} is none: write 00:05:00 (hours, minutes, seconds), steps:500, tokens:20M or flops:1e15"
        )
    if not 0 < budget.amount < math.inf:
        raise UserError(f"--budget {text} must be above zero")
    return budget


def _check(options: SweepOptions, draws_given: bool) -> None:
    """Refuse what does not go together. Raises UserError."""
    if not options.swept and options.seeds == 1:
        raise UserError("nothing to sweep: give --set KEY=VALUE,VALUE, or --seeds 3 for several runs of one")
    if draws_given and options.method == "grid":
        raise UserError(f"--draws {options.draws} is for --method random and search: a grid tries all")
    named = {key.key for key in options.keys}
    for keys, given, flag in (
        (_BUDGET_KEYS, options.budget is not None, "--budget"),
        (_SEED_KEYS, options.seeds > 1, "--seeds"),
    ):
        if given and (both := named.intersection(keys)):
            raise UserError(f"--set {min(both)} and {flag} decide the same: leave one of them out")
    if options.metric == "loss" and (other := [key for key in options.swept if key in ("data.tokenizer", "data.path")]):
        raise UserError(
            f"--set {other[0]} changes the tokens, and their loss cannot be compared: give --metric bits_per_byte"
        )
    if options.retry_failed and (options.storage or options.method == "search"):
        raise UserError("--retry_failed is for --method grid and random without --storage: a trial cannot be run again")
    if options.method != "search":
        return
    if options.seeds > 1:
        raise UserError(f"--seeds {options.seeds} is for --method grid and random: a search makes one run of each")
    if options.budget is None:
        raise UserError("--method search compares runs at parts of their budget: give --budget")


def check_size(options: SweepOptions) -> None:
    """Refuse a sweep of more runs than `max_runs`. Raises UserError, with the number."""
    count = (grid_size(options.keys) if options.method == "grid" else options.draws) * options.seeds
    if options.max_runs < count < math.inf:
        raise UserError(
            f"this sweep has {count:,.0f} runs, more than {options.max_runs:,}: give --max_runs {count:.0f} for all of "
            "them, or fewer values"
        )


def without_password(address: str) -> str:
    """An address, or a message that has one, as it can be shown.

    >>> without_password("postgresql://me:secret@host/name")
    'postgresql://me:…@host/name'
    """
    return re.sub(r"(://[^/@\s:]*):[^@\s]*@", r"\1:…@", address)


def print_help() -> None:
    """Print the help of `sweep`."""
    print(help_page(_parser(), _EXAMPLES, _GROUPS, _END))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="lit_gpt sweep",
        description="Train many models that differ in some options, each with the same budget, and list them.",
        default_env=True,
        env_prefix="LIT_GPT_SWEEP_",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", action="append", type=str, default=[], help="a file that `fit` takes; can be given several times")
    text = "KEY=VALUE,VALUE of an option of `fit`, or KEY=LOW..HIGH, KEY=log:LOW..HIGH; can be given several times"
    add("--set", action="append", type=str, default=[], help=text)
    add("--method", type=Method, default="grid", help="try all, draw at random, or search with Optuna")
    add("--draws", type=int | None, help=f"configurations of random and search; {DRAWS} by default")
    add(
        "--seeds",
        type=int,
        default=1,
        help="runs of each configuration, which differ in first weights and order of data",
    )
    add("--max_runs", type=int | None, help=f"a sweep of more runs is refused; {MAX_RUNS} by default")
    add("--seed", type=int, default=1, help="of the draws")
    text = "of each run: 00:05:00 of time, steps:500, tokens:20M or flops:1e15; else as the files of --config say"
    add("--budget", type=str | None, help=text)
    add("--jobs", type=int, default=1, help="runs at a time, which share the processor's cores evenly")
    add("--metric", type=Metric, default="loss", help="what sorts the runs, of the best validation of each")
    text = "end a run that is worse than half of the others at the same part of its budget"
    add("--prune", action=ActionYesNo, nargs="?", default=True, help=text)
    text = "what several machines share: a database's address, or journal:FILE in a folder that all of them see"
    add("--storage", type=str | None, help=text)
    add("--output", type=str | None, help="folder of the sweep; sweeps/NAME of the last --config by default")
    add("--format", type=Literal["table", "json"], default="table", help="of the results")
    add("--retry_failed", action=ActionYesNo, nargs="?", default=False, help="try the runs again that failed before")
    return parser
