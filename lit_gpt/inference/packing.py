"""Quantised weights in the order in which the kernels read them: blocks of 16 outputs (csrc/abi.h has the layout).

Axes: I inputs, O outputs, G groups of 32 inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.inference.quantize import GROUP

_BLOCK = 16
"""Outputs whose sums are the lanes of a vector."""
_QUAD = 4
"""Inputs that one instruction multiplies and adds up."""


def pack_int8(rows: Tensor) -> Tensor:
    """int8 (O, I) → (blocks, quads, 16, 4), with zeros beyond O and I."""
    n_out, n_in = rows.shape
    padded = F.pad(rows, (0, -n_in % _QUAD, 0, -n_out % _BLOCK))
    return padded.view(-1, _BLOCK, padded.size(1) // _QUAD, _QUAD).transpose(1, 2).contiguous()


def pack_int4(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 0 … 15 (O, I) and fp16 (O, G) → bytes (blocks, G, 4, 16, 4) and fp16 (blocks, G, 16).

    A byte has an input of the first half of a group in its lower bits, and the one 16 further in its upper bits.
    """
    missing = -len(rows) % _BLOCK
    padded = F.pad(rows, (0, 0, 0, missing)).view(-1, _BLOCK, rows.size(1) // GROUP, 2, _QUAD, _QUAD)
    low, high = padded.permute(3, 0, 2, 4, 1, 5)
    joined = (low | high << 4).to(torch.uint8).contiguous()
    return joined, F.pad(scale, (0, 0, 0, missing)).view(-1, _BLOCK, scale.size(1)).transpose(1, 2).contiguous()
