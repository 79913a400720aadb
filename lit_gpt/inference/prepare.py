"""A model's fastest form for inference, and the precision of its weights."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from lit_gpt.errors import UserError, nearest
from lit_gpt.inference.decode_kernel import FusedDecode
from lit_gpt.inference.linear import fast_linear
from lit_gpt.model.gpt import GPT

InferencePrecision = Literal["auto", "fp32", "bf16", "int8"]
INFERENCE_PRECISIONS = get_args(InferencePrecision)


def prepare_for_inference(model: GPT, precision: str = "auto") -> GPT:
    """Turn `model` in place into its fastest form for decoding on its device; it cannot be trained any more.

    Args:
        model: a GPT. Its linear layers are replaced; embeddings and norms stay.
        precision: `fp32`; `bf16`; `int8` (linear layers in int8 with a scale for each row, the rest fp32 on a CPU
            and bf16 on a GPU); `auto`: bf16 on a GPU that has it, else fp32.

    Raises:
        UserError: for an unknown precision.
    """
    model = model.eval().requires_grad_(False)
    precision = inference_precision(precision, model.wte.weight.device.type)
    half = precision == "bf16" or (precision == "int8" and model.wte.weight.device.type == "cuda")
    model = model.to(torch.bfloat16 if half else torch.float32)
    _replace_linear_layers(model, int8=precision == "int8")
    if FusedDecode.fusible(model):
        model.decode_kernel = FusedDecode(model)
    return model


def _replace_linear_layers(model: nn.Module, int8: bool) -> None:
    """Each by its fastest form, one at a time, so that memory stays low."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, fast_linear(child, int8))


def inference_precision(precision: str, device: str) -> str:
    """`fp32`, `bf16` or `int8`; `auto` is bf16 on CUDA devices that have it and fp32, which changes no text, elsewhere.

    Raises:
        UserError: for an unknown precision.
    """
    if precision not in INFERENCE_PRECISIONS:
        raise UserError(f'unknown precision "{precision}": {nearest(precision, INFERENCE_PRECISIONS)}')
    if precision != "auto":
        return precision
    return "bf16" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
