"""The tensors of another project's checkpoint under its own names, beside ours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from lit_gpt.convert.weights import TensorEntry


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a file.

    Attributes:
        name: in that file.
        shape: as it is stored there.
        count: its numbers.
        ours: where they are in our model: a tensor, and which rows of it.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    ours: str


def source_tensors(plan: Iterable[TensorEntry]) -> list[SourceTensor]:
    """Every tensor of `SourceCheckpoint.plan`, in our order; one that is several of ours stands once for each."""
    return [tensor for entry in plan for tensor in _tensors_of(entry)]


def _tensors_of(entry: TensorEntry) -> list[SourceTensor]:
    found, start = [], 0
    for name, shape in zip(entry.theirs, entry.shapes):
        rows = shape[-1] if entry.transposed else shape[0]
        found.append(SourceTensor(name, shape, prod(shape), entry.ours + _remarks(entry, start, rows)))
        start += rows
    return found


def _remarks(entry: TensorEntry, start: int, rows: int) -> str:
    """How the numbers lie in our tensor."""
    remarks = []
    if len(entry.theirs) > 1:
        remarks.append(f"rows {start} to {start + rows - 1}")
    if entry.part[1] > 1:
        remarks.append(f"part {entry.part[0] + 1} of {entry.part[1]}")
    if entry.transposed:
        remarks.append("transposed")
    if entry.heads:
        remarks.append("queries, keys and values of each head together")
    return f" ({', '.join(remarks)})" if remarks else ""
