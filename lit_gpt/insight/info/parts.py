"""Parameters counted by part, step by step: embeddings, one block and its parts, the final norm, the head."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from lit_gpt.insight.info.describe import TensorInfo
from lit_gpt.model.config import GPTConfig


@dataclass(frozen=True)
class CountedPart:
    """A line of the count.

    Attributes:
        name: of the part.
        sum: the products that are added, as `768 × 2,304 + 2,304`.
        count: their sum.
        tensors: the names of the tensors that are counted; of the first block where each block has the part.
    """

    name: str
    sum: str
    count: int
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class PartCount:
    """The whole count.

    Attributes:
        before: the embeddings.
        block: the parts of one block.
        n_layer: blocks.
        after: the final norm and the head; a tied head, which counts nothing, is left out.
        tied: parameters that a head of its own would have; 0 where it has one.
    """

    before: tuple[CountedPart, ...]
    block: tuple[CountedPart, ...]
    n_layer: int
    after: tuple[CountedPart, ...]
    tied: int

    @property
    def per_block(self) -> int:
        """Parameters of one block."""
        return sum(part.count for part in self.block)

    @property
    def total(self) -> int:
        """Parameters of the model, a tied head not counted again."""
        return sum(part.count for part in (*self.before, *self.after)) + self.n_layer * self.per_block

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        blocks = {"parts": [vars(part) for part in self.block], "count": self.per_block, "n_layer": self.n_layer}
        return {
            "before": [vars(part) for part in self.before],
            "block": blocks,
            "after": [vars(part) for part in self.after],
            "total": self.total,
            "tied_head": self.tied,
        }


_IN_A_BLOCK = {"attention": ("attn.",), "feed-forward": ("mlp.",), "norms": ("ln_",)}


def count_parts(config: GPTConfig, tensors: list[TensorInfo]) -> PartCount:
    """Group the tensors of a model as the count is done by hand.

    Source: chapter 4 of "Build a Large Language Model (From Scratch)", exercise 4.1 and section 4.6.

    Args:
        config: the model's shape.
        tensors: of `tensors_of` it.
    """
    first = [tensor for tensor in tensors if tensor.name.startswith("h.0.")]
    block = [
        _part(name, [tensor for tensor in first if tensor.name[len("h.0.") :].startswith(beginnings)])
        for name, beginnings in _IN_A_BLOCK.items()
    ]
    named = {name: [t for t in tensors if t.name.startswith(f"{name}.")] for name in ("wte", "wpe", "ln_f", "lm_head")}
    before = [_part("token embedding", named["wte"]), _part("position embedding", named["wpe"])]
    own_head = [tensor for tensor in named["lm_head"] if tensor.shared_with is None]
    after = [_part("final norm", named["ln_f"]), _part("head", own_head)]
    tied = sum(tensor.count for tensor in named["lm_head"] if tensor.shared_with is not None)
    return PartCount(_present(before), _present(block), config.n_layer, _present(after), tied)


def _part(name: str, tensors: list[TensorInfo]) -> CountedPart:
    """One line of the count."""
    factors = " + ".join(" × ".join(f"{size:,}" for size in tensor.shape) for tensor in tensors)
    return CountedPart(name, factors, sum(prod(t.shape) for t in tensors), tuple(t.name for t in tensors))


def _present(parts: list[CountedPart]) -> tuple[CountedPart, ...]:
    """Those that this model has: not every model has learned positions, or norms with weights."""
    return tuple(part for part in parts if part.tensors)
