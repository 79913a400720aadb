"""The folder of one run: reserved for it alone, and locked while it writes."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lit_gpt.errors import UserError
from lit_gpt.files.atomic import remove_unfinished
from lit_gpt.files.locks import Lock

CHECKPOINTS = "checkpoints"


def folder_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint stands in, as an absolute path; None for a checkpoint on its own."""
    checkpoints = Path(os.path.abspath(checkpoint)).parent
    folder = checkpoints.parent
    marks = (path for name in ("config.yaml", "hparams.yaml", "events.out.tfevents.*") for path in folder.glob(name))
    return folder if checkpoints.name == CHECKPOINTS and any(marks) else None


def reserve(logs: Path) -> Path:
    """Make the folder of a new run, `version_N` under `logs`: of several at once each gets its own.

    Raises:
        UserError: it cannot be made.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
        taken = [int(found[1]) for path in logs.iterdir() if (found := re.fullmatch(r"version_(\d+)", path.name))]
        number = max(taken, default=-1) + 1
        while True:
            try:
                (logs / f"version_{number}").mkdir()
                return logs / f"version_{number}"
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UserError(
            f"{logs}: no run folder can be made ({error.strerror}); choose another --trainer.default_root_dir"
        ) from error


def lock(folder: Path) -> Lock:
    """Keep other runs out of `folder`, and remove what a killed run left unfinished in it.

    Raises:
        UserError: another run writes to it, or it cannot be written to.
    """
    try:
        held = Lock(folder, f"{folder}: another run is writing to it; wait for it to end, or start a new run")
    except OSError as error:
        raise UserError(
            f"{folder}: the run cannot write to it ({error.strerror}); copy its checkpoint elsewhere"
        ) from error
    for part in (folder, folder / CHECKPOINTS):
        remove_unfinished(part)
    return held
