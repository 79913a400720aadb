"""LoRA (arXiv 2106.09685): low-rank terms beside the frozen linear layers of a GPT.

A linear layer y = W x + b gets y + scale · B A x, of which only A and B are trained. In the fused `c_attn` the rows of
queries, keys and values can have terms of their own, each with its A: together a block-diagonal B.

Axes: N tokens (all axes in front of the last), I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.errors import UserError, brief, nearest
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.dropout import dropout

ALL = "all"
"""As a target: every linear layer of the blocks. As a part: all rows of a layer."""
_FUSED = "c_attn"
_QKV = ("q", "k", "v")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adaptation of a model whose own weights stay as they are.

    Attributes:
        rank: of each term; 0 trains the model itself, without LoRA.
        alpha: the terms are scaled by alpha / rank.
        targets: names of linear layers, with commas between: `c_attn`, `c_proj` (both of that name), `attn.c_proj`,
            `c_fc`, `c_gate`, `h.0.mlp.c_fc`; `c_attn.q`, `c_attn.k` and `c_attn.v` for a part of the fused one; `all`
            for every linear layer of the blocks.
        rank_stabilized: scale by alpha / √rank (arXiv 2312.03732).
        dropout: probability, on what goes into the terms; training only.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str = ALL
    rank_stabilized: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check every value. Raises UserError, naming it and the remedy."""
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0:
            raise UserError(f"lora.rank={brief(self.rank)} must be a whole number of at least 0; 8 is usual")
        for name in ("alpha", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(f"lora.{name}={brief(value)} must be a finite number")
        if self.alpha <= 0:
            raise UserError(f"lora.alpha={self.alpha} must be above 0; twice the rank is usual")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout={self.dropout} is not a probability below 1: choose a value in [0, 1)")
        if not isinstance(self.rank_stabilized, bool):
            raise UserError(f"lora.rank_stabilized={brief(self.rank_stabilized)} must be true or false")
        if not isinstance(self.targets, str) or not self.names:
            raise UserError(f"lora.targets={brief(self.targets)} names no layer: write c_attn,c_proj or all")
        if self.rank == 0:
            given = [
                name for name, value in vars(self).items() if name != "rank" and value != getattr(LoRAConfig, name)
            ]
            if given:
                raise UserError(f"lora.{given[0]} has no effect without lora.rank: set that as well, or leave it out")

    @property
    def names(self) -> tuple[str, ...]:
        """The targets, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.targets.split(",") if name.strip()))

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclass(frozen=True, eq=False)
class Factor:
    """A low-rank term of some rows of a linear layer: `scale` · b a x.

    Attributes:
        a: (R, I).
        b: (rows, R).
        scale: the factor.
        start: the first of its rows.
    """

    a: Tensor
    b: Tensor
    scale: float
    start: int = 0

    def product(self) -> Tensor:
        """What it adds to its rows of the weight, (rows, I), in fp32 at least."""
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        return self.scale * (self.b.to(dtype) @ self.a.to(dtype))


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """What an adapter changes of a base.

    Attributes:
        factors: by the names of linear layers, such as `h.0.attn.c_attn`, their terms.
        token_rows: `wte`, and where the head is untied `lm_head`: the rows of the tokens that the base's tokenizer
            lacks, (n, C).
        first_token: the id of the first of these tokens.
    """

    factors: Mapping[str, tuple[Factor, ...]]
    token_rows: Mapping[str, Tensor] = field(default_factory=dict)
    first_token: int = 0

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, with the names of their layers."""
        for name, factors in self.factors.items():
            yield from ((name, tensor) for factor in factors for tensor in (factor.a, factor.b))
        yield from self.token_rows.items()


@dataclass(frozen=True, eq=False)
class NamedAdapters:
    """Adapters over one base; they are numbered from 1, and 0 is the base alone.

    Attributes:
        weights: of each, by its name.
        config: the shape of the base with the vocabulary of all.
    """

    weights: Mapping[str, AdapterWeights]
    config: GPTConfig

    def number(self, name: str | None) -> int:
        """The number of the adapter of that name; 0 for None. Raises UserError if there is none."""
        names = list(self.weights)
        if name is not None and name not in names:
            raise UserError(f'there is no adapter "{name[:80]}": {nearest(name[:80], names)}')
        return 0 if name is None else names.index(name) + 1


def dense_factors(factors: Iterable[Factor], n_out: int) -> tuple[Tensor, Tensor]:
    """All terms of a layer of `n_out` outputs as one: A (ΣR, I) and B (O, ΣR), the scales in B; zero off its blocks."""
    factors = list(factors)
    blocks = [F.pad(f.scale * f.b, (0, 0, f.start, n_out - f.start - len(f.b))) for f in factors]
    return torch.cat([factor.a for factor in factors]), torch.cat(blocks, 1)


# Targets ---------------------------------------------------------------------------------------------------------


def part_rows(config: GPTConfig, part: str, n_out: int) -> tuple[int, int]:
    """The first row and the number of rows of a part of a layer: `q`, `k` or `v` of `c_attn`, or `all` `n_out`."""
    if part == ALL:
        return 0, n_out
    q, kv = config.n_head * config.head_size, config.kv_heads * config.head_size
    return {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}[part]


def find_targets(lora: LoRAConfig, layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The layers that `lora` names, each with its parts.

    Args:
        lora: its targets.
        layers: names of the linear layers inside the blocks, as `h.0.attn.c_attn`.

    Raises:
        UserError: for a target that matches no layer, with the names there are, and for a layer that is named both
            whole and in parts.
    """
    layers = list(layers)
    found: dict[str, list[str]] = {}
    for target in lora.names:
        name, part = target, ALL
        if target.rpartition(".")[2] in _QKV and target.rpartition(".")[0].split(".")[-1] == _FUSED:
            name, _, part = target.rpartition(".")
        matching = [layer for layer in layers if name in (ALL, layer) or layer.endswith(f".{name}")]
        if not matching:
            raise UserError(
                f'lora.targets: "{target[:80]}" matches no linear layer of this model: there are '
                f"{', '.join(_short_names(layers))}, or {ALL}"
            )
        for layer in matching:
            found.setdefault(layer, []).append(part)
    for layer, parts in found.items():
        if ALL in parts and len(set(parts)) > 1:
            raise UserError(f"lora.targets names {layer} whole and its part {parts[-1]}: choose one of them")
    return {layer: tuple(dict.fromkeys(found[layer])) for layer in layers if layer in found}


def _short_names(layers: Iterable[str]) -> list[str]:
    """The names without their block, each once."""
    short = dict.fromkeys(layer.split(".", 2)[2] for layer in layers)
    return [name for one in short for name in (one, *(f"{one}.{p}" for p in _QKV if one.endswith(_FUSED)))]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside the blocks by their names: what terms can be added to."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith("h.") and name.count(".") == 3 and hasattr(module, "in_features")
    }


# Layers in training ----------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A and B of one term: A as PEFT draws it, B zero, so that training begins at the base.

    Attributes:
        a: (R, I).
        b: (rows, R).
        start: the first of its rows.
    """

    def __init__(self, n_in: int, rows: int, rank: int, start: int, like: Tensor) -> None:
        """For `rows` rows from `start` on, on the device and in the dtype of `like`."""
        super().__init__()
        self.start = start
        self.a = nn.Parameter(torch.empty(rank, n_in, device=like.device, dtype=like.dtype))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=like.device, dtype=like.dtype))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))


class LoRALinear(nn.Module):
    """A frozen linear layer with its terms.

    Nothing of the frozen weight is kept for the backward pass but the weight: its input only for the gradient of A.
    """

    def __init__(self, base: nn.Module, parts: Mapping[str, LowRank], scale: float, dropout: float) -> None:
        """`base` has `in_features` and `out_features`; `parts` are by the names of `part_rows`."""
        super().__init__()
        self.base = base
        self.parts = nn.ModuleDict(parts)
        self.scale = scale
        self.dropout = dropout
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]

    def factors(self) -> tuple[Factor, ...]:
        """Its terms."""
        return tuple(Factor(part.a, part.b, self.scale, part.start) for part in self._parts())

    def _parts(self) -> list[LowRank]:
        return [part for part in self.parts.values() if isinstance(part, LowRank)]

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        rows = x.flatten(0, -2)  # (N, I): what is added in place below must be no view, or its gradient is copied
        y = self.base(rows)
        a, b = dense_factors(self.factors(), self.out_features)
        inner = F.linear(dropout(rows, self.dropout if self.training else 0.0), a.to(x.dtype))  # (N, R)
        return y.addmm_(inner.to(y.dtype), b.to(y.dtype).t()).view(*x.shape[:-1], self.out_features)


def add_lora(model: nn.Module, config: GPTConfig, lora: LoRAConfig) -> None:
    """Freeze `model` and give the layers that `lora` names their terms, in place.

    Args:
        model: a GPT.
        config: its shape.
        lora: rank and targets.

    Raises:
        UserError: if a target matches nothing, or the rank is above the width of a layer.
    """
    model.requires_grad_(False)
    layers = linear_layers(model)
    like = next(model.parameters())
    for name, parts in find_targets(lora, layers).items():
        base = layers[name]
        terms = {part: _make_part(name, base, part, config, lora, like) for part in parts}
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRALinear(base, terms, lora.scale, lora.dropout))


def _make_part(name: str, base: nn.Module, part: str, config: GPTConfig, lora: LoRAConfig, like: Tensor) -> LowRank:
    n_in: int = base.in_features  # type: ignore[assignment]
    start, rows = part_rows(config, part, base.out_features)  # type: ignore[arg-type]
    width = min(n_in, rows)
    if lora.rank > width:
        shown = name if part == ALL else f"{name}.{part}"
        raise UserError(f"lora.rank={lora.rank} is above the width of {shown}, {width}: choose at most {width}")
    return LowRank(n_in, rows, lora.rank, start, like)


def merge_lora(model: nn.Module) -> None:
    """Add the terms to the weights of their layers, in place: what is left is a plain model of the same results."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            base = module.base
            if not isinstance(base, nn.Linear):
                raise TypeError(f"{name} has a weight in another form than terms can be added to")
            add_factors(base.weight.data, module.factors())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, base)


@torch.no_grad()
def add_factors(weight: Tensor, factors: Iterable[Factor]) -> Tensor:
    """`weight` (O, I) with the terms added to it in place, each sum rounded once."""
    for factor in factors:
        rows = weight[factor.start : factor.start + len(factor.b)]
        product = factor.product()
        rows.copy_(rows.to(product.dtype).add_(product))
    return weight


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that are trained, by the names of the model's `state_dict`."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def weights_of_state(
    state: Mapping[str, Tensor], config: GPTConfig, lora: LoRAConfig, first_token: int, where: str
) -> AdapterWeights:
    """The inverse of `adapter_state`, for a model of that shape.

    Args:
        state: what was read.
        config: the model's shape.
        lora: with which it was trained.
        first_token: the first of the tokens whose rows it has.
        where: how errors name the file.

    Raises:
        UserError: for a name or a shape that such an adapter has not.
    """
    factors: dict[str, list[Factor]] = {}
    token_rows: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, rest = name.partition(".parts.")
        part, _, kind = rest.partition(".")
        if name in ("wte.rows", "lm_head.rows") and tensor.shape[1:] == (config.n_embd,):
            token_rows[name.partition(".")[0]] = tensor
            continue
        b = state.get(f"{layer}.parts.{part}.b")
        is_known = part in (ALL, *(_QKV if layer.endswith(f".{_FUSED}") else ())) and kind in ("a", "b")
        if not is_known or b is None or tensor.ndim != 2 or b.ndim != 2:
            raise UserError(f"{where} holds {name[:80]} {tuple(tensor.shape)}, no part of its adapter: it is damaged")
        if kind == "a":
            start, rows = part_rows(config, part, len(b))
            if len(tensor) != lora.rank or b.shape != (rows, lora.rank):
                raise UserError(f"{where}: {layer} has a term of {tuple(tensor.shape)} and {tuple(b.shape)}: damaged")
            factors.setdefault(layer, []).append(Factor(tensor, b, lora.scale, start))
    return AdapterWeights({layer: tuple(found) for layer, found in factors.items()}, token_rows, first_token)
