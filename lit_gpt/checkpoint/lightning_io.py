"""Lightning's CheckpointIO over our checkpoint files: written whole, read without running code."""

from __future__ import annotations

import os
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_gpt.checkpoint.format import load_checkpoint, save_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """A temporary file in the checkpoint's own folder, flushed and renamed; Lightning's copies across file systems."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`; a crash at any moment leaves the old file or the new one, never half of one."""
        save_checkpoint(path, checkpoint)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint's dict on the CPU. It is always read with `weights_only=True` and mapped, not copied:
        predicting touches no page of the optimizer's state.

        Raises:
            UserError: if it is missing, truncated or not ours.
        """
        return load_checkpoint(path)
