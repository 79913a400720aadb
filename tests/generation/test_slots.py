"""Slots of the KV cache: which one a sequence gets, what it holds, and what a freed one still has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.generation import slots as slots_module
from lit_gpt.generation.slots import CachedSequence, SlotManager, common_prefix, slots_for_memory
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.kv_cache import KVCache

CONFIG = GPTConfig(50, block_size=8, n_layer=1, n_head=1, n_embd=1, head_dim=1)


def compute(manager: SlotManager, sequence: CachedSequence) -> CachedSequence:
    """As a forward pass would: the keys are the ids."""
    first, n = manager.computed(sequence), manager.pending(sequence)
    window = sequence.ids[sequence.start :]
    manager.cache.k[0, sequence.slot, 0, first : first + n, 0] = torch.tensor(window[first:]).float()
    manager.cache.extend([sequence.slot], n)
    return sequence


def keys(manager: SlotManager, sequence: CachedSequence) -> list[int]:
    return manager.cache.k[0, sequence.slot, 0, : manager.computed(sequence), 0].int().tolist()


def test_slots_are_given_side_by_side_and_then_the_one_freed_first() -> None:
    manager = SlotManager(CONFIG, 4)
    a, b, c = (compute(manager, manager.open([i, i])) for i in range(3))
    assert [one.slot for one in (a, b, c)] == [0, 1, 2]
    manager.free(c)
    assert manager.open([9]).slot == 2  # beside the live ones
    manager = SlotManager(CONFIG, 2)
    a, b = (compute(manager, manager.open([i, i])) for i in range(2))
    manager.free(b)
    manager.free(a)
    assert manager.open([9]).slot == b.slot


def test_a_freed_sequence_is_kept_for_its_prefix() -> None:
    manager = SlotManager(CONFIG, 3)
    first, second = compute(manager, manager.open([1, 2, 3, 4])), compute(manager, manager.open([5, 6]))
    manager.free(second)
    manager.free(first)
    again = manager.open([1, 2, 3, 9])
    assert (again.slot, manager.computed(again), manager.reused) == (first.slot, 3, 3)
    assert keys(manager, again) == [1, 2, 3]


def test_the_last_token_of_a_prompt_is_computed_in_any_case() -> None:
    manager = SlotManager(CONFIG, 1)
    manager.free(compute(manager, manager.open([1, 2, 3, 4])))
    assert manager.pending(manager.open([1, 2, 3])) == 1


def test_what_is_forgotten_is_wiped() -> None:
    manager = SlotManager(CONFIG, 1)
    sequence = compute(manager, manager.open([1, 2]))
    manager.free(sequence, forget=True)
    assert not manager.cache.k.any() and not manager.is_live(0)
    assert manager.pending(manager.open([1, 2])) == 2


def test_a_fork_is_equal_and_goes_its_own_way() -> None:
    manager = SlotManager(CONFIG, 3)
    sequence = compute(manager, manager.open([1, 2, 3]))
    twin = manager.fork(sequence)
    manager.append(twin, [4])
    compute(manager, twin)
    assert (keys(manager, sequence), keys(manager, twin)) == ([1, 2, 3], [1, 2, 3, 4])
    assert (sequence.ids, twin.ids) == ([1, 2, 3], [1, 2, 3, 4])


def test_a_fork_into_the_slot_of_a_dropped_sibling_copies_only_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = SlotManager(CONFIG, 2)
    sequence = compute(manager, manager.open([1, 2, 3]))
    sibling = manager.fork(sequence)
    manager.append(sibling, [4])
    manager.append(sequence, [5])
    for one in (sibling, sequence):
        compute(manager, one)
    manager.free(sibling)
    copied: list[dict[str, Any]] = []
    copy = manager.cache.copy
    monkeypatch.setattr(manager.cache, "copy", lambda *args, **values: (copied.append(values), copy(*args, **values)))
    twin = manager.fork(sequence)
    assert copied == [{"start": 3}]
    assert keys(manager, twin) == [1, 2, 3, 5]


def test_the_window_slides_and_everything_in_it_is_computed_again() -> None:
    manager = SlotManager(CONFIG, 1)
    sequence = compute(manager, manager.open(list(range(8))))
    manager.append(sequence, [8])
    assert (sequence.start, manager.computed(sequence), manager.pending(sequence)) == (1, 0, 8)


def test_truncate() -> None:
    manager = SlotManager(CONFIG, 1)
    sequence = compute(manager, manager.open([1, 2, 3, 4]))
    manager.truncate(sequence, 2)
    assert (sequence.ids, keys(manager, sequence)) == ([1, 2], [1, 2])


def test_sequences_are_moved_into_the_gaps_until_they_are_one_slice() -> None:
    manager = SlotManager(CONFIG, 5)
    sequences = [compute(manager, manager.open([i, i + 10])) for i in range(5)]
    for freed in (sequences.pop(2), sequences.pop(1)):
        manager.free(freed)
    manager.make_contiguous(sequences)
    assert sorted(sequence.slot for sequence in sequences) == [0, 1, 2]
    assert [keys(manager, sequence) for sequence in sequences] == [[0, 10], [3, 13], [4, 14]]
    assert [manager.is_live(slot) for slot in range(5)] == [True, True, True, False, False]
    assert manager.load == 6 / 40


def test_sequences_are_not_moved_over_others() -> None:
    manager = SlotManager(CONFIG, 3)
    sequences = [manager.open([i]) for i in range(3)]
    manager.make_contiguous([sequences[0], sequences[2]])
    assert [sequence.slot for sequence in sequences] == [0, 1, 2]


def test_half_of_the_free_memory_is_for_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    size = KVCache.bytes_per_slot(CONFIG, CONFIG.block_size)
    for free, expected in ((0, 1), (2 * 5 * size, 5), (10**12, 64)):
        monkeypatch.setattr(slots_module, "_free_memory", lambda free=free: free)
        assert slots_for_memory(CONFIG, torch.float32, "cpu") == expected


@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
