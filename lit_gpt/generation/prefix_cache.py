"""The prefix cache: prompt tokens that another sequence has computed are copied, or waited for, not computed again."""

from __future__ import annotations

from collections.abc import Sequence

from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.slots import CachedSequence, SlotManager, common_prefix

_MIN_GAIN = 32
"""Tokens of a common prefix for which a sequence waits until another has computed them."""


class PrefixCache:
    """Reuse of prefixes among the sequences of one `SlotManager`, freed ones included."""

    def __init__(self, slots: SlotManager) -> None:
        self._slots = slots

    def reuse(self, requests: Sequence[ForwardRequest]) -> tuple[list[ForwardRequest], list[ForwardRequest]]:
        """Copy what other sequences have of new prompts; one that gains more by waiting for an earlier one, waits.

        Args:
            requests: not done, the earliest first.

        Returns:
            The requests that are done without a forward pass, and those to compute now.
        """
        slots = self._slots
        done, rest = [], []
        earlier: list[CachedSequence] = []
        for request in requests:
            sequence = request.sequence
            pending = slots.pending(sequence)
            new = sequence.reuse and sequence.start == 0 and request.num_logits == 1 and pending and not request.tokens
            if new and pending > 1 and self._waits(sequence, earlier):
                continue
            if new:
                self._copy_prefix(sequence)
                pending = slots.pending(sequence)
            earlier.append(sequence)
            if pending == 0:
                if self._finish(request):
                    done.append(request)
                    continue
                # its keys are known, what they led to is not: compute the last token again
                slots.cache.truncate(sequence.slot, slots.computed(sequence) - 1)
                slots.reused -= 1
            rest.append(request)
        return done, rest

    def _waits(self, sequence: CachedSequence, earlier: list[CachedSequence]) -> bool:
        """Whether a sequence that is being computed will soon hold much more of this one than there is to copy now."""
        have = max((self._known(sequence, other) for other in self._slots.others(sequence)), default=0)
        have = max(have, self._slots.computed(sequence))
        for other in earlier:
            if other.start or other.adapter != sequence.adapter or not self._slots.pending(other):
                continue
            gain = common_prefix(sequence.ids, other.ids) - have
            if gain >= _MIN_GAIN or 2 * gain >= len(sequence.ids) - have:
                return True
        return False

    def _known(self, sequence: CachedSequence, other: CachedSequence) -> int:
        """Tokens of `sequence` that `other` has computed."""
        return common_prefix(sequence.ids, other.ids[: self._slots.computed(other)])

    def _copy_prefix(self, sequence: CachedSequence) -> None:
        """Copy the longest prefix that another sequence has, with the logits at its end if it is the whole."""
        have = self._slots.computed(sequence)
        best, source = have, None
        for other in self._slots.others(sequence):
            known = self._known(sequence, other)
            ends = other.end_of_prompt is not None and other.end_of_prompt.n_tokens == len(sequence.ids)
            known = known if ends else min(known, len(sequence.ids) - 1)
            if known > best:
                best, source = known, other
        if source is not None:
            self._slots.cache.copy(source.slot, sequence.slot, best, start=have)
            self._slots.reused += best - have
            sequence.end_of_prompt = source.end_of_prompt if best == len(sequence.ids) else None

    def _finish(self, request: ForwardRequest) -> bool:
        """Whether the result is known from a sequence that ended its prompt here; `request` then has it."""
        end = request.sequence.end_of_prompt
        if end is None or end.n_tokens != len(request.sequence.ids) or request.num_logits != 1:
            return False
        if request.hidden and end.hidden is None:
            return False
        request.logits, request.done = end.logits[None], True
        if request.hidden and end.hidden is not None:
            request.states = end.hidden[None]
        return True
