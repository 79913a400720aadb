"""The result of a forward pass of the GPT.

Axes: B batch, T query, C `n_embd`, V `vocab_size`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class GPTOutput(NamedTuple):
    """The result of `GPT.forward`; what was not asked for is None.

    A tuple, so that hooks which walk over a module's tensors (FSDP2's, DDP's) find these.

    Attributes:
        logits: (B, T, V), or (B, 1, V) with `last_only`; None with `targets`.
        hidden: with `return_hidden` the hidden states after `ln_f`, (B, T, C), or (B, 1, C) with `last_only`.
        loss_sum: with `targets` their summed cross-entropy in nats, a scalar.
        n_targets: with `targets` the number of those that count, a scalar: the mean loss is `loss_sum / n_targets`.
        losses: with `each_target` the cross-entropy of each target in nats, (B, T), 0 where it does not count.
        predicted: with `predict_at` the likeliest next id at each of its n positions, (n,) int64.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    loss_sum: Tensor | None = None
    n_targets: Tensor | None = None
    predicted: Tensor | None = None
    losses: Tensor | None = None
