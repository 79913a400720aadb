"""The key-value cache: rows of keys and values that a model appends to and a decoding strategy branches and cuts.

Axes: R rows, B rows in one forward pass, T new tokens, S keys, K kv heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_gpt.model.config import GPTConfig


class KVCache:
    """Preallocated keys and values of every layer for a number of rows, each row with a length of its own.

    A forward pass is three steps, so that nothing advances in secret:

        step = cache.step(rows, n_new)      # where the new tokens will stand
        logits = model(idx, cache=step)     # every layer writes its keys there and reads the row so far
        cache.extend(rows, n_new)           # now they count
    """

    def __init__(
        self,
        config: GPTConfig,
        n_row: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.n_layer, n_row, config.kv_heads, capacity, config.head_size)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * n_row

    @staticmethod
    def bytes_per_row(config: GPTConfig, capacity: int, dtype: torch.dtype = torch.float32) -> int:
        """Memory of one row, in bytes."""
        return 2 * config.n_layer * config.kv_heads * capacity * config.head_size * dtype.itemsize

    @property
    def n_row(self) -> int:
        """R."""
        return self.k.size(1)

    @property
    def capacity(self) -> int:
        """The most tokens that one row can hold."""
        return self.k.size(3)

    def step(self, rows: Sequence[int], n_new: int) -> CacheStep:
        """What one forward pass over `rows` with T = `n_new` tokens each sees of this cache.

        Rows that feed fewer tokens are padded on the right; `extend` them by their true count, and what the
        padding wrote is beyond their length, hence invisible, and overwritten next time.
        """
        longest = max(self.lengths[row] for row in rows) + n_new
        if longest > self.capacity:
            raise ValueError(f"{longest} tokens do not fit into a cache row of {self.capacity}")
        return CacheStep(self, list(rows), n_new)

    def extend(self, rows: Sequence[int], counts: Sequence[int] | int) -> None:
        """Count `counts` new tokens (one number, or one for each row) as part of `rows`."""
        for i, row in enumerate(rows):
            self.lengths[row] += counts if isinstance(counts, int) else counts[i]

    def truncate(self, row: int, length: int) -> None:
        """Forget everything in `row` after its first `length` tokens."""
        self.lengths[row] = min(self.lengths[row], length)

    def copy(self, source: int, target: int, length: int | None = None, start: int = 0) -> None:
        """Make row `target` equal to the first `length` tokens (all if None) of row `source`.

        The first `start` tokens are known to be equal already and are not copied.
        """
        n = self.lengths[source] if length is None else min(length, self.lengths[source])
        if source != target:
            self.k[:, target, :, start:n] = self.k[:, source, :, start:n]
            self.v[:, target, :, start:n] = self.v[:, source, :, start:n]
        self.lengths[target] = n

    def clear(self, row: int) -> None:
        """Zero `row`. A masked key still weighs 0, and 0 times what is not a number is not a number."""
        self.k[:, row] = 0
        self.v[:, row] = 0
        self.lengths[row] = 0


class CacheStep:
    """One forward pass's window on a `KVCache`.

    Attributes:
        stores: keys and values of the whole cache, (layers, R, K, capacity, D) each.
        rows: the rows of the cache that take part.
        starts: the tokens that each of them holds already.
        positions: (B, T) place of every new token in its row.
        mask: (B, 1, T, S) True where a query may look, or None where none is needed.
        is_causal: whether plain causal attention over T = S does instead of a mask.
    """

    def __init__(self, cache: KVCache, rows: list[int], n_new: int) -> None:
        device = cache.k.device
        self.stores = cache.k, cache.v
        self.rows = rows
        self.starts = starts = [cache.lengths[row] for row in rows]
        self._n_keys = max(starts) + n_new
        self._first = starts[0] if len(set(starts)) == 1 else None  # all rows equally long: plain slices will do
        contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
        self._slice = slice(rows[0], rows[0] + len(rows)) if contiguous else None
        # Cut once for all layers: layer by layer it would cost as much as the attention of a short row.
        self._seen: list[Tensor] | None = None
        self._fresh: list[Tensor] | None = None
        if self._slice is not None:
            self._seen = [store[:, self._slice, :, : self._n_keys] for store in self.stores]  # (layers, B, K, S, D)
            if self._first is not None:
                self._fresh = [store[:, :, :, self._first :] for store in self._seen]
        self._rows = torch.tensor(rows, device=device)
        self.positions = torch.tensor(starts, device=device)[:, None] + torch.arange(n_new, device=device)
        self.is_causal = self._first == 0 and n_new > 1
        self.mask: Tensor | None = None
        if not self.is_causal and not (self._first is not None and n_new == 1):
            keys = torch.arange(self._n_keys, device=device)
            self.mask = keys <= self.positions[:, None, :, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, D) new keys and values of one layer; return the (B, K, S, D) that its queries may see."""
        return self._write_read(0, layer, k), self._write_read(1, layer, v)

    def _write_read(self, which: int, layer: int, new: Tensor) -> Tensor:
        if self._fresh is not None:
            self._fresh[which][layer].copy_(new)
        else:
            store = self.stores[which][layer]  # (R, K, capacity, D)
            store[self._rows[:, None], :, self.positions] = new.transpose(1, 2).to(store.dtype)
        if self._seen is not None:
            return self._seen[which][layer]
        return self.stores[which][layer][self._rows, :, : self._n_keys]
