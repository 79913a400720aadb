"""Fits with MLflow, forked from a process that has imported it: `python mlflow_driver.py DATABASE '[[{…}, …], …]'`.

The list is of stages, one after the other; each has fits that begin at the same time, with their `argv` and variables
of their `environment`. Prints the exit status and the stderr of each fit, and name → status, parameters and curves of
the runs that the database then has.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags

from lit_gpt.__main__ import main

CURVES = ("train/loss", "val/loss")


def start(argv: list[str], environment: dict[str, str], said: Path) -> int:
    """The id of a process that fits, with its stderr in a file."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        os.environ |= environment
        sys.argv = ["lit_gpt", *argv]
        status = main(argv)
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(number: int, stage: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """The exit status and the stderr of fits that begin at the same time."""
    files = [Path(f"../said_{number}_{index}") for index in range(len(stage))]
    pids = [start(fit["argv"], fit.get("environment", {}), file) for fit, file in zip(stage, files)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return [(status, file.read_text("utf-8")) for status, file in zip(statuses, files)]


def runs_in(database: str) -> dict[str, Any]:
    client = MlflowClient(f"sqlite:///{database}")
    (experiment,) = client.search_experiments(filter_string="name = 'lit_gpt'")
    found = {}
    for run in client.search_runs([experiment.experiment_id]):
        curves = {name: client.get_metric_history(run.info.run_id, name) for name in CURVES}
        found[run.info.run_name] = {
            "status": run.info.status,
            "params": run.data.params,
            "curves": {name: [(entry.step, entry.value) for entry in curve] for name, curve in curves.items()},
        }
    return found


if __name__ == "__main__":
    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")  # here, and not once in each child
    resolve_tags()  # imports more
    gc.collect()
    gc.freeze()  # what is shared with the children stays shared
    ended = [fit for number, stage in enumerate(json.loads(sys.argv[2])) for fit in run(number, stage)]
    print(json.dumps({"ended": ended, "runs": runs_in(sys.argv[1])}))
