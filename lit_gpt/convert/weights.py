"""Tensors of other projects' checkpoints, each read when it is needed, and the tables that map their names to ours.

A table says for each module of ours which module of theirs it is:

    {"h.{}.attn.c_attn": ("model.layers.{}.self_attn.q_proj", "…k_proj", "…v_proj")}

Several modules of theirs are one of ours with their rows (or, where they are stored transposed, columns) stacked. Where
it is the other way round, each of ours is a `Part` of theirs. A key with its kind (`h.{}.ln_1.weight`) goes before one
without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.checkpoint.extents import Extent
from lit_gpt.checkpoint.format import list_faults
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.uninitialized import empty_gpt


@dataclass(frozen=True)
class Part:
    """One of several equal parts, by rows, of a module of theirs.

    Attributes:
        name: of the module.
        index: which part it is, from 0.
        count: how many there are.
    """

    name: str
    index: int
    count: int


NameTable = Mapping[str, "str | tuple[str, ...] | Part"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
        shape: its shape.
        dtype: its type.
        read: read it into memory of its own; each call reads it anew, so that nothing stays in memory.
        extent: where its data lies in its file, if that is known: what has an equal one there is the same tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    extent: Extent | None = None

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> StoredTensor:
        """The same tensor, rounded to `dtype` when it is read."""
        if dtype == self.dtype:
            return self
        return StoredTensor(self.shape, dtype, lambda: self.read().to(dtype))

    def rows(self, start: int, count: int) -> StoredTensor:
        """`count` rows from `start` on, in memory of their own: the others are not kept."""
        if (start, count) == (0, self.shape[0]):
            return self
        shape = (count, *self.shape[1:])
        return StoredTensor(shape, self.dtype, lambda: self.read()[start : start + count].clone())

    def regrouped(self, outer: int, inner: int) -> StoredTensor:
        """Rows in `outer` groups of `inner` groups, reordered to `inner` groups of `outer`: (o, i, …) → (i, o, …)."""

        def read() -> Tensor:
            return self.read().unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2).contiguous()

        return StoredTensor(self.shape, self.dtype, read)

    @property
    def transposed(self) -> StoredTensor:
        """The same matrix with rows and columns exchanged."""
        return StoredTensor(self.shape[::-1], self.dtype, lambda: self.read().t().contiguous())


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of ours, and where it is in their file.

    Attributes:
        ours: its name in `GPT.state_dict`.
        theirs: the names whose rows, stacked, it is made of.
        shapes: the shape of each of them, as they store it.
        transposed: whether they store (in, out).
        part: which one, and of how many equal parts of their rows, it is.
        heads: 0, or the number of heads by which they order queries, keys and values: those of the first head, of the
            second, and so on. Ours are all queries, all keys, all values.
    """

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transposed: bool
    part: tuple[int, int] = (0, 1)
    heads: int = 0


def model_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the model, a tied head not counted."""
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_gpt(config).state_dict().items()}
    if config.tie_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def tensor_entries(
    config: GPTConfig,
    table: NameTable,
    transposed: frozenset[str] = frozenset(),
    by_head: frozenset[str] = frozenset(),
) -> Iterator[TensorEntry]:
    """`table`, written out for every tensor of a model of this shape.

    Args:
        config: the model's shape.
        table: see the top of this file.
        transposed: modules of ours whose weight they store as (in, out).
        by_head: modules of ours whose queries, keys and values they order by heads.
    """
    for ours, shape in model_shapes(config).items():
        module, _, kind = ours.rpartition(".")
        layer = re.search(r"\.(\d+)\.", ours)
        number = layer.group(1) if layer else ""
        pattern = module.replace(f".{number}.", ".{}.", 1) if number else module
        names, part = _their_names(table, pattern, kind)
        flip = pattern in transposed and kind == "weight"
        rows = _rows_of_parts(config, len(names), shape[0] * part[1])
        shapes = tuple((count, *shape[1:])[:: -1 if flip else 1] for count in rows)
        heads = config.n_head if pattern in by_head else 0
        yield TensorEntry(ours, tuple(name.replace("{}", number) for name in names), shapes, flip, part, heads)


def _their_names(table: NameTable, pattern: str, kind: str) -> tuple[tuple[str, ...], tuple[int, int]]:
    """The names of their tensors with this tensor of ours, and which part of them, of how many, it is."""
    is_exact = f"{pattern}.{kind}" in table
    found = table[f"{pattern}.{kind}" if is_exact else pattern]
    part = (0, 1)
    if isinstance(found, Part):
        part, found = (found.index, found.count), found.name
    names = (found,) if isinstance(found, str) else found
    return names if is_exact else tuple(f"{name}.{kind}" for name in names), part


def _rows_of_parts(config: GPTConfig, parts: int, total: int) -> list[int]:
    """How the rows of a stacked tensor are shared out: evenly, or as queries, keys and values."""
    if parts == 3:
        kv = config.kv_heads * config.head_size
        return [config.n_head * config.head_size, kv, kv]
    return [total // parts] * parts


def to_our_names(
    config: GPTConfig,
    plan: list[TensorEntry],
    stored: dict[str, StoredTensor],
    source: str,
    ignored: str = r"(?!)",
    tied_head: str | None = None,
) -> dict[str, StoredTensor]:
    """Their tensors under our names, none read yet.

    Args:
        config: the model's shape.
        plan: from `tensor_entries`.
        stored: all that their file holds.
        source: how errors name that file.
        ignored: regular expression of names that hold no weights, such as masks.
        tied_head: their name of the head, which in a tied model may be stored as well and must equal the embedding.

    Raises:
        UserError: listing missing, unexpected and misshapen tensors.
    """
    faults: list[str] = []
    used: set[str] = set()
    for entry in plan:
        for name, shape in zip(entry.theirs, entry.shapes):
            used.add(name)
            faults += _faults(name, stored.get(name), shape)
    if config.tie_embeddings and tied_head in stored:
        used.add(tied_head)
        wte = next(entry.theirs[0] for entry in plan if entry.ours == "wte.weight")
        if wte in stored and not _equal(stored[wte], stored[tied_head]):
            faults.append(f"{tied_head} differs from {wte}, though the config says that they are tied")
    faults += [f"{name} is unexpected" for name in stored if name not in used and not re.search(ignored, name)]
    if faults:
        faults = list(dict.fromkeys(faults))  # a tensor with several parts is named once
        raise UserError(f"{source} does not hold the model that it describes: {list_faults(faults)}")
    return {entry.ours: _assemble(entry, [stored[name] for name in entry.theirs]) for entry in plan}


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors of one file are equal: without reading them where they are one."""
    return (a.extent is not None and a.extent == b.extent) or torch.equal(a.read(), b.read())


def _faults(name: str, stored: StoredTensor | None, shape: tuple[int, ...]) -> list[str]:
    """What is wrong with one tensor of theirs, which should have this shape."""
    if stored is None:
        return [f"{name} is missing"]
    if stored.shape != shape:
        return [f"{name} is {stored.shape}, not {shape}"]
    if stored.dtype not in DTYPES.values():
        return [f"{name} is {str(stored.dtype).removeprefix('torch.')}, not a float of 16 bits or more"]
    return []


def _assemble(entry: TensorEntry, parts: list[StoredTensor]) -> StoredTensor:
    if entry.transposed:
        parts = [part.transposed for part in parts]
    stacked = _stack(parts)
    index, count = entry.part
    n_rows = stacked.shape[0] // count
    ours = stacked.rows(index * n_rows, n_rows)
    return ours.regrouped(entry.heads, 3) if entry.heads else ours


def _stack(parts: list[StoredTensor]) -> StoredTensor:
    """Tensors one below the other."""
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    return StoredTensor(shape, dtype, lambda: torch.cat([part.read().to(dtype) for part in parts]))


def to_their_names(plan: list[TensorEntry], weights: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Our tensors under their names: the inverse of `to_our_names`."""
    parts: dict[str, dict[int, StoredTensor]] = {}
    for entry in plan:
        ours = weights[entry.ours]
        ours = ours.regrouped(3, entry.heads) if entry.heads else ours
        index, count = entry.part
        start = 0
        for name, shape in zip(entry.theirs, entry.shapes):
            n_rows = (shape[-1] if entry.transposed else shape[0]) // count
            part = ours.rows(start, n_rows)
            parts.setdefault(name, {})[index] = part.transposed if entry.transposed else part
            start += n_rows
    return {name: _stack([found[index] for index in sorted(found)]) for name, found in parts.items()}
