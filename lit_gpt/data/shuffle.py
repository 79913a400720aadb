"""The shuffled order of samples: a pure function of (seed, epoch, position).

An epoch cuts the tokens, from a random phase on, into blocks of T + 1 tokens at stride T, so that every token of a
block has a target, and visits each block once. The shuffle is computed and never stored: a Feistel network over pairs
(a, b) with a·b just above the number of blocks, whose results outside of it are walked on (Black and Rogaway 2002,
"Ciphers with arbitrary finite domains"). The cost of a position does not depend on how many there are.
"""

from __future__ import annotations

import hashlib
from math import isqrt

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
ROUNDS = 8


class Shuffle:
    """Which tokens the sample at a position of an epoch has.

    Attributes:
        samples: in one epoch, the same for every epoch.
        window: samples that are shuffled among themselves; all of them without a window.
    """

    def __init__(self, tokens: int, block_size: int, seed: int, window_tokens: int | None = None) -> None:
        """Nothing is computed yet.

        Args:
            tokens: in the split, at least `block_size` + 1.
            block_size: T.
            seed: any integer.
            window_tokens: shuffle windows of so many consecutive tokens, and the samples within each, so that few
                shards are needed at a time. None shuffles everything.

        Raises:
            ValueError: there are too few tokens for one sample.
        """
        if tokens <= block_size:
            raise ValueError(f"{tokens} tokens hold no sample of {block_size} + 1")
        self.block_size, self.seed = block_size, seed
        self.samples = max(1, (tokens - block_size) // block_size)  # whatever the phase
        self._slack = min(block_size - 1, tokens - 1 - self.samples * block_size)
        self.window = self.samples
        if window_tokens is not None:
            self.window = min(self.samples, max(1, window_tokens // block_size))

    @property
    def epoch_samples(self) -> int:
        """After how many samples an epoch has ended for Lightning."""
        return self.samples

    def phase(self, epoch: int) -> int:
        """Tokens that are skipped before the first block of an epoch."""
        return int(self._keys(epoch, "phase")[0]) % (self._slack + 1)

    def starts(self, epoch: int, position: int, count: int) -> npt.NDArray[np.int64]:
        """First tokens of the samples at `position` … `position + count` of an epoch, (count,).

        Raises:
            IndexError: they are not all in the epoch.
        """
        if not 0 <= position <= position + count <= self.samples:
            raise IndexError(f"samples {position} to {position + count} of an epoch of {self.samples}")
        samples = self._samples(epoch, np.arange(position, position + count, dtype=np.uint64))
        return samples.astype(np.int64) * self.block_size + self.phase(epoch)

    def span(self, epoch: int, position: int) -> tuple[int, int]:
        """First token and number of tokens of the window that the sample at `position` is in."""
        number, size, _ = self._windows(epoch, np.array([position], np.uint64))
        start = int(number[0]) * self.window * self.block_size + self.phase(epoch)
        return start, int(size[0]) * self.block_size + 1

    def _samples(self, epoch: int, position: Words) -> Words:
        """Positions (n,) to numbers of blocks (n,), a permutation of range(samples)."""
        number, size, inside = self._windows(epoch, position)
        keys = self._keys(epoch, "sample")[:, None] ^ mix(number + np.uint64(1))
        return number * np.uint64(self.window) + permute(inside, size, keys)

    def _windows(self, epoch: int, position: Words) -> tuple[Words, Words, Words]:
        """For positions (n,): the window's number, its size and the index in it, (n,) each.

        The windows come shuffled. All have one size but the last, which is visited at a random position among them.
        """
        full, rest = divmod(self.samples, self.window)
        keys = self._keys(epoch, "window")
        before = int(self._keys(epoch, "rest")[0]) % (full + 1) * self.window
        in_rest = (position >= before) & (position < before + rest)
        others = np.where(in_rest, 0, position - np.where(position >= before + rest, rest, 0).astype(np.uint64))
        slot, inside = np.divmod(others, np.uint64(self.window))
        number = permute(slot, np.full_like(slot, full), keys[:, None])
        size = np.where(in_rest, rest, self.window).astype(np.uint64)
        inside = np.where(in_rest, position - np.minimum(position, np.uint64(before)), inside)
        return np.where(in_rest, np.uint64(full), number), size, inside

    def _keys(self, epoch: int, purpose: str) -> Words:
        """Round keys (ROUNDS,). A hash of the pair: seed + epoch would make (1, 1) equal to (2, 0)."""
        text = f"{self.seed} {epoch} {purpose}".encode()
        return np.frombuffer(hashlib.blake2b(text, digest_size=8 * ROUNDS).digest(), "<u8").astype(np.uint64)


def permute(index: Words, size: Words, keys: Words) -> Words:
    """A keyed permutation of range(size), applied to each index.

    Args:
        index: (n,), each below its size.
        size: (n,), at least 1.
        keys: (ROUNDS, n) or (ROUNDS, 1).
    """
    result = index.copy()
    keys = np.broadcast_to(keys, (ROUNDS, len(index)))
    walking = np.arange(len(index))
    while walking.size:
        result[walking] = feistel(result[walking], size[walking], keys[:, walking])
        walking = walking[result[walking] >= size[walking]]
    return result


def feistel(index: Words, size: Words, keys: Words) -> Words:
    """A keyed permutation of range(a·b), where a·b ≥ size is as small as a = ⌈√size⌉ allows. Shapes as `permute`."""
    a = roots(size)
    b = (size + a - np.uint64(1)) // a
    left, right = np.divmod(index, b)
    for number in range(0, ROUNDS, 2):
        left = (left + mix(right ^ keys[number]) % a) % a
        right = (right + mix(left ^ keys[number + 1]) % b) % b
    return left * b + right


def roots(size: Words) -> Words:
    """⌈√size⌉ of each; there are at most two sizes."""
    values, which = np.unique(size, return_inverse=True)
    return np.array([isqrt(value - 1) + 1 for value in values.tolist()], np.uint64)[which]


def mix(words: Words) -> Words:
    """A bijection of 64-bit words in which every bit of the input reaches every bit of the output (SplitMix64's)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
