"""Loss, perplexity and bits per byte over a whole data set, exact for any batch size and number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from lit_gpt.tokenizer.tokenizer import Tokenizer


class SumMetric(Metric):
    """Sums in fp64 and int64 that stay so whatever the module around them is cast to.

    A thousand bf16 additions would lose the fourth digit.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> SumMetric:
        """Follow the module from device to device, but not into another number format."""
        super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0, dtype=torch.int64)).device))
        return self


class LanguageModelMetric(SumMetric):
    """Sums of (nll, tokens, bytes) over batches and processes, and the three figures that follow from them.

    `compute` returns `loss` (nats a token), `perplexity` = exp(loss) and, where bytes were counted, `bits_per_byte`
    = nll / (ln 2 · bytes), the only one that is comparable between tokenizers.
    """

    higher_is_better = False
    nll: Tensor
    tokens: Tensor
    n_bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("n_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor, n_bytes: Tensor | int = 0) -> None:
        """Add one batch.

        Args:
            nll: summed cross-entropy, in nats.
            tokens: number of predicted tokens.
            n_bytes: number of bytes that those tokens stand for; 0 where it is not known.
        """
        self.nll += nll.detach().to(self.nll.dtype)
        self.tokens += tokens
        self.n_bytes += n_bytes

    def compute(self) -> dict[str, Tensor]:
        """The figures; scalars, in fp64."""
        loss = self.nll / self.tokens
        figures = {"loss": loss, "perplexity": loss.exp()}
        if self.n_bytes > 0:
            figures["bits_per_byte"] = self.nll / math.log(2) / self.n_bytes
        return figures


def byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """(V,) int64: how many bytes of text each token stands for; 0 for special and unused ids."""
    known = min(vocab_size, tokenizer.n_vocab)
    lengths = [len(tokenizer.token_bytes(token)) for token in range(known)]
    return torch.tensor(lengths + [0] * (vocab_size - known), dtype=torch.int64)


def count_bytes(targets: Tensor, lengths: Tensor) -> Tensor:
    """Bytes that `targets` stand for, a scalar; negative ids (padding) count as none."""
    return (lengths[targets.clamp(min=0)] * (targets >= 0)).sum()
