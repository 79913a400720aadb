"""Adapters over one base, in inference: each row of a batch is computed with its own, or with none.

The terms of all adapters of a layer are one low-rank product, of which every row keeps the part that is its adapter's:
two adapters cost little more than one, and a row's result does not depend on its neighbours'.

Axes: B rows of a batch, T tokens, C `n_embd`, I inputs, O outputs, R ranks of all adapters together, N new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_gpt.inference.linear import fast_linear
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.lora import AdapterWeights, dense_factors, linear_layers
from lit_gpt.model.uninitialized import NoInitialization, empty_gpt

NEVER = -3e4
"""Logit of a token that a row's adapter has not: its probability is 0, and no logarithm is infinite."""


class AdapterBank:
    """Which adapter each row of a batch has. The layers of `attach_adapters` share one.

    Attributes:
        count: adapters; they are numbered from 1.
        active: whether any row has one.
        rows: (B,) the adapter of each row; 0 for none.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.count = count
        self.active = False
        self.rows = torch.zeros(1, dtype=torch.long, device=device)
        self._chosen: list[int] = [0]
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def select(self, rows: Sequence[int]) -> None:
        """Compute row i of the next passes with adapter `rows[i]`."""
        rows = list(rows)
        if rows == self._chosen:
            return
        self._chosen, self.active = rows, any(rows)
        self.rows = torch.tensor(rows, device=self.rows.device)
        self._masks.clear()

    def mask(self, ranks: tuple[int, ...]) -> Tensor:
        """(B, 1, R) True where one of the R columns, `ranks[i]` of them of adapter i + 1, is of the row's adapter."""
        if ranks not in self._masks:
            owner = torch.arange(1, self.count + 1).repeat_interleave(torch.tensor(ranks))
            self._masks[ranks] = (self.rows[:, None] == owner.to(self.rows.device))[:, None]
        return self._masks[ranks]


class AdapterLinear(nn.Module):
    """A linear layer of any kind with the terms of all adapters."""

    def __init__(self, base: nn.Module, bank: AdapterBank, terms: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """`terms` are A (R, I) and B (O, R) of each adapter, None where it has none for this layer."""
        super().__init__()
        self.base = base
        self._bank = bank
        self._ranks = tuple(0 if term is None else len(term[0]) for term in terms)
        found = [term for term in terms if term is not None]
        self.a = fast_linear(_linear(torch.cat([a for a, _ in found])))
        self.b = fast_linear(_linear(torch.cat([b for _, b in found], 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, I) → (B, T, O)."""
        y = self.base(x)
        if not self._bank.active:
            return y
        inner = self.a(x)  # (B, T, R)
        return y + self.b(inner.where(self._bank.mask(self._ranks), 0))


def _linear(weight: Tensor) -> nn.Linear:
    """A linear layer without a bias whose weight this is."""
    with NoInitialization():
        layer = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return layer


class TokenTable(nn.Module):
    """Rows of new tokens, for each adapter its own.

    Attributes:
        first: the id of the first of them.
        rows: (1 + count, N, C); zeros for an adapter without.
        known: (1 + count,) whether an adapter has them.
    """

    rows: Tensor
    known: Tensor

    def __init__(self, first: int, rows: Sequence[Tensor | None], like: Tensor) -> None:
        """`rows` are those of each adapter, None where it has none; in dtype and on the device of `like`."""
        super().__init__()
        self.first = first
        shape = next(own.shape for own in rows if own is not None)
        table = [torch.zeros(shape) if own is None else own for own in (None, *rows)]
        self.register_buffer("rows", torch.stack([one.to(like) for one in table]), persistent=False)
        known = torch.tensor([own is not None for own in (None, *rows)], device=like.device)
        self.register_buffer("known", known, persistent=False)

    @property
    def count(self) -> int:
        """N."""
        return self.rows.size(1)


class AdapterEmbedding(nn.Module):
    """An embedding in which new tokens have the rows of the adapter of their text."""

    def __init__(self, base: nn.Embedding, bank: AdapterBank, table: TokenTable) -> None:
        super().__init__()
        self.base, self._bank, self._table = base, bank, table

    @property
    def weight(self) -> Tensor:
        """Of the base, which tells the model's dtype."""
        return self.base.weight

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) ids → (B, T, C)."""
        x = self.base(idx.clamp(max=self.base.num_embeddings - 1))
        if not self._bank.active:
            return x
        table, rows = self._table, self._bank.rows
        index = idx - table.first
        is_new = (index >= 0) & (index < table.count) & table.known[rows][:, None]
        own = table.rows[rows[:, None], index.clamp(0, table.count - 1)]
        return own.where(is_new[..., None], x)


class AdapterHead(nn.Module):
    """A head that gives new tokens the logits of the adapter of their text."""

    def __init__(self, base: nn.Module, bank: AdapterBank, table: TokenTable) -> None:
        super().__init__()
        self.base, self._bank, self._table = base, bank, table

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, at least all ids)."""
        y, table = self.base(x), self._table
        end = table.first + table.count
        new = y.new_full((*y.shape[:-1], table.count), NEVER)
        if self._bank.active:
            rows = self._bank.rows
            # Not a product of matrices, whose result for a row may depend on how many there are
            own = (x[:, :, None] * table.rows[rows][:, None].to(x.dtype)).sum(-1)  # (B, T, N)
            new = own.to(y.dtype).where(table.known[rows][:, None, None], new)
        return torch.cat([y[..., : table.first], new, y[..., end:]], -1)


def attach_adapters(model: nn.Module, adapters: Sequence[AdapterWeights], config: GPTConfig) -> AdapterBank:
    """Give a model in its inference form these adapters, in place; the bank says which row has which.

    Args:
        model: a GPT, after `prepare_for_inference`.
        adapters: in their order, compared with the base before. Those with rows of new tokens have the same tokens.
        config: its shape.
    """
    outputs = {name: layer.out_features for name, layer in linear_layers(empty_gpt(config)).items()}
    embedding = model.get_submodule("wte")
    assert isinstance(embedding, nn.Embedding)
    bank = AdapterBank(len(adapters), embedding.weight.device)
    like = embedding.weight
    for name in sorted({name for adapter in adapters for name in adapter.factors}):
        terms = [_term(adapter, name, int(outputs[name]), like) for adapter in adapters]  # type: ignore[arg-type]
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, AdapterLinear(model.get_submodule(name), bank, terms))
    grown = [adapter for adapter in adapters if adapter.token_rows]
    if grown:
        first = grown[0].first_token
        tables = {
            name: TokenTable(first, [adapter.token_rows.get(name) for adapter in adapters], like)
            for name in grown[0].token_rows
        }
        head = AdapterHead(model.get_submodule("lm_head"), bank, tables.get("lm_head", tables["wte"]))
        model.add_module("wte", AdapterEmbedding(embedding, bank, tables["wte"]))
        model.add_module("lm_head", head)
    return bank


def _term(adapter: AdapterWeights, name: str, n_out: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """A and B of one adapter for one layer."""
    factors = adapter.factors.get(name)
    if not factors:
        return None
    a, b = dense_factors(factors, n_out)
    return a.to(like), b.to(like)
