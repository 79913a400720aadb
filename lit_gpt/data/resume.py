"""Lightning's count of batches in a checkpoint, made to agree with the cursor of the data."""

from __future__ import annotations

from typing import Any


def align_progress(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Make a checkpoint's count of micro-batches one of whole optimizer steps, as the cursor counts.

    In the middle of a step the gradients so far are not in the checkpoint: the step begins again. And if the number of
    micro-batches per step has changed, as it may with the number of ranks, their count changes with it.

    Args:
        checkpoint: as Lightning loads it, changed in place.
        accumulate: the resuming Trainer's `accumulate_grad_batches`.
    """
    data = checkpoint.get("TokenDataModule") or {}
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = loop.get("epoch_loop.batch_progress")
    if "accumulate" not in data or progress is None:
        return
    old = data["accumulate"]
    for counts in (progress["total"], progress["current"]):
        done = counts["processed"] // old * accumulate
        # Lightning tells a checkpoint from inside on_train_batch_end by its `completed`, one short.
        inside = counts["processed"] % old == 0 and counts["completed"] < counts["processed"] == counts["ready"]
        counts.update(ready=done, started=done, processed=done, completed=done - inside)
