"""Embedding and head of which only the rows of new tokens are trained, when a vocabulary grows over a frozen base.

The trained rows are a parameter in the memory of the frozen weight's last rows: whatever reads the weight sees them,
and no gradient or optimizer state of the whole vocabulary exists.

Axes: N tokens, C width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenRows(nn.Module):
    """A module with a `weight` (V, C), some rows of which are the parameter `rows`.

    Attributes:
        rows: (n, C), in the weight's memory.
        first: the id of the first of them.
    """

    weight: Any  # of the embedding or the linear layer

    def train_rows(self, first: int, count: int) -> None:
        """Freeze the weight and train its rows `first` … `first + count - 1`."""
        self.weight.requires_grad_(False)
        self.first = first
        self.rows = nn.Parameter(self.weight.detach()[first : first + count])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenRows:
        """Moved or cast, both would have memory of their own; both had the same values."""
        super()._apply(fn, recurse)
        self.rows.data = self.weight.data[self.first : self.first + len(self.rows)]
        return self


class TokenRowsEmbedding(TokenRows, nn.Embedding):
    """An embedding with trained rows."""

    def forward(self, idx: Tensor) -> Tensor:
        """(…,) ids → (…, C)."""
        return _Lookup.apply(idx, self.weight, self.rows, self.first)


class TokenRowsLinear(TokenRows, nn.Linear):
    """A head with trained rows; the gradient that they get is that of `lit_gpt.model.loss.head_loss`."""


class _Lookup(torch.autograd.Function):
    """Rows of a frozen embedding, with a gradient for some of them."""

    @staticmethod
    def forward(ctx: Any, idx: Tensor, weight: Tensor, rows: Tensor, first: int) -> Tensor:
        ctx.save_for_backward(idx)
        ctx.first, ctx.shape = first, rows.shape
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (idx,) = ctx.saved_tensors
        trained = (idx >= ctx.first) & (idx < ctx.first + ctx.shape[0])
        total = grad.new_zeros(ctx.shape)
        total.index_add_(0, idx[trained] - ctx.first, grad[trained])
        return None, None, total, None


def train_token_rows(model: nn.Module, first: int, count: int, tied: bool) -> None:
    """Let the rows of `count` tokens from id `first` on be trained in the embedding and head of a GPT, in place.

    Args:
        model: a GPT, all else frozen.
        first: the first of the new ids.
        count: how many there are.
        tied: whether the head shares the embedding's weight.
    """
    for name, kind in (("wte", TokenRowsEmbedding), ("lm_head", TokenRowsLinear)):
        module = model.get_submodule(name)
        module.__class__ = kind  # the same module with its weight, hooks and names
        assert isinstance(module, TokenRows)
        if name == "lm_head" and tied:
            embedding = model.get_submodule("wte")
            assert isinstance(embedding, TokenRows)
            module.first, module.rows = first, embedding.rows
        else:
            module.train_rows(first, count)


def freeze_token_rows(model: nn.Module) -> None:
    """Undo `train_token_rows`; the weights keep the values that the rows have been given."""
    for name, kind in (("wte", nn.Embedding), ("lm_head", nn.Linear)):
        module = model.get_submodule(name)
        if isinstance(module, TokenRows):
            del module.rows
            module.__class__ = kind  # type: ignore[assignment]
