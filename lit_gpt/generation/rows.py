"""Rows of the cache: who holds which, what is computed already, and the forward passes that compute the rest.

A row is a list of token ids. What the cache holds of them is an optimisation behind it: `Rows` computes what is
missing, copies what another row has computed already, and starts over when the window slides. A strategy says what to
append, to fork and to cut; it never sees a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_gpt.generation.sampling import Sampler
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.kv_cache import KVCache

_VERIFY = 16
"""Feeds of up to this many tokens, all of whose logits are wanted, share the decode step of the others."""

_WORTH_WAITING = 32
"""Tokens of a common prefix for which a row waits until another row has computed them."""


@dataclass(eq=False, slots=True)
class Row:
    """One row of a `Rows`.

    Attributes:
        home: whose row it is.
        slot: where the cache holds it; it may move.
        ids: its tokens.
        start: the first token inside the window, from which on the cache holds what it holds.
        reuse: whether tokens that other rows have computed may be copied: not where their logits are wanted.
        live: False once freed; it is then kept for its prefix until its slot is needed.
        end_of_prompt: the result of its first feed, (number of tokens, logits (V,), hidden (C,) or None).
        stamp: when it was freed, in order.
    """

    home: Rows
    slot: int
    ids: list[int]
    start: int = 0
    reuse: bool = True
    live: bool = True
    end_of_prompt: tuple[int, Tensor, Tensor | None] | None = None
    stamp: int = 0


@dataclass(eq=False, slots=True)
class ForwardRequest:
    """What a strategy wants computed, and what came of it.

    Attributes:
        row: the row.
        tokens: ids to append to it first; none for a row that was opened with its prompt.
        num_logits: how many of the last tokens' logits to give.
        hidden: give their hidden states too.
        sampler: choose the next token with these processors; all rows of a step are chosen for together.
        logits: (want, V), once done.
        states: (want, C) hidden states after the final norm, once done and if asked for.
        choice: the chosen token, once done and if asked for.
    """

    row: Row
    tokens: Sequence[int] = ()
    num_logits: int = 1
    hidden: bool = False
    sampler: Sampler | None = None
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    states: Tensor = field(default_factory=lambda: torch.empty(0))
    choice: int = -1
    done: bool = False


class Rows:
    """One model, its preallocated cache, and the rows in it.

    Attributes:
        n_row: rows of the cache.
        capacity: tokens of one row, the model's `block_size`.
        forwards: forward passes so far.
        fed: tokens fed so far, padding not counted.
        reused: prompt tokens so far that another row had computed.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        config: GPTConfig,
        n_row: int,
        n_vocab: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prefill_chunk: int = 512,
    ) -> None:
        self.model = model
        self.n_row = n_row
        self.n_vocab = n_vocab
        self.capacity = config.block_size
        self.device = torch.device(device)
        self.forwards = 0
        self.fed = 0
        self.reused = 0
        self._chunk = prefill_chunk
        self._cache = KVCache(config, n_row, config.block_size, dtype, device)
        self._held: list[Row | None] = [None] * n_row  # by slot: its row, or the freed row it still remembers
        self._clock = 0

    # --- what a strategy does with rows ---------------------------------------------------------------------------

    def open(self, ids: Sequence[int] = (), reuse: bool = True) -> Row:
        """A new row that holds `ids`; nothing is computed before it is fed."""
        row = Row(self, self._take_slot(ids if reuse else ()), list(ids), reuse=reuse)
        kept = self._held[row.slot]
        shared = 0
        if reuse and kept is not None and kept.start == 0:
            shared = common_prefix(row.ids, kept.ids[: self._cache.lengths[row.slot]])
            row.end_of_prompt = kept.end_of_prompt
        self._settle(row, shared)
        return row

    def fork(self, row: Row) -> Row:
        """A new row equal to `row`."""
        twin = Row(self, self._take_slot(row.ids), list(row.ids), row.start, row.reuse)
        kept = self._held[twin.slot]
        shared = 0
        if kept is not None and kept.start == row.start:  # a dropped sibling: only its last token differs
            shared = common_prefix(row.ids, kept.ids[: kept.start + self._cache.lengths[twin.slot]]) - row.start
        self._held[twin.slot] = twin
        self._cache.copy(row.slot, twin.slot, start=max(0, min(shared, self._cache.lengths[row.slot])))
        return twin

    def truncate(self, row: Row, length: int) -> None:
        """Cut `row` to its first `length` tokens."""
        del row.ids[length:]
        if row.end_of_prompt is not None and length < row.end_of_prompt[0]:
            row.end_of_prompt = None
        self._cache.truncate(row.slot, max(0, length - row.start))

    def free(self, row: Row, forget: bool = False) -> None:
        """Give `row` back. With `forget` its content is wiped and not kept as somebody's prefix."""
        row.live = False
        self._clock += 1
        row.stamp = self._clock
        if forget:
            self._cache.clear(row.slot)
            self._held[row.slot] = None

    def computed(self, row: Row) -> int:
        """Tokens of `row`'s window that the cache holds."""
        return self._cache.lengths[row.slot]

    @property
    def load(self) -> float:
        """Share of the cache that live rows fill."""
        used = sum(n for slot, n in enumerate(self._cache.lengths) if self._is_live(slot))
        return used / (self.n_row * self.capacity)

    # --- slots ----------------------------------------------------------------------------------------------------

    def _take_slot(self, ids: Sequence[int]) -> int:
        """A free slot: next to the live ones, so that they are read as one slice; else one that knows `ids`; else the
        one freed first."""
        free = [slot for slot in range(self.n_row) if not self._is_live(slot)]
        live = [slot for slot in range(self.n_row) if self._is_live(slot)]
        if live:
            low, high = min(live), max(live)
            nearest = min(max(low - slot, slot - high, 0) for slot in free)
            free = [slot for slot in free if max(low - slot, slot - high, 0) == nearest]

        def preference(slot: int) -> tuple[int, int]:
            kept = self._held[slot]
            if kept is None:
                return 0, 0
            known = kept.start + self._cache.lengths[slot]
            return -common_prefix(ids, kept.ids[:known]) if ids else 0, kept.stamp

        return min(free, key=preference)

    def _is_live(self, slot: int) -> bool:
        row = self._held[slot]
        return row is not None and row.live

    def _settle(self, row: Row, shared: int) -> None:
        """Put `row` into its slot, of whose content the first `shared` tokens are its own."""
        self._held[row.slot] = row
        whole = row.end_of_prompt is not None and row.end_of_prompt[0] == len(row.ids) == shared
        if not whole:  # the last token is computed in any case: its logits are what the row is for
            shared = max(0, min(shared, len(row.ids) - 1))
            row.end_of_prompt = None
        self._cache.lengths[row.slot] = shared
        self.reused += shared

    def _pack(self, rows: list[Row]) -> None:
        """Move rows from the far end into free slots between, until `rows` are one slice of the cache."""
        while True:
            low, high = min(row.slot for row in rows), max(row.slot for row in rows)
            if high - low + 1 == len(rows):
                return
            holes = [slot for slot in range(low, high) if not self._is_live(slot)]
            if not holes:
                return
            last = max(rows, key=lambda row: row.slot)
            self._cache.copy(last.slot, holes[0])
            self._held[last.slot], self._held[holes[0]] = None, last
            last.slot = holes[0]

    # --- what is to be computed -----------------------------------------------------------------------------------

    def begin(self, feed: ForwardRequest) -> None:
        """Take a new feed: its tokens join the row, and the window slides if they no longer fit.

        A slide changes the position that every key stands for, so the whole window is computed again: evicting old
        keys instead would give other logits than a model that sees the cropped text, with any kind of position.
        """
        row = feed.row
        row.ids.extend(feed.tokens)
        start = max(0, len(row.ids) - self.capacity)
        if start != row.start:
            row.start = start
            self._cache.truncate(row.slot, 0)

    def pending(self, row: Row) -> int:
        """Tokens of `row` that are not computed yet."""
        return len(row.ids) - row.start - self._cache.lengths[row.slot]

    def work(self, feeds: Sequence[ForwardRequest]) -> list[list[ForwardRequest]]:
        """One step: a forward pass for all feeds that are one token or a verification, one for a chunk of prompts.

        Args:
            feeds: begun and not done, the earliest first.

        Returns:
            The feeds that are done now, in groups of one forward pass each.
        """
        groups = []
        ready, rest = self._reuse_prefixes(feeds)
        if ready:
            groups.append(ready)
        decode = [feed for feed in rest if self.pending(feed.row) <= min(feed.num_logits, _VERIFY)]
        prefill = [feed for feed in rest if self.pending(feed.row) > min(feed.num_logits, _VERIFY)]
        while decode:
            group, decode = self._fitting(decode, [self.pending(feed.row) for feed in decode])
            self._pack([feed.row for feed in group])
            groups.append(self._forward(group))
        if prefill:
            counts = [self._next_chunk(feed) for feed in prefill]
            group, _ = self._fitting(prefill, counts, budget=self._chunk)
            groups.append(self._forward(group))
        return [group for group in groups if group]

    def _next_chunk(self, feed: ForwardRequest) -> int:
        """Tokens of `feed` to compute next; those whose logits are wanted stay together."""
        pending = self.pending(feed.row)
        chunk = max(self._chunk, feed.num_logits)
        return pending if pending <= chunk else min(chunk, pending - feed.num_logits)

    def _fitting(
        self, feeds: list[ForwardRequest], counts: list[int], budget: int | None = None
    ) -> tuple[list[ForwardRequest], list[ForwardRequest]]:
        """Split off the feeds that can share one forward pass with the first.

        Shorter ones are padded on the right to the longest, and the padding must fit into their rows. A prompt joins
        only while the padded pass stays within `budget` tokens and at least half of it is no padding.
        """
        group: list[ForwardRequest] = []
        others: list[ForwardRequest] = []
        longest = total = reach = 0
        for feed, count in zip(feeds, counts):
            width = max(longest, count)
            far = max(reach, self._cache.lengths[feed.row.slot])
            size = width * (len(group) + 1)
            fits = far + width <= self.capacity
            if budget is not None:
                fits = fits and size <= budget and size <= 2 * (total + count)
            if group and not fits:
                others.append(feed)
                continue
            group.append(feed)
            longest, total, reach = width, total + count, far
        return group, others

    def _reuse_prefixes(self, feeds: Sequence[ForwardRequest]) -> tuple[list[ForwardRequest], list[ForwardRequest]]:
        """Copy what other rows know of new prompts; who gets more by waiting for an earlier row, waits.

        Returns:
            The feeds that are done without a forward pass, and those to compute in this step.
        """
        ready, rest = [], []
        earlier: list[Row] = []
        for feed in feeds:
            row = feed.row
            pending = self.pending(row)
            fresh = row.reuse and row.start == 0 and feed.num_logits == 1 and pending and not feed.tokens
            if fresh and pending > 1 and self._waits(row, earlier):
                continue
            if fresh:
                self._copy_prefix(row)
            earlier.append(row)
            if self.pending(row) == 0 and self._finish_from_prompt(feed):
                ready.append(feed)
                continue
            if self.pending(row) == 0:  # its keys are known, what they led to is not: compute the last token again
                self._cache.truncate(row.slot, self._cache.lengths[row.slot] - 1)
                self.reused -= 1
            rest.append(feed)
        return ready, rest

    def _waits(self, row: Row, earlier: list[Row]) -> bool:
        """Whether a row that is being computed will soon hold much more of `row` than there is to copy now."""
        have = max((self._known(row, other) for other in self._others(row)), default=0)
        have = max(have, self._cache.lengths[row.slot])
        for other in earlier:
            if other.start or not self.pending(other):
                continue
            gain = common_prefix(row.ids, other.ids) - have
            if gain >= _WORTH_WAITING or 2 * gain >= len(row.ids) - have:
                return True
        return False

    def _others(self, row: Row) -> Iterable[Row]:
        return (other for other in self._held if other is not None and other is not row and other.start == 0)

    def _known(self, row: Row, other: Row) -> int:
        return common_prefix(row.ids, other.ids[: self._cache.lengths[other.slot]])

    def _copy_prefix(self, row: Row) -> None:
        """Take the longest prefix that another row has computed, with the logits at its end if it is the whole."""
        have = self._cache.lengths[row.slot]
        best, source = have, None
        for other in self._others(row):
            known = self._known(row, other)
            ends = other.end_of_prompt is not None and other.end_of_prompt[0] == len(row.ids)
            known = known if ends else min(known, len(row.ids) - 1)
            if known > best:
                best, source = known, other
        if source is not None:
            self._cache.copy(source.slot, row.slot, best, start=have)
            self.reused += best - have
            row.end_of_prompt = source.end_of_prompt if best == len(row.ids) else None

    def _finish_from_prompt(self, feed: ForwardRequest) -> bool:
        """Whether the result is known from a row that ended its prompt here; it is then in `feed`."""
        if feed.row.end_of_prompt is None or feed.row.end_of_prompt[0] != len(feed.row.ids) or feed.num_logits != 1:
            return False
        _, logits, states = feed.row.end_of_prompt
        if feed.hidden and states is None:
            return False
        feed.logits, feed.done = logits[None], True
        if feed.hidden and states is not None:
            feed.states = states[None]
        return True

    # --- the forward pass -----------------------------------------------------------------------------------------

    def _forward(self, feeds: list[ForwardRequest]) -> list[ForwardRequest]:
        """Compute the next tokens of each feed's row in one pass; the feeds that are done with it."""
        feeds.sort(key=lambda feed: feed.row.slot)  # in order, a run of slots is read as one slice
        rows = [feed.row for feed in feeds]
        counts = [self._next_chunk(feed) for feed in feeds]
        slots, longest = [row.slot for row in rows], max(counts)
        idx = torch.tensor([self._next_ids(row, n, longest) for row, n in zip(rows, counts)], device=self.device)
        step = self._cache.step(slots, longest)
        one_each = all(feed.num_logits == 1 for feed in feeds)
        last_only: bool | Tensor = False
        if longest > 1 and one_each:
            ragged = len(set(counts)) > 1
            last_only = torch.tensor([n - 1 for n in counts], device=self.device) if ragged else True
        hidden = any(feed.hidden for feed in feeds)
        output = self.model(idx, cache=step, last_only=last_only, return_hidden=hidden)
        logits, states = output.logits[..., : self.n_vocab], output.hidden
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
            states = None if states is None else states.float()
        self._cache.extend(slots, counts)
        self.forwards += 1
        self.fed += sum(counts)
        ends = [1 if one_each else n for n in counts]
        return self._hand_out(feeds, ends, logits, states)

    def _next_ids(self, row: Row, n: int, width: int) -> list[int]:
        first = row.start + self._cache.lengths[row.slot]
        return row.ids[first : first + n] + [0] * (width - n)

    def _hand_out(
        self, feeds: list[ForwardRequest], ends: list[int], logits: Tensor, states: Tensor | None
    ) -> list[ForwardRequest]:
        done = []
        for i, (feed, end) in enumerate(zip(feeds, ends)):
            if self.pending(feed.row):
                continue
            feed.logits, feed.done = logits[i, end - feed.num_logits : end], True
            if feed.hidden and states is not None:
                feed.states = states[i, end - feed.num_logits : end]
            if feed.row.reuse and feed.row.start == 0 and not feed.tokens:
                last = None if states is None else states[i, end - 1].clone()
                feed.row.end_of_prompt = (len(feed.row.ids), logits[i, end - 1].clone(), last)
            done.append(feed)
        return done


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
