"""LayerNorm and RMSNorm, as the config asks for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.model.config import GPTConfig


def make_norm(config: GPTConfig, size: int) -> nn.Module:
    """The config's norm over the last axis of `size`."""
    if config.norm == "rmsnorm":
        return make_rms_norm(config, size)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias)


def make_rms_norm(config: GPTConfig, size: int) -> nn.Module:
    """The config's RMSNorm, which that of queries and keys is whatever the others are."""
    kind = UnitOffsetRMSNorm if config.norm_unit_offset else RMSNorm
    return kind(size, eps=config.norm_eps)


class RMSNorm(nn.RMSNorm):
    """RMSNorm that follows its input's dtype: under autocast the fused kernel refuses bf16 inputs with fp32 weights."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return F.rms_norm(x, tuple(self.normalized_shape), self.weight.to(x.dtype), self.eps)


class UnitOffsetRMSNorm(RMSNorm):
    """RMSNorm whose factor is 1 + weight: weight decay draws it to 1. In fp32 at least, as 1 + weight needs digits."""

    def reset_parameters(self) -> None:
        """A factor of one."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C), in the input's dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), tuple(self.normalized_shape), 1 + self.weight.to(dtype), self.eps).to(x.dtype)
