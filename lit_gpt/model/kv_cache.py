"""The key-value cache: slots of keys and values that a model appends to and a decoding strategy copies and truncates.

A slot holds one sequence.

Axes: L slots, B those of one forward pass, T new tokens, S keys, K kv heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_gpt.model.config import GPTConfig

_CACHE_LINE = 64  # bytes


class KVCache:
    """Preallocated keys and values of every layer for a number of slots, each slot with a length of its own.

    All tokens of a slot are kept, in layers with a sliding window as well: a window saves no memory, what is outside of
    it is masked. So a slot can be cut to any length and be copied, which the prefix cache and the search strategies
    need.

    A forward pass is three steps, so that only the caller changes a length:

        step = cache.step(slots, n_new)            # the positions of the new tokens
        logits = model(idx, cache=step).logits     # every layer writes its keys there and reads the slot so far
        cache.extend(slots, n_new)                 # now they count

    Attributes:
        k: keys, (n_layer, L, K, capacity, D).
        v: values, likewise.
        lengths: the number of tokens in each slot.
    """

    def __init__(
        self,
        config: GPTConfig,
        n_slots: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.n_layer, n_slots, config.kv_heads, capacity, config.head_size)
        self.k = _zeros(shape, dtype, torch.device(device))
        self.v = _zeros(shape, dtype, torch.device(device))
        self.lengths = [0] * n_slots

    @staticmethod
    def bytes_per_slot(config: GPTConfig, capacity: int, dtype: torch.dtype = torch.float32) -> int:
        """Memory of one slot of `capacity` tokens, in bytes."""
        return 2 * config.n_layer * config.kv_heads * capacity * config.head_size * dtype.itemsize

    @property
    def n_slots(self) -> int:
        """L."""
        return self.k.size(1)

    @property
    def capacity(self) -> int:
        """The most tokens that one slot can hold."""
        return self.k.size(3)

    def step(self, slots: Sequence[int], n_new: int) -> CacheStep:
        """What one forward pass over `slots` with T = `n_new` tokens each sees of this cache.

        Rows of the batch that feed fewer tokens are padded on the right; `extend` their slots by the true count, and
        what the padding wrote is beyond their length, hence invisible, and overwritten next time.

        Raises:
            ValueError: if a slot cannot hold the new tokens.
        """
        longest = max(self.lengths[slot] for slot in slots) + n_new
        if longest > self.capacity:
            raise ValueError(f"{longest} tokens do not fit into a cache slot of {self.capacity}")
        return CacheStep(self, list(slots), n_new)

    def extend(self, slots: Sequence[int], counts: Sequence[int] | int) -> None:
        """Count `counts` new tokens (one number, or one for each slot) as part of `slots`."""
        for i, slot in enumerate(slots):
            self.lengths[slot] += counts if isinstance(counts, int) else counts[i]

    def truncate(self, slot: int, length: int) -> None:
        """Forget everything in `slot` after its first `length` tokens."""
        self.lengths[slot] = min(self.lengths[slot], length)

    def copy(self, source: int, target: int, length: int | None = None, start: int = 0) -> None:
        """Make slot `target` equal to the first `length` tokens (all if None) of slot `source`.

        The first `start` tokens are known to be equal already and are not copied.
        """
        n = self.lengths[source] if length is None else min(length, self.lengths[source])
        if source != target:
            self.k[:, target, :, start:n] = self.k[:, source, :, start:n]
            self.v[:, target, :, start:n] = self.v[:, source, :, start:n]
        self.lengths[target] = n

    def clear(self, slot: int) -> None:
        """Zero `slot`. A masked key still weighs 0, and 0 times what is not a number is not a number."""
        self.k[:, slot] = 0
        self.v[:, slot] = 0
        self.lengths[slot] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, which on a CPU take memory and time as they are touched first.

    `torch.zeros` writes them all: 5 GB for 64 slots of a GPT-2, for seconds at a server's start, most of it never used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(nbytes + _CACHE_LINE, np.uint8)  # from the system, which hands out zeros
    start = -memory.ctypes.data % _CACHE_LINE
    return torch.from_numpy(memory[start : start + nbytes]).view(dtype).view(shape)


def attention_mask(positions: Tensor, n_keys: int, window: int | None = None) -> Tensor:
    """(…, T) positions of queries → (…, T, S) True where one attends to one of the first S = `n_keys` positions.

    A query sees its own position and those before it; with a `window` of W only the last W of these.
    """
    keys = torch.arange(n_keys, device=positions.device)
    mask = keys <= positions[..., None]
    return mask if window is None else mask & (keys > positions[..., None] - window)


class CacheStep:
    """What one forward pass reads and writes of a `KVCache`.

    Attributes:
        stores: keys and values of the whole cache, (n_layer, L, K, capacity, D) each.
        slots: the slots of this pass, one for each row of the batch.
        starts: the number of tokens that each of them holds already.
        n_new: T.
        positions: (B, T) position of every new token in its sequence.
    """

    def __init__(self, cache: KVCache, slots: list[int], n_new: int) -> None:
        device = cache.k.device
        self.stores = cache.k, cache.v
        self.slots = slots
        self.starts = starts = [cache.lengths[slot] for slot in slots]
        self.n_new = n_new
        self._n_keys = max(starts) + n_new
        self._first = starts[0] if len(set(starts)) == 1 else None  # all slots equally long: plain slices will do
        contiguous = slots == list(range(slots[0], slots[0] + len(slots)))
        self._slice = slice(slots[0], slots[0] + len(slots)) if contiguous else None
        # Cut once for all layers: layer by layer it would cost as much as the attention of a short sequence.
        self._seen: list[Tensor] | None = None
        self._fresh: list[Tensor] | None = None
        if self._slice is not None:
            self._seen = [store[:, self._slice, :, : self._n_keys] for store in self.stores]  # (n_layer, B, K, S, D)
            if self._first is not None:
                self._fresh = [store[:, :, :, self._first :] for store in self._seen]
        self._slots = torch.tensor(slots, device=device)
        self.positions = torch.tensor(starts, device=device)[:, None] + torch.arange(n_new, device=device)
        self._masks: dict[int | None, Tensor] = {}  # by window, made by the first layer that needs one, for all

    def visible(self, window: int | None) -> tuple[Tensor | None, bool]:
        """What the queries attend to in a layer with this sliding window.

        Returns:
            (B, 1, T, S) True where a query attends to a key, None where none is needed; and whether plain causal
            attention over T = S does instead.
        """
        if window is None or self._n_keys <= window:
            window = None
            if self._first is not None and (self._first == 0 or self.n_new == 1):
                return None, self.n_new > 1
        if window not in self._masks:
            self._masks[window] = attention_mask(self.positions[:, None], self._n_keys, window)
        return self._masks[window], False

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, D) new keys and values of one layer; return the (B, K, S, D) that its queries may see."""
        return self._write_read(0, layer, k), self._write_read(1, layer, v)

    def _write_read(self, which: int, layer: int, new: Tensor) -> Tensor:
        if self._fresh is not None:
            self._fresh[which][layer].copy_(new)
        else:
            store = self.stores[which][layer]  # (L, K, capacity, D)
            store[self._slots[:, None], :, self.positions] = new.transpose(1, 2).to(store.dtype)
        if self._seen is not None:
            return self._seen[which][layer]
        return self.stores[which][layer][self._slots, :, : self._n_keys]
