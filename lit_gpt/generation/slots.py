"""KV-cache slots: which cached sequence holds which slot, and what every slot holds already.

A cached sequence is a list of token ids. What the cache holds of them is an optimisation behind it: a strategy says
what to append, to fork and to cut, and never sees a slot. A freed sequence stays in its slot, and what was computed of
it can be reused, until another sequence needs the slot.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_gpt.model.config import GPTConfig
from lit_gpt.model.kv_cache import KVCache

_CACHE_SHARE = 0.5
"""Share of the free memory that the cache may take; the rest is for activations and other processes."""

_MOST_SLOTS = {"cpu": 64, "cuda": 256}
"""More sequences than this in one pass no longer make it cheaper per sequence."""


class PromptResult(NamedTuple):
    """What the model said after a prompt of `n_tokens`: logits (V,), and hidden state (C,) or None."""

    n_tokens: int
    logits: Tensor
    hidden: Tensor | None


@dataclass(eq=False, slots=True)
class CachedSequence:
    """Token ids whose keys and values a slot of the cache holds, as far as they are computed.

    Attributes:
        manager: whose slot it holds.
        slot: where the cache holds it; it may move.
        ids: its tokens.
        start: the first token inside the window, from which on the cache holds what it holds.
        reuse: whether tokens that other sequences have computed may be copied: not where their logits are wanted.
        live: False once freed; it is then kept for its prefix until its slot is needed.
        end_of_prompt: the result of its first request.
        freed_at: when it was freed, as a count of what was freed before.
        adapter: which one its keys and values are computed with, 0 for none: those of another are no prefix of it.
    """

    manager: SlotManager
    slot: int
    ids: list[int]
    start: int = 0
    reuse: bool = True
    live: bool = True
    end_of_prompt: PromptResult | None = None
    freed_at: int = 0
    adapter: int = 0


class SlotManager:
    """The slots of one model's preallocated cache, and the sequences in them.

    Attributes:
        n_slot: slots of the cache.
        capacity: tokens of one slot, the model's `block_size`.
        cache: keys and values, and how many tokens of every slot are computed.
        reused: prompt tokens so far that the cache held already.
    """

    def __init__(
        self,
        config: GPTConfig,
        n_slot: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.n_slot = n_slot
        self.capacity = config.block_size
        self.cache = KVCache(config, n_slot, config.block_size, dtype, device)
        self.reused = 0
        # By slot: its live sequence, or the freed one of which it still has the keys and values.
        self._held: list[CachedSequence | None] = [None] * n_slot
        self._n_freed = 0

    # --- what a strategy does with sequences ----------------------------------------------------------------------

    def open(self, ids: Sequence[int] = (), reuse: bool = True, adapter: int = 0) -> CachedSequence:
        """A new sequence of `ids`; nothing is computed before that is asked for."""
        slot = self._choose_slot(ids if reuse else (), adapter)
        sequence = CachedSequence(self, slot, list(ids), reuse=reuse, adapter=adapter)
        kept = self._held[sequence.slot]
        shared = 0
        if reuse and kept is not None and kept.start == 0 and kept.adapter == adapter:
            shared = common_prefix(sequence.ids, kept.ids[: self.cache.lengths[sequence.slot]])
            sequence.end_of_prompt = kept.end_of_prompt
        self._assign_slot(sequence, shared)
        return sequence

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        """A new sequence equal to `sequence`."""
        slot = self._choose_slot(sequence.ids, sequence.adapter)
        twin = CachedSequence(self, slot, list(sequence.ids), sequence.start, sequence.reuse, adapter=sequence.adapter)
        kept = self._held[slot]
        shared = 0
        if (
            kept is not None and kept.start == sequence.start and kept.adapter == sequence.adapter
        ):  # a dropped sibling: only its last token differs
            shared = common_prefix(sequence.ids, kept.ids[: kept.start + self.cache.lengths[slot]]) - sequence.start
        self._held[slot] = None  # free while the copy can fail: a sequence that nobody has would hold it for ever
        self.cache.copy(sequence.slot, slot, start=max(0, min(shared, self.cache.lengths[sequence.slot])))
        self._held[slot] = twin
        return twin

    def append(self, sequence: CachedSequence, tokens: Sequence[int]) -> None:
        """Append `tokens`, not computed yet, and slide the window if they no longer fit.

        A slide changes the position that every key stands for, so the whole window is computed again: evicting old
        keys instead would give other logits than a model that sees the cropped text, with any kind of position.
        """
        sequence.ids.extend(tokens)
        start = max(0, len(sequence.ids) - self.capacity)
        if start != sequence.start:
            sequence.start = start
            self.cache.truncate(sequence.slot, 0)

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """Cut `sequence` to its first `length` tokens."""
        del sequence.ids[length:]
        if sequence.end_of_prompt is not None and length < sequence.end_of_prompt.n_tokens:
            sequence.end_of_prompt = None
        self.cache.truncate(sequence.slot, max(0, length - sequence.start))

    def free(self, sequence: CachedSequence, forget: bool = False) -> None:
        """Give the slot of `sequence` back. With `forget` it is wiped, and its content is no other's prefix."""
        sequence.live = False
        self._n_freed += 1
        sequence.freed_at = self._n_freed
        if forget:
            self.cache.clear(sequence.slot)
            self._held[sequence.slot] = None

    # --- what is computed -----------------------------------------------------------------------------------------

    def computed(self, sequence: CachedSequence) -> int:
        """Tokens of the window of `sequence` that the cache holds."""
        return self.cache.lengths[sequence.slot]

    def pending(self, sequence: CachedSequence) -> int:
        """Tokens of `sequence` that are not computed yet."""
        return len(sequence.ids) - sequence.start - self.cache.lengths[sequence.slot]

    def others(self, sequence: CachedSequence) -> Iterable[CachedSequence]:
        """The other sequences of its adapter that the cache holds from their first token on, freed ones too."""
        return (
            other
            for other in self._held
            if other is not None and other is not sequence and other.start == 0 and other.adapter == sequence.adapter
        )

    def is_live(self, slot: int) -> bool:
        """Whether the sequence in `slot` is in use."""
        sequence = self._held[slot]
        return sequence is not None and sequence.live

    @property
    def load(self) -> float:
        """Share of the cache that live sequences fill."""
        used = sum(n for slot, n in enumerate(self.cache.lengths) if self.is_live(slot))
        return used / (self.n_slot * self.capacity)

    # --- slots ----------------------------------------------------------------------------------------------------

    def _choose_slot(self, ids: Sequence[int], adapter: int) -> int:
        """A free slot: next to the live ones, so that they are read as one slice; else one that has a prefix of `ids`;
        else the one freed first."""
        free = [slot for slot in range(self.n_slot) if not self.is_live(slot)]
        live = [slot for slot in range(self.n_slot) if self.is_live(slot)]
        if live:
            low, high = min(live), max(live)
            nearest = min(max(low - slot, slot - high, 0) for slot in free)
            free = [slot for slot in free if max(low - slot, slot - high, 0) == nearest]

        def preference(slot: int) -> tuple[int, int]:
            kept = self._held[slot]
            if kept is None:
                return 0, 0
            known = kept.start + self.cache.lengths[slot] if kept.adapter == adapter else 0
            return -common_prefix(ids, kept.ids[:known]) if ids else 0, kept.freed_at

        return min(free, key=preference)

    def _assign_slot(self, sequence: CachedSequence, shared: int) -> None:
        """Give `sequence` its slot, of whose content the first `shared` tokens are its own."""
        self._held[sequence.slot] = sequence
        end = sequence.end_of_prompt
        if end is None or not end.n_tokens == len(sequence.ids) == shared:
            # the last token is computed in any case: its logits are what the sequence is for
            shared = max(0, min(shared, len(sequence.ids) - 1))
            sequence.end_of_prompt = None
        self.cache.lengths[sequence.slot] = shared
        self.reused += shared

    def make_contiguous(self, sequences: list[CachedSequence]) -> None:
        """Move sequences from the far end into free slots between, until `sequences` are one slice of the cache."""
        while True:
            slots = [sequence.slot for sequence in sequences]
            low, high = min(slots), max(slots)
            if high - low + 1 == len(sequences):
                return
            gaps = [slot for slot in range(low, high) if not self.is_live(slot)]
            if not gaps:
                return
            last = max(sequences, key=lambda sequence: sequence.slot)
            self.cache.copy(last.slot, gaps[0])
            self._held[last.slot], self._held[gaps[0]] = None, last
            last.slot = gaps[0]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first elements `a` and `b` share.

    >>> common_prefix([1, 2, 3, 4], [1, 2, 9])
    2
    """
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # the first `low` are equal, the first `high` are not; slices compare at C speed
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def slots_for_memory(config: GPTConfig, dtype: torch.dtype, device: torch.device | str) -> int:
    """Slots of `block_size` tokens that half of the free memory holds; at least one, at most 64 (256 on a GPU)."""
    device = torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    slots = int(free * _CACHE_SHARE) // KVCache.bytes_per_slot(config, config.block_size, dtype)
    return max(1, min(slots, _MOST_SLOTS.get(device.type, _MOST_SLOTS["cpu"])))


def _free_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):  # no Linux: half of all there is
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (ValueError, OSError, AttributeError):
            return 4 << 30
