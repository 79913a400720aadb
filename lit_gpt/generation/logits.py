"""Functions of logits, (B, V) → (B, V), and of draws from them; none changes its argument.

The order, for every strategy, is that of `lit_gpt.generation.sampling.STAGES`:

    repetition penalty → frequency and presence penalties → logit bias (bans and masked end-of-text are a bias of -∞)
    → temperature → top-k → top-p → min-p → draw

Greedy decoding applies the penalties and the bias and takes the arg-max. A setting is a number, or a (B, 1) tensor
with one value for each row. A token that was cut has a logit of -∞; at least one always stays.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

_FIRST_SORTED = 256
"""Tokens that hold the nucleus nearly always, which saves sorting the whole vocabulary."""

_BLOCK = 256
_GROUP = 16
_CACHED = 1 << 18
"""Logits beyond which a CPU is faster row by row: fresh pages for large temporaries cost more than the arithmetic."""

_BELOW_ONE = 1 - 2.0**-52


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make seen tokens less likely (CTRL, arXiv 1909.05858): divide positive logits, multiply negative ones.

    Args:
        logits: (B, V).
        seen: (B, V) True for tokens of the prompt or the output.
        penalty: above 1 to discourage, 1 for none.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def count_penalties(logits: Tensor, counts: Tensor, frequency: float, presence: float) -> Tensor:
    """OpenAI's two penalties over `counts`, (B, V) times that each token was *generated*."""
    return logits - frequency * counts - presence * (counts > 0).to(logits.dtype)


def temperature(logits: Tensor, value: float | Tensor) -> Tensor:
    """Flatten (above 1) or sharpen (below 1) the distribution.

    >>> temperature(torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]]), 0.5).softmax(-1)[0, :3]
    tensor([0.8647, 0.1170, 0.0158])
    """
    return logits / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep exactly the `k` largest, or all if there are fewer."""
    if k >= logits.size(-1):
        return logits
    values, ids = logits.topk(k, dim=-1)
    return spread(values, ids, logits.size(-1))


def top_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Keep, in each row, the smallest set of tokens with a mass of at least `p` (arXiv 1904.09751)."""
    values, ids, total = shortlist(logits, None, p)
    return spread(nucleus(values, p, total), ids, logits.size(-1))


def min_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Keep tokens whose probability is at least `p` times the largest one (arXiv 2407.01082)."""
    ratio = torch.as_tensor(p, dtype=logits.dtype, device=logits.device)
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + ratio.log(), -math.inf)


def shortlist(logits: Tensor, k: int | None, p: float | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The candidates that top-k `k` and top-p `p` leave a chance, without sorting more than is needed.

    Returns:
        values (B, n), largest first; their ids (B, n); and the (B, 1) log of the mass that top-p is a share of, None
        where that is the mass of the values.
    """
    V = logits.size(-1)
    if k is not None:
        values, ids = largest(logits, min(k, V))
        return values, ids, None
    total = logits.logsumexp(-1, keepdim=True)
    if V > _FIRST_SORTED:
        values, ids = logits.topk(_FIRST_SORTED, dim=-1)
        mass = (values.logsumexp(-1, keepdim=True) - total).exp()
        if bool((mass > p).all()):
            return values, ids, total
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values, ids, total


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of (B, V), in order, and their ids; on a CPU in half of `topk`'s time.

    The k largest are in the k groups of `_GROUP` with the largest maxima, and those are fast to find.
    """
    V = logits.size(-1)
    n = V // _GROUP
    if logits.device.type != "cpu" or k > n // 8:
        return logits.topk(k, dim=-1)
    groups = logits[:, : n * _GROUP].unflatten(-1, (_GROUP, n)).amax(1).topk(k, sorted=False).indices  # (B, k)
    ids = (groups[:, None] + torch.arange(0, n * _GROUP, n)[:, None]).flatten(1)
    if n * _GROUP < V:
        ids = torch.cat([ids, torch.arange(n * _GROUP, V).expand(len(ids), -1)], 1)
    values, indices = logits.gather(1, ids).topk(k, dim=-1)
    return values, ids.gather(1, indices)


def nucleus(values: Tensor, p: float | Tensor, total: Tensor | None = None) -> Tensor:
    """Top-p of `values` (B, n), largest first, whose masses are shares of exp(`total`), by default all of them."""
    total = values.logsumexp(-1, keepdim=True) if total is None else total
    mass = (values - total).exp()
    before = mass.cumsum(-1) - mass
    out = before >= p
    out[..., 0] = False  # one token always stays
    return values.masked_fill(out, -math.inf)


def spread(values: Tensor, ids: Tensor, V: int) -> Tensor:
    """The (B, V) logits that are `values` at `ids` and -∞ elsewhere."""
    return values.new_full((*values.shape[:-1], V), -math.inf).scatter_(-1, ids, values)


def choose(logits: Tensor, uniforms: Tensor) -> Tensor:
    """(B,) indices drawn from softmax(logits), (B, n), by inverting its cumulative sum at `uniforms`, (B, 1) in [0, 1).

    One number decides, so a draw is a function of it and of the logits alone. It falls into a block first and then on
    a token of the block: a cumulative sum in float64 over the whole vocabulary would cost as much as the softmax.
    """
    if len(logits) > 1 and logits.numel() > _CACHED and logits.device.type == "cpu":
        return torch.cat([choose(row[None], one[None]) for row, one in zip(logits, uniforms)])
    if logits.size(-1) <= 4 * _BLOCK:
        return _invert(logits.softmax(-1).to(widest(logits)), uniforms.to(widest(logits)))[0]
    blocks = _blocks(logits.softmax(-1), 0.0)  # (B, n / 256, 256)
    block, rest = _invert(blocks.sum(-1, dtype=widest(logits)), uniforms.to(widest(logits)))
    inside = blocks[torch.arange(len(blocks), device=logits.device), block].to(widest(logits))
    return block * _BLOCK + _invert(inside, rest)[0]


def _invert(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Where shares `uniforms` (B, 1) of the total of `weights` (B, n) fall: the index (B,), and the share of it."""
    cumulative = weights.cumsum(-1)
    target = uniforms * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)  # never one of weight 0: target is below the total
    found = weights.gather(-1, index)
    rest = (target - cumulative.gather(-1, index)) / found + 1
    return index[:, 0], rest.clamp(0.0, _BELOW_ONE)


def argmax(logits: Tensor) -> Tensor:
    """(B,) indices of the largest logits, the first one of equals. Block maxima first: a tenth of the time on a CPU."""
    blocks = _blocks(logits, -math.inf)
    block = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(len(blocks), device=logits.device), block]
    return block * _BLOCK + inside.argmax(-1)


def _blocks(x: Tensor, fill: float) -> Tensor:
    """(B, n) → (B, n / 256, 256), filled up."""
    n = x.size(-1)
    if n % _BLOCK:
        x = F.pad(x, (0, _BLOCK - n % _BLOCK), value=fill)
    return x.view(len(x), -1, _BLOCK)


def column(numbers: list[float], like: Tensor) -> Tensor:
    """(B, 1) of `numbers` for `choose`, on the device of `like`."""
    return torch.tensor(numbers, dtype=widest(like), device=like.device)[:, None]


def widest(like: Tensor) -> torch.dtype:
    """float64, or float32 on a device that has no other."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def uniform(seed: int, position: int, purpose: str = "token") -> float:
    """A number in [0, 1) that depends on its arguments alone: the random draw for one position of one continuation.

    There is no state to carry, so whatever else runs, and however often a position is tried, cannot shift it. 52 bits:
    the product with a sum just below 1 then stays below that sum.
    """
    digest = hashlib.blake2b(f"{seed}:{position}:{purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) / 2.0**52
