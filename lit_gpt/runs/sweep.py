"""The program `lit_gpt sweep`: many runs of `fit` with equal budgets, by a plan that survives kills; their table."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from lit_gpt.console.messages import note
from lit_gpt.errors import UserError
from lit_gpt.runs.grid import Values, shown
from lit_gpt.runs.search import StudyRuns, check_search, open_study
from lit_gpt.runs.sweep_loop import SweepLoop, check_fits
from lit_gpt.runs.sweep_options import SweepOptions, parse
from lit_gpt.runs.sweep_plan import (
    PlannedRun,
    configurations,
    definition,
    definition_hash,
    lock_sweep,
    read_plan,
    read_runs,
    words_of,
    write_plan,
    write_run,
)
from lit_gpt.runs.sweep_source import ListedRuns, RunSource
from lit_gpt.runs.sweep_table import print_results

_STOP_STATUS = 128


def main(argv: list[str]) -> int:
    """Run a sweep, or go on with one, and print its results; the exit status: 1 where no run has finished."""
    options = parse(argv)
    if options.method == "search" or options.storage:
        check_search(storage_of(options))
    asked = definition(options)
    plan = read_plan(options.output, asked)
    checked = check_all(options) if plan is None else []
    lock = lock_sweep(options.output)
    try:
        plan = read_plan(options.output, asked)
        if plan is None:
            plan = make_plan(options, asked, checked)
        else:
            note(f"sweep: {options.output} goes on")
        environment = child_environment(options, plan["threads"])
        source = make_source(options, plan, environment)
        is_search = options.method == "search"
        loop = SweepLoop(source, options.jobs, options.budget, is_search and options.prune, environment, lock)
        loop.run()
    finally:
        os.close(lock)
    if loop.stopped_by:
        note(f"lit_gpt: stopped by {signal.Signals(loop.stopped_by).name}; the same command goes on with the sweep")
        return _STOP_STATUS + loop.stopped_by
    results = source.results()
    print_results(options, results)
    return 0 if any(result.status is not None and result.status.state == "finished" for result in results) else 1


# The plan ------------------------------------------------------------------------------------------------------------


def fixed_values(options: SweepOptions) -> Values:
    """The keys that are the same in all runs."""
    return {key.key: key.choices[0] for key in options.keys if len(key.choices) == 1}


def check_all(options: SweepOptions) -> list[tuple[Values, Mapping[str, Any]]]:
    """Every configuration with all of its options, checked before anything starts; of a search nothing but the check.

    Raises:
        UserError: `fit` would refuse one; its values are named.
    """
    threads = threads_of(options)
    if options.method != "search":
        values = configurations(options)
        return list(zip(values, _resolved(options, values, child_environment(options, threads))))
    first = {key.key: key.ends[0] for key in options.keys}
    values = [{**first, key.key: end} for key in options.keys for end in key.ends[1:]]
    _resolved(options, [first, *values], child_environment(options, threads))
    return []


def _resolved(
    options: SweepOptions, values: Sequence[Values], environment: Mapping[str, str]
) -> list[Mapping[str, Any]]:
    answers = check_fits(options.configs, [words_of(one) for one in values], options.budget, environment)
    is_about_all = len({answer.get("error") for answer in answers}) == 1
    for one, answer in zip(values, answers):
        if "error" in answer:
            differing = shown({key: value for key, value in one.items() if key in options.swept})
            raise UserError(answer["error"] + ("" if is_about_all else f" (the run with {differing})"))
    return [answer["config"] for answer in answers]


def make_plan(
    options: SweepOptions, asked: Mapping[str, Any], checked: Sequence[tuple[Values, Mapping[str, Any]]]
) -> dict[str, Any]:
    """Write the files of all runs, then the plan; the plan.

    The first run of each configuration comes before the second one of any: what there is early on can be compared.
    """
    number = 0
    for seed in range(options.seeds):
        for values, config in checked:
            differing = {key: value for key, value in values.items() if key in options.swept}
            write_run(options.output, number, differing, config, seed if options.seeds > 1 else None)
            number += 1
    more = {"count": number, "threads": threads_of(options)}
    write_plan(options.output, asked, **more)
    runs = f"{number} runs" if options.method != "search" else f"a search of {options.draws} runs"
    note(f"sweep: {runs} in {options.output}; tensorboard --logdir {options.output} shows their curves")
    return {"asked": asked, **more}


def storage_of(options: SweepOptions) -> str:
    """Where Optuna keeps its trials: a file of the sweep's own, unless machines are to share them."""
    return options.storage or f"sqlite:///{options.output.resolve()}/optuna.db"


def make_source(options: SweepOptions, plan: Mapping[str, Any], environment: Mapping[str, str]) -> RunSource:
    """What hands out the runs.

    Raises:
        UserError: the storage that is to be shared cannot be used.
    """
    is_search = options.method == "search"
    own = [run for run in read_runs(options.output) if is_search or run.number < plan["count"]]
    if options.retry_failed:
        for run in own:
            if (status := run.status()) is not None and status.state == "failed":
                run.reopen()
    if not is_search and not options.storage:
        return ListedRuns(own)
    study = open_study(storage_of(options), f"lit_gpt sweep {definition_hash(options)}", options.prune)
    if not is_search:
        return StudyRuns(study, options.output, own, plan["count"], options.metric)
    swept = [key for key in options.keys if key.key in options.swept]

    def make_run(number: int, values: Values) -> PlannedRun | str:
        words = words_of({**fixed_values(options), **values})
        (answer,) = check_fits(options.configs, [words], options.budget, environment)
        if "error" in answer:
            return str(answer["error"])
        return write_run(options.output, number, values, answer["config"])

    return StudyRuns(
        study, options.output, own, options.draws, options.metric, swept, make_run, options.seed, bool(options.storage)
    )


# The processes -------------------------------------------------------------------------------------------------------


def threads_of(options: SweepOptions) -> int | None:
    """Threads of each run: its share of the cores; None where it has them all, or the environment says."""
    if options.jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, len(os.sched_getaffinity(0)) // options.jobs)


def child_environment(options: SweepOptions, threads: int | None) -> dict[str, str]:
    """The environment of the runs: this one's, with their share of the cores and stores that are the sweep's own.

    A sweep that goes on keeps the number of threads that it began with, by which sums are rounded.
    """
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    environment.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{options.output.resolve()}/mlflow.db")
    environment.setdefault("WANDB_RUN_GROUP", options.output.name)
    return environment
