"""Cross-entropy over a large vocabulary in chunks of rows: the (N, V) logits never exist at once.

Axes: N tokens, C width, V vocabulary rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_gpt.batch import IGNORE_INDEX
from lit_gpt.model.linear import product

CHUNK_BYTES = 1 << 28
"""Logits of one chunk. Each chunk adds to the head's gradient, which costs as much as a hundred rows."""

FROZEN_CHUNK_BYTES = 1 << 25
"""The same where the head is frozen and no gradient of it is added up."""

BLOCK = 1 << 21
"""Logits that are in fp32 at once: 8 MB, in the cache."""


def head_loss(
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    n_vocab: int,
    softcap: float | None = None,
    token_rows: Tensor | None = None,
    first_token: int = 0,
) -> Tensor:
    """Summed cross-entropy in nats of softmax(softcap(x Wᵀ + b)) against `targets`, to be differentiated once.

    Args:
        x: (N, C) hidden states.
        targets: (N,) ids; `IGNORE_INDEX` is not counted.
        weight: (V, C) of the head.
        bias: (V,) or None.
        rows: of one chunk.
        n_vocab: ids below this exist; the head's rows beyond are padding.
        softcap: None, or c in c · tanh(logits / c).
        token_rows: the rows of a frozen `weight` that are trained all the same, from id `first_token` on: they get the
            gradient, what they hold is read from `weight`.
        first_token: the id of the first of them.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _HeadLoss.apply(x, targets, weight, bias, rows, n_vocab, softcap, token_rows, first_token)


class _HeadLoss(torch.autograd.Function):
    """Finds the gradient in the forward pass, while a chunk's logits are there: no product is computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: int,
        n_vocab: int,
        softcap: float | None,
        token_rows: Tensor | None,
        first_token: int,
    ) -> Tensor:
        w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        _, _, trains_weight, trains_bias, *_ = ctx.needs_input_grad
        trained = slice(first_token, first_token + (0 if token_rows is None else len(token_rows)))
        losses, grad_x, grad_weight, grad_bias, grad_rows = [], [], None, None, None
        for chunk, chunk_targets in zip(x.split(rows), targets.split(rows)):
            logits = product(chunk, w, b)
            size = max(1, BLOCK // len(weight))
            losses += [
                _to_gradient(block, block_targets, n_vocab, softcap).sum()
                for block, block_targets in zip(logits.split(size), chunk_targets.split(size))
            ]
            grad_x.append(product(logits, w.t()))
            if trains_weight:
                grad_weight = _add(grad_weight, product(logits.t(), chunk.t()))
            if trains_bias:
                grad_bias = _add(grad_bias, logits.sum(0))
            if token_rows is not None:
                grad_rows = _add(grad_rows, product(logits[:, trained].t(), chunk.t()))
            del logits  # before the next chunk's
        grads = [(grad_weight, weight), (grad_bias, bias), (grad_rows, token_rows)]
        ctx.save_for_backward(torch.cat(grad_x), *(_like(grad, tensor) for grad, tensor in grads))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> Any:
        grads = [None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors]
        return grads[0], None, grads[1], grads[2], None, None, None, grads[3], None


def _like(grad: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    """A gradient in the dtype of its tensor."""
    return None if grad is None or tensor is None else grad.to(tensor.dtype)


def target_losses(
    x: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    n_vocab: int,
    softcap: float | None = None,
    token_rows: Tensor | None = None,
    first_token: int = 0,
) -> Tensor:
    """The cross-entropy of each row by itself, (N,), 0 where the target does not count; arguments as of `head_loss`."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _TargetLosses.apply(x, targets, weight, bias, rows, n_vocab, softcap, token_rows, first_token)


class _TargetLosses(torch.autograd.Function):
    """The factor of each row's gradient is known in the backward pass only: the logits are computed again there."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: int,
        n_vocab: int,
        softcap: float | None,
        token_rows: Tensor | None,
        first_token: int,
    ) -> Tensor:
        ctx.save_for_backward(x, targets, weight, bias, token_rows)
        ctx.options = rows, n_vocab, softcap, first_token
        w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        chunks = zip(x.split(rows), targets.split(rows))
        return torch.cat([_chunk_gradient(*chunk, w, b, n_vocab, softcap)[1] for chunk in chunks])

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> Any:
        x, targets, weight, bias, token_rows = ctx.saved_tensors
        rows, n_vocab, softcap, first_token = ctx.options
        trained = slice(first_token, first_token + (0 if token_rows is None else len(token_rows)))
        w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        grad_x, grad_weight, grad_bias, grad_rows = [], None, None, None
        for chunk, chunk_targets, factors in zip(x.split(rows), targets.split(rows), grad_losses.split(rows)):
            logits, _ = _chunk_gradient(chunk, chunk_targets, w, b, n_vocab, softcap)
            logits *= factors[:, None].to(logits.dtype)
            grad_x.append(product(logits, w.t()))
            if ctx.needs_input_grad[2]:
                grad_weight = _add(grad_weight, product(logits.t(), chunk.t()))
            if bias is not None and ctx.needs_input_grad[3]:
                grad_bias = _add(grad_bias, logits.sum(0))
            if token_rows is not None:
                grad_rows = _add(grad_rows, product(logits[:, trained].t(), chunk.t()))
            del logits  # before the next chunk's
        grads = _like(grad_weight, weight), _like(grad_bias, bias), _like(grad_rows, token_rows)
        return torch.cat(grad_x), None, *grads[:2], None, None, None, grads[2], None


def _chunk_gradient(
    x: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, n_vocab: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The gradients (n, V) of the losses of n rows by their logits, and the losses (n,)."""
    logits = product(x, weight, bias)
    size = max(1, BLOCK // len(weight))
    blocks = zip(logits.split(size), targets.split(size))
    return logits, torch.cat([_to_gradient(*block, n_vocab, softcap) for block in blocks])


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    """Sums over chunks are kept in fp32 at least; piece by piece, for a sum of two dtypes copies the smaller first."""
    if total is None:
        return part.to(torch.promote_types(part.dtype, torch.float32))
    for some, more in zip(total.flatten().split(BLOCK), part.flatten().split(BLOCK)):
        some.add_(more)
    return total


def _to_gradient(logits: Tensor, targets: Tensor, n_vocab: int, softcap: float | None) -> Tensor:
    """The losses (n,) of a few rows of the head's output (n, V), in fp32 or more; each row becomes its own gradient."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = logits[:, :n_vocab].to(dtype)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    logprobs = scores.log_softmax(-1)
    counted = (targets != IGNORE_INDEX)[:, None]
    index = targets[:, None].where(counted, 0)
    losses = -logprobs.gather(1, index).where(counted, 0)[:, 0]
    grad = logprobs.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=dtype))
    if softcap is not None:  # the derivative of c · tanh(z / c) is 1 - tanh²
        grad *= 1 - (scores / softcap).square()
    logits[:, :n_vocab] = grad.mul_(counted)
    logits[:, n_vocab:] = 0
    return losses
