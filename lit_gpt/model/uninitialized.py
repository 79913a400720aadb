"""Models whose weights are not filled as they are built: a checkpoint's values follow."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT

_FILLING = frozenset({
    "normal_", "trunc_normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_",
    "zeros_", "ones_", "constant_", "fill_", "zero_",
})  # fmt: skip


class NoInitialization(TorchFunctionMode):
    """A context in which nothing fills a tensor in place: a new layer's weights are whatever its memory holds.

    Layers of PyTorch fill their weights as they are built, and `GPT.init_weights` fills them again: 0.25 G draws for a
    model of 124M, thrown away when a checkpoint is loaded. On the meta device there is nothing to fill, but
    `normal_` there imports PyTorch's compiler and sympy, for seconds. The context holds for its own thread only.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, unless it fills its first argument, which is returned as it is."""
        if func.__name__ in _FILLING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def empty_gpt(config: GPTConfig) -> GPT:
    """A GPT whose weights have names, shapes and no memory, of any size, in milliseconds.

    It is for `load_state_dict(…, assign=True)`, and for whoever asks for nothing but names and shapes. Tables of
    positions are real.
    """
    with torch.device("meta"), NoInitialization():
        return GPT(config)
