"""A model's fastest form for inference, and the precision of its weights."""

from __future__ import annotations

import functools
from typing import Literal, get_args

import torch
from torch import nn

from lit_gpt.console.messages import note
from lit_gpt.errors import UserError, nearest
from lit_gpt.inference import native
from lit_gpt.inference.adapter_bank import AdapterBank, attach_adapters
from lit_gpt.inference.decode_kernel import FusedDecode
from lit_gpt.inference.linear import fast_linear
from lit_gpt.inference.quantize import GROUP
from lit_gpt.model.gpt import GPT
from lit_gpt.model.linear import BlockLinear
from lit_gpt.model.lora import NamedAdapters

InferencePrecision = Literal["auto", "fp32", "bf16", "int8", "int4"]
INFERENCE_PRECISIONS = get_args(InferencePrecision)


def prepare_for_inference(model: GPT, precision: str = "auto") -> GPT:
    """Turn `model` in place into its fastest form for decoding on its device; it cannot be trained any more.

    Args:
        model: a GPT. Its linear layers are replaced; embeddings and norms stay.
        precision: of the linear layers: `fp32`; `bf16`; `int8`, with a scale for each row; `int4`, with one for each
            32 weights of a row, where a row that is no multiple of 32 gets int8. The rest is fp32 on a CPU (bf16 in
            `bf16` without kernels) and bf16 on a GPU. `auto`: bf16 on a GPU that has it, else fp32.

    Raises:
        UserError: for an unknown precision.
    """
    model = model.eval().requires_grad_(False)
    precision = inference_precision(precision, model.wte.weight.device.type)
    on_gpu = model.wte.weight.device.type == "cuda"
    is_quantised = precision in ("int8", "int4")
    has_kernels = not on_gpu and native.load() is not None
    if not on_gpu and (reason := native.fault()):
        _tell_once(f"PyTorch does the work of the kernels, slower: {reason}")
    half = (precision == "bf16" and not has_kernels) or (is_quantised and on_gpu)
    model = model.to(torch.bfloat16 if half else torch.float32)
    _replace_linear_layers(model, precision if is_quantised or (precision == "bf16" and has_kernels) else None)
    if FusedDecode.fusible(model):
        model.decode_kernel = FusedDecode(model)
    return model


def prepare_adapters(model: GPT, adapters: NamedAdapters) -> AdapterBank:
    """Give a model that `prepare_for_inference` has turned over these adapters, in place.

    Returns:
        What says which row of a batch is computed with which of them.
    """
    bank = attach_adapters(model, list(adapters.weights.values()), model.config)
    model.config = adapters.config
    if isinstance(model.decode_kernel, FusedDecode):
        model.decode_kernel.adapters = bank
    return bank


@functools.cache
def _tell_once(message: str) -> None:
    note(message)


def _replace_linear_layers(model: nn.Module, weights: str | None) -> None:
    """Each by its fastest form, one at a time, so that memory stays low."""
    ungrouped: dict[int, int] = {}  # inputs → layers that int4 is not for
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear or type(child) is BlockLinear:
                setattr(parent, name, fast_linear(child, weights))
                if weights == "int4" and child.in_features % GROUP:
                    ungrouped[child.in_features] = ungrouped.get(child.in_features, 0) + 1
    for n_in, count in ungrouped.items():
        note(f"int4: {count} layers of {n_in} inputs are in int8 instead: {n_in} is no multiple of {GROUP}")


def inference_precision(precision: str, device: str) -> str:
    """The one to use: `auto` is bf16 on CUDA devices that have it, and fp32, which changes no text, elsewhere.

    Raises:
        UserError: for an unknown precision.
    """
    if precision not in INFERENCE_PRECISIONS:
        raise UserError(f'unknown precision "{precision}": {nearest(precision, INFERENCE_PRECISIONS)}')
    if precision != "auto":
        return precision
    return "bf16" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
