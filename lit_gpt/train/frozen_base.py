"""The frozen base of LoRA: its linear layers in fewer bits, widened for each product and not kept wide.

Axes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_gpt.errors import UserError, nearest
from lit_gpt.inference.quantize import quantize_rows
from lit_gpt.model.linear import product
from lit_gpt.model.lora import linear_layers

BasePrecision = Literal["auto", "fp32", "bf16", "int8"]


def resolve_base_precision(requested: str, trainer_precision: str) -> str:
    """`fp32`, `bf16` or `int8`; `auto` is what is no slower than fp32 and gives the same results.

    Autocast rounds every weight to bf16 for its product, so that there a base in bf16 gives the same bits and saves the
    rounding; in fp32 a smaller weight would have to be widened each time.

    Args:
        requested: one of `BasePrecision`.
        trainer_precision: by the Trainer's name.

    Raises:
        UserError: for an unknown precision.
    """
    if requested not in get_args(BasePrecision):
        raise UserError(f'unknown base_precision "{requested}": {nearest(str(requested), get_args(BasePrecision))}')
    if requested != "auto":
        return requested
    return "bf16" if trainer_precision in ("bf16-mixed", "bf16-true") else "fp32"


def compact_base(model: nn.Module, precision: str) -> None:
    """Keep the weights of the linear layers inside the blocks in `precision`, in place, one layer at a time.

    Embeddings, norms and the head stay as they are.

    Args:
        model: a GPT whose layers have no LoRA terms yet.
        precision: `fp32` changes nothing.
    """
    if precision == "fp32":
        return
    for name, layer in linear_layers(model).items():
        parent, _, last = name.rpartition(".")
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), last, CompactLinear(layer, precision))


class CompactLinear(nn.Module):
    """A frozen linear layer with its weight in bf16, or in int8 with a scale for each row (as QLoRA, arXiv 2305.14314).

    The gradient of its input is that of a layer with the widened weight, to the bit.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, precision: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = linear.weight.detach(), None
        if precision == "int8":
            weight, largest = quantize_rows(weight.float())
            scale = largest / 127  # (O, 1)
        else:
            weight = weight.to(torch.bfloat16)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight that products are made with, (O, I)."""
        return _widened(self.weight, self.scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return _Product.apply(x, self.weight, self.scale, bias)


def _widened(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A stored weight as `dtype`, the product with its scale rounded once."""
    if scale is None:
        return weight.to(dtype)
    wide = torch.promote_types(scale.dtype, dtype)
    return (weight.to(wide) * scale.to(wide)).to(dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ + b; autograd would keep the widened weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return product(x, _widened(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, scale = ctx.saved_tensors
        return product(grad, _widened(weight, scale, grad.dtype).t()), None, None, None
