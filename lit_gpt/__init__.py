"""Train a GPT from scratch, look inside it and put it to work.

>>> from lit_gpt import load
>>> gpt = load("x.ckpt")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_gpt.api import load
    from lit_gpt.data.datamodule import TokenDataModule
    from lit_gpt.generation.generation_config import GenerationConfig
    from lit_gpt.model.config import GPTConfig
    from lit_gpt.model.gpt import GPT
    from lit_gpt.train.module import LitGPT

# Large tensors in huge pages: a training step on a CPU spends up to a third of its time on faults of small ones. torch
# reads this when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_MODULES = {
    "GPT": "lit_gpt.model.gpt",
    "GPTConfig": "lit_gpt.model.config",
    "GenerationConfig": "lit_gpt.generation.generation_config",
    "LitGPT": "lit_gpt.train.module",
    "TokenDataModule": "lit_gpt.data.datamodule",
    "load": "lit_gpt.api",
}

__all__ = ["GPT", "GPTConfig", "GenerationConfig", "LitGPT", "TokenDataModule", "load"]


def __getattr__(name: str) -> Any:
    """The public name, imported on first use: `lit_gpt --help` must not pay for torch."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'lit_gpt' has no attribute '{name}'")
