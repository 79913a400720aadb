"""Position encodings: tables of sinusoids and rotary angles, looked up by position.

Axes: B batch, T query, C `n_embd`, D head dimension, R the first of its dimensions, which are turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.model.config import GPTConfig


class PositionTable(nn.Module):
    """A constant (block_size, …) table looked up by position.

    It is no buffer: it belongs to no checkpoint, outlives initialisation on the meta device, and follows the model from
    device to device but not into bf16, in which positions past 256 would run together.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PositionTable:
        super()._apply(fn, recurse)
        moved = fn(self.table)
        if moved.device.type != "meta":
            self.table = self.table.to(moved.device, torch.float64 if moved.dtype == torch.float64 else torch.float32)
        return self

    def forward(self, positions: Tensor) -> Tensor:
        """(T,) or (B, T) positions → the rows of the table, with the positions' axes in front."""
        return self.table.to(positions.device)[positions]


def sinusoidal_table(block_size: int, n_embd: int) -> Tensor:
    """(block_size, C): sines in even columns and cosines in odd ones (arXiv 1706.03762, section 3.5)."""
    with torch.device("cpu"):
        frequency = torch.exp(torch.arange(0, n_embd, 2, dtype=torch.float64) * (-math.log(10000.0) / n_embd))
        angle = torch.arange(block_size, dtype=torch.float64)[:, None] * frequency
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
        return table[:, :n_embd].float()


def rope_table(config: GPTConfig) -> Tensor:
    """(block_size, 2, R / 2): cosines and sines of each position's angles (arXiv 2104.09864)."""
    return _rotary_angles(config, config.rope_theta, config.rope_scaling)


def local_rope_table(config: GPTConfig) -> Tensor | None:
    """The same for layers with a sliding window; None where theirs are no others."""
    return None if config.rope_local_theta is None else _rotary_angles(config, config.rope_local_theta, None)


def _rotary_angles(config: GPTConfig, theta: float, scaling: dict[str, Any] | None) -> Tensor:
    with torch.device("cpu"):
        exponent = torch.arange(0, config.rotary_size, 2, dtype=torch.float64) / config.rotary_size
        frequency = scale_frequencies(theta**-exponent, scaling)
        angle = torch.arange(config.block_size, dtype=torch.float64)[:, None] * frequency
        return torch.stack([angle.cos(), angle.sin()], dim=1).float()


def scale_frequencies(frequency: Tensor, scaling: dict[str, Any] | None) -> Tensor:
    """Stretch rotary frequencies for contexts longer than those trained on.

    `linear` divides all by `factor` (arXiv 2306.15595). `llama3` leaves wavelengths below
    original / high_freq_factor alone, divides those above original / low_freq_factor, and blends between (the Llama 3.1
    release).
    """
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelengths, unchanged
    return keep * frequency + (1 - keep) * frequency / scaling["factor"]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn (B, heads, T, D) by `rotation`, (T, 2, R/2) or (B, T, 2, R/2): dimension i goes with i + R/2."""
    if rotation.dim() == 4:
        rotation = rotation[:, None]  # (B, 1, T, 2, R/2)
    cos, sin = rotation.to(x.dtype).unbind(-2)
    half = cos.size(-1)
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
