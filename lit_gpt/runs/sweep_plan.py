"""A sweep's plan: its runs, each with all of its options, in files that a killed sweep goes on from.

```text
sweeps/NAME/sweep.json             what was asked for; written last: with it the plan is whole
sweeps/NAME/runs/0003/run.json     the values of this run
                     /fit.yaml     all options of its `fit`, resolved
                     /fit.log      what it printed
                     /status.json  how it ended
                     /lightning_logs/version_0   the run's folder
```
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_write, remove_unfinished
from lit_gpt.runs.grid import Values, grid_values, random_values, shown
from lit_gpt.runs.record import RunRecord, read_run
from lit_gpt.runs.sweep_options import SweepOptions, without_password

PLAN, RUNS = "sweep.json", "runs"
_FIT, _RUN, _STATUS, _LOG = "fit.yaml", "run.json", "status.json", "fit.log"
_FIRST_SEED = 1337  # where the options name none
_LOCK_SECONDS = 10.0  # that runs of a killed sweep have to end

EndState = Literal["finished", "failed", "pruned"]


class RunStatus(NamedTuple):
    """How a run has ended.

    Attributes:
        state: `finished`, `failed`, or `pruned`, which a search has ended early.
        why: of one that failed, in a line.
        loss: the lowest of its validations, nats a token.
        bits_per_byte: of the same validation.
        step: optimizer steps before it.
        run: its folder; "" if it has none.
    """

    state: EndState
    why: str = ""
    loss: float | None = None
    bits_per_byte: float | None = None
    step: int | None = None
    run: str = ""

    def value(self, metric: str) -> float | None:
        """The figure that a sweep sorts by."""
        return self.loss if metric == "loss" else self.bits_per_byte


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        number: its position in the plan, or of its trial in a search.
        values: of the keys that differ between runs.
        seed: where the sweep makes several runs of each configuration.
        folder: of its files.
    """

    number: int
    values: Values
    seed: int | None
    folder: Path

    @property
    def fit_file(self) -> Path:
        """All options of its `fit`."""
        return self.folder / _FIT

    @property
    def log_file(self) -> Path:
        """What it prints."""
        return self.folder / _LOG

    @property
    def label(self) -> str:
        """The run in a few words, for messages."""
        seed = "" if self.seed is None else f" seed={self.seed}"
        return f"run {self.number:04d} ({shown(self.values)}{seed})".replace("( ", "(").replace(" ()", "")

    def config(self) -> dict[str, Any]:
        """All options of its `fit`."""
        values: dict[str, Any] = yaml.safe_load(self.fit_file.read_text("utf-8"))
        return values

    def status(self) -> RunStatus | None:
        """How it has ended; None if it has not."""
        file = self.folder / _STATUS
        return RunStatus(**json.loads(file.read_text("utf-8"))) if file.is_file() else None

    def end(self, status: RunStatus) -> None:
        """Write down how it has ended."""
        with atomic_write(self.folder / _STATUS, "w") as file:
            json.dump(status._asdict(), file)

    def reopen(self) -> None:
        """Forget that it has ended."""
        (self.folder / _STATUS).unlink(missing_ok=True)

    def run_folder(self) -> Path | None:
        """The folder that `fit` has made for it, the newest one; None before."""
        logs = self.folder / "lightning_logs"
        found = [path.parent for path in logs.glob("version_*/config.yaml")]
        return max(found, key=lambda path: int(path.name.removeprefix("version_")), default=None)

    def last_checkpoint(self) -> Path | None:
        """What it can go on from."""
        folder = self.run_folder()
        path = None if folder is None else folder / "checkpoints/last.ckpt"
        return path if path is not None and path.is_file() else None

    def record(self) -> RunRecord | None:
        """What its folder says of it so far; None before there is something."""
        folder = self.run_folder()
        if folder is None:
            return None
        with suppress(UserError):  # it is being written
            return read_run(folder)
        return None


def write_run(
    output: Path, number: int, values: Values, config: Mapping[str, Any] | None, seed: int | None = None
) -> PlannedRun:
    """Write the files of a run that is to be made.

    Args:
        output: folder of the sweep.
        number: of the run.
        values: of the keys that differ between runs.
        config: all options of its `fit`; None where they were refused.
        seed: added to the seeds that the options name, if not None; the run's seed is their sum.
    """
    folder = output / RUNS / f"{number:04d}"
    resolved: dict[str, Any] = json.loads(json.dumps(config or {}))
    if config is not None:
        resolved["trainer"] |= {"default_root_dir": str(folder), "enable_progress_bar": False}
    if seed is not None and config is not None:
        first = resolved["seed_everything"]
        resolved["seed_everything"] = (_FIRST_SEED if isinstance(first, bool) else first) + seed
        resolved["data"]["seed"] += seed
        seed = resolved["seed_everything"]
    with atomic_write(folder / _FIT, "w") as file:
        yaml.safe_dump(resolved, file, sort_keys=False, allow_unicode=True)
    with atomic_write(folder / _RUN, "w") as file:
        json.dump({"number": number, "values": values, "seed": seed}, file)
    return PlannedRun(number, values, seed, folder)


def read_runs(output: Path) -> list[PlannedRun]:
    """The runs of the sweep in `output`, by number."""
    runs = []
    for file in sorted((output / RUNS).glob(f"*/{_RUN}")):
        values = json.loads(file.read_text("utf-8"))
        runs.append(PlannedRun(values["number"], values["values"], values["seed"], file.parent))
    return sorted(runs, key=lambda run: run.number)


# What was asked for --------------------------------------------------------------------------------------------------


def configurations(options: SweepOptions) -> list[Values]:
    """What a grid or random draws try, single values included.

    Raises:
        UserError: a range in a grid, or more draws than there are configurations.
    """
    if options.method == "grid":
        return grid_values(options.keys)
    return random_values(options.keys, options.draws, options.seed)


def words_of(values: Values) -> list[str]:
    """`values` as `fit` takes them on its command line."""
    return [f"--{key}={value}" for key, value in values.items()]


def definition(options: SweepOptions) -> dict[str, Any]:
    """All that makes a sweep what it is, as JSON has it: the same sweep can go on, another one needs another folder.

    How many runs are made at a time, or shown, is no part of it; nor how many a search draws, which can be raised.
    """
    configs = {path: _fingerprint(Path(path)) for path in options.configs}
    keys = {key.key: asdict(key) for key in options.keys}
    values = {
        "config": configs,
        "set": keys,
        "method": options.method,
        "seeds": options.seeds,
        "seed": options.seed,
        "budget": None if options.budget is None else asdict(options.budget),
        "metric": options.metric,
        "storage": without_password(options.storage),
    }
    if options.method == "random":
        values["draws"] = options.draws
    return json.loads(json.dumps(values))


def definition_hash(options: SweepOptions) -> str:
    """16 hexadecimal digits of what machines that share a sweep must agree on."""
    shared = {key: value for key, value in definition(options).items() if key != "storage"}
    shared["config"] = list(shared["config"].values())  # files may have other names there
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def _fingerprint(path: Path) -> str:
    """SHA-256 of a file; "" for one that comes with the program."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}): check the path") from error


def write_plan(output: Path, asked: Mapping[str, Any], **more: Any) -> None:
    """Write what was asked for: from now on the plan is whole."""
    with atomic_write(output / PLAN, "w") as file:
        json.dump({"asked": asked, **more}, file, indent=1)


def read_plan(output: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan in `output`; None if there is none.

    Raises:
        UserError: it is of another sweep; the first difference is named.
    """
    file = output / PLAN
    if not file.is_file():
        return None
    try:
        plan: dict[str, Any] = json.loads(file.read_text("utf-8"))
        before = plan["asked"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: give another folder with --output") from error
    for key in before.keys() | asked.keys():
        if before.get(key) != asked.get(key):
            what = "a file of --config has changed, or another is named" if key == "config" else f"--{key} differs"
            raise UserError(f"{output} holds another sweep ({what}): give another folder with --output")
    return plan


def lock_sweep(output: Path) -> int:
    """Keep other sweeps out of a folder until this process and its runs have ended; a descriptor that holds the lock.

    The runs inherit it: those of a sweep that was killed keep it until they have ended, a moment later.

    Raises:
        UserError: another sweep writes to it, or it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made ({error.strerror}): choose another folder") from error
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            os.close(descriptor)
            raise UserError(f"{output}: another sweep is writing to it; wait, or give another --output") from None
        except OSError:  # a file system without locks
            pass
        for folder in (output, *(output / RUNS).glob("*")):
            remove_unfinished(folder)
        return descriptor
