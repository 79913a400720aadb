"""The shapes of a batch on its way through the model, from hooks on a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import Block
from lit_gpt.model.uninitialized import empty_gpt

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeStep:
    """One layer or operation that a batch goes through.

    Attributes:
        name: of the module, or of the operation in its module.
        kind: its class, or what it computes.
        before: shape of its input.
        after: shape of its output.
    """

    name: str
    kind: str
    before: Shape
    after: Shape


class _AttentionShapes(TorchFunctionMode):
    """Records the product over heads, which is a function and no module."""

    def __init__(self, steps: list[ShapeStep]) -> None:
        super().__init__()
        self.steps, self.module = steps, ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__ == "scaled_dot_product_attention":
            name = f"{self.module}: q kᵀ, softmax, · v"
            self.steps.append(ShapeStep(name, "over heads (B, H, T, D)", tuple(args[0].shape), tuple(result.shape)))
        return result


def walk_shapes(config: GPTConfig, batch_size: int, context: int) -> list[ShapeStep]:
    """The steps of a forward pass of (batch_size, context) tokens, in their order.

    The model's own `forward` runs on the meta device, where tensors have shapes and no memory: a model of any size
    answers in milliseconds.

    Args:
        config: the model's shape.
        batch_size: B.
        context: T, at most `block_size`.
    """
    model = empty_gpt(config).to("meta").eval()
    steps: list[ShapeStep] = []
    attention = _AttentionShapes(steps)

    def enter(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            attention.module = name

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and isinstance(inputs[0], Tensor):
                kind = type(module).__name__
                steps.append(ShapeStep(name, kind, tuple(inputs[0].shape), tuple(output.shape)))

        return hook

    for name, module in model.named_modules():
        if name.endswith(".attn"):
            module.register_forward_pre_hook(enter(name))
        is_layer = not any(True for _ in module.children()) and not isinstance(module, (nn.Identity, nn.Dropout))
        if name and (is_layer or isinstance(module, Block)):
            module.register_forward_hook(leave(name))
    with torch.no_grad(), attention:
        model(torch.zeros(batch_size, context, dtype=torch.long, device="meta"))
    return steps
