"""Several documents in one row: attention inside each of them, and positions that begin at 0 in each.

Axes: B batch, T query and key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_gpt.model.kv_cache import attention_mask


class DocumentMasks:
    """What the tokens of rows that hold several documents see of each other.

    Attributes:
        positions: (B, T) position of each token in its document.
    """

    def __init__(self, documents: Tensor) -> None:
        """Find where documents begin.

        Args:
            documents: (B, T) number of each token's document; a document is a stretch of equal numbers.
        """
        index = torch.arange(documents.size(1), device=documents.device)
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        self._starts = torch.where(begins, index, 0).cummax(1).values  # (B, T)
        self.positions = index - self._starts
        self._masks: dict[int | None, Tensor] = {}  # made by the first layer that needs one, for all

    def visible(self, window: int | None) -> Tensor:
        """(B, 1, T, T) True where a query attends to a key, in a layer with this sliding window."""
        n_tokens = self._starts.size(1)
        if window is not None and n_tokens <= window:
            window = None
        if window not in self._masks:
            index = torch.arange(n_tokens, device=self._starts.device)
            inside = index >= self._starts[..., None]  # (B, T, T): the key is not of an earlier document
            self._masks[window] = (attention_mask(index, n_tokens, window) & inside)[:, None]
        return self._masks[window]
