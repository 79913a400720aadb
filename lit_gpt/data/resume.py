"""A checkpoint's count of batches and cursor of the data: made to agree, and refused for other data."""

from __future__ import annotations

from typing import Any

from lit_gpt.errors import UserError


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


_WITHOUT = {"rows": "stream", "mixture": None}
"""What a checkpoint from before there were these options was trained with."""


def check_same_order(path: str | None, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a cursor that is a position in other data, or in another order of it.

    Args:
        path: of the data.
        saved: the state in the checkpoint.
        now: name → value of what the order depends on.

    Raises:
        UserError: naming the first value that differs.
    """
    for name, value in now.items():
        if name == "versions" and name not in saved:
            continue  # an earlier checkpoint: it does not say
        before = saved.get(name, _WITHOUT.get(name))
        if before == value:
            continue
        if name in ("fingerprint", "versions"):
            raise UserError(
                f"{path}: its training tokens are not those that the run was trained on ({name} {value[:12]}, "
                f"the checkpoint's is {str(before)[:12]}): name the run's data, or start a new run with --init_from"
            )
        key = "shuffle_tokens" if name == "window" else name
        raise UserError(
            f"data.{key} gives {name} {value}, the run's is {before}, and the order of samples depends on it: leave it "
            "out, or start a new run with --init_from"
        )
