"""A run's record: its configuration, curve and state, read from its folder. Imports no torch and no Lightning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_gpt.checkpoint.run_log import RunLog, read_run_log
from lit_gpt.errors import UserError

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
BEST, LAST = "best.ckpt", "last.ckpt"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_KEYS = 10_000
_MAX_PREFIX = 1000  # characters


class CurvePoint(NamedTuple):
    """One validation, and what had been spent on training by then.

    Attributes:
        step: optimizer steps.
        seconds: of training, validations and checkpoints included, over all resumed parts of the run.
        tokens: that were trained on, each time they were, over all ranks.
        flops: floating-point operations of the forward and backward passes in training.
        loss: nats a token.
        bits_per_byte: None where the model has no tokenizer.
    """

    step: int
    seconds: float | None
    tokens: int | None
    flops: float | None
    loss: float
    bits_per_byte: float | None


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says of it; None where it does not say.

    Attributes:
        folder: of the run.
        name: what the user called it.
        config: of config.yaml, resolved.
        curve: its validations so far, by step.
        finished: whether it has come to its end. One that was stopped or killed, or still runs, has not.
        checkpoint: the one that was named; of a folder the best one, or else the last.
        steps: optimizer steps by the end, or by the latest validation.
        seconds: spent by then, as in `CurvePoint`.
        tokens: likewise.
        flops: likewise.
        peak_memory: bytes: the most that rank 0 had allocated on its GPU, or resident in main memory.
        about: what the log says of the run's start: `parameters`, `tokenizer` (its hash), `train_sha256` and
            `val_sha256` of its tokens, and the `code` and `environment` that it ran with. Empty for a run without a
            log, as those of earlier versions are.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    curve: list[CurvePoint]
    finished: bool
    checkpoint: Path | None = None
    steps: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    flops: float | None = None
    peak_memory: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def point(self) -> CurvePoint | None:
        """The validation of `checkpoint`: the lowest loss for best.ckpt, which is kept by that, else the latest."""
        if self.checkpoint is not None and self.checkpoint.name != BEST:
            return self.curve[-1] if self.curve else None
        return min(self.curve, key=lambda point: point.loss, default=None)


def read_run(path: Path) -> RunRecord:
    """The record of a run: its folder (`lightning_logs/version_N`), or a checkpoint in it. The run may still go on.

    Raises:
        UserError: if it is none, or its files cannot be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run's folder, such as lightning_logs/version_0")
    folder, checkpoint = (path, _checkpoint_of(path)) if path.is_dir() else (path.absolute().parent.parent, path)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{path} is no run: give a folder with a {CONFIG}, such as lightning_logs/version_0")
    log = read_run_log(folder) or RunLog({}, (), None)
    curve = [point for point in map(_curve_point, log.validations) if point is not None]
    spent = log.end or (log.validations[-1] if log.validations else log.start)
    return RunRecord(
        folder=folder,
        name=str(path),
        config=_read_config(folder / CONFIG),
        curve=curve,
        finished=log.end is not None,
        checkpoint=checkpoint,
        steps=whole(spent.get("step")),
        seconds=number(spent.get("seconds")),
        tokens=whole(spent.get("tokens")),
        flops=number(spent.get("flops")),
        peak_memory=whole(spent.get("peak_memory")),
        about=log.start,
    )


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value, as the flags are named: `model.optimizer.lr`. A list is a value.

    Raises:
        UserError: if it has more keys than any run's.
    """
    flat: dict[str, Any] = {}
    groups: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    for prefix, group in groups:  # which grows meanwhile
        for name, value in group.items():
            if isinstance(value, Mapping) and value:
                groups.append((f"{prefix}{name}.", value))
            else:
                flat[f"{prefix}{name}"] = value
        if len(flat) + len(groups) > _MAX_KEYS or len(prefix) > _MAX_PREFIX:
            raise UserError(f"a {CONFIG} has more keys, or deeper ones, than any run writes: restore it")
    return flat


def number(value: object) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, int):
        value = None if isinstance(value, bool) or abs(value) >= 1 << 63 else float(value)
    return value if isinstance(value, float) and math.isfinite(value) else None


def whole(value: object) -> int | None:
    """A number of things; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63 else None


def _checkpoint_of(folder: Path) -> Path | None:
    found = (folder / CHECKPOINTS / name for name in (BEST, LAST))
    return next((path for path in found if path.is_file()), None)


def _read_config(path: Path) -> dict[str, Any]:
    """A run's configuration.

    Raises:
        UserError: if it cannot be read or is none.
    """
    remedy = "restore it, or leave the run out"
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise UserError(f"{path} is larger than {_MAX_CONFIG_BYTES >> 20} MiB, no run writes that: {remedy}")
        values = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check who may read it") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of UTF-8, or a date that is none
        raise UserError(f"{path} is no YAML ({' '.join(str(error).split())[:200]}): {remedy}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{path} holds no options of a run: {remedy}")
    return values


def _curve_point(values: Mapping[str, Any]) -> CurvePoint | None:
    """A validation; None for one without a finite loss, with which nothing can be compared."""
    loss = number(values.get("loss"))
    if loss is None:
        return None
    seconds, flops = number(values.get("seconds")), number(values.get("flops"))
    return CurvePoint(
        values["step"], seconds, whole(values.get("tokens")), flops, loss, number(values.get("bits_per_byte"))
    )
