"""LayerNorm and RMSNorm, as the config asks for them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.model.config import GPTConfig


def make_norm(config: GPTConfig, size: int) -> nn.Module:
    """The config's norm over the last axis of `size`."""
    if config.norm == "rmsnorm":
        return RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias)


class RMSNorm(nn.RMSNorm):
    """RMSNorm that follows its input's dtype: under autocast the fused kernel refuses bf16 inputs with fp32 weights."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return F.rms_norm(x, tuple(self.normalized_shape), self.weight.to(x.dtype), self.eps)
