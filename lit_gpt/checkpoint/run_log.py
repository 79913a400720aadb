"""The log of a run, `run.jsonl` in its folder: a line of JSON for each start, each validation, and the end.

Lines are appended, and each is on the disk before the run goes on: who watches a run sees every validation at once, and
a kill costs none. A run that goes on from a checkpoint starts again at its step, and what was logged after that no
longer counts. Nor does a line that a kill or a full disk has cut short. Which logger a run has does not matter to it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError

RUN_LOG = "run.jsonl"
_MAX_BYTES = 64 << 20  # of the whole file: a hundred thousand validations


@dataclass(frozen=True)
class RunLog:
    """What counts of a run's log.

    Attributes:
        start: of the latest start: the `step` that it went on from, and what does not change while it runs.
        validations: in the order of their `step`: its `loss` in nats a token and the other figures, and what had been
            spent by then: `seconds`, `tokens`, `flops`, and the most memory of rank 0, `peak_memory` in bytes.
        end: what had been spent at the end; None for a run that has not come to its end.
    """

    start: Mapping[str, Any]
    validations: tuple[Mapping[str, Any], ...]
    end: Mapping[str, Any] | None


def append_event(folder: str | os.PathLike[str], event: str, values: Mapping[str, Any]) -> None:
    """Append a line to the log of the run in `folder`, and wait until it is on the disk.

    Args:
        folder: of the run.
        event: `start`, `validation` or `end`.
        values: plain ones, `step` among them; a number that is not finite becomes null.
    """
    line = json.dumps({"event": event, **_finite(values)}, allow_nan=False).encode() + b"\n"
    with open(Path(folder) / RUN_LOG, "ab+") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line  # the last line was cut short
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def read_run_log(folder: str | os.PathLike[str]) -> RunLog | None:
    """The log of the run in `folder`, which may still be written to; None if it has none.

    Raises:
        UserError: if it cannot be read, or is larger than any that is written here.
    """
    path = Path(folder) / RUN_LOG
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path} is larger than {_MAX_BYTES >> 20} MiB: no run writes that, remove it")
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check who may read it") from error
    start: Mapping[str, Any] = {}
    validations: dict[int, Mapping[str, Any]] = {}
    end: Mapping[str, Any] | None = None
    for values in filter(None, map(_event, lines)):
        step = values["step"]
        if values["event"] == "start":
            start, end = values, None
            validations = {number: kept for number, kept in validations.items() if number <= step}
        elif values["event"] == "validation":
            validations[step] = values
        elif values["event"] == "end":
            end = values
    return RunLog(start, tuple(values for _, values in sorted(validations.items())), end)


def _event(line: bytes) -> Mapping[str, Any] | None:
    """The values of a line; None if it is not whole, or none of ours."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    is_ours = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    return values if is_ours and isinstance(values.get("event"), str) else None
