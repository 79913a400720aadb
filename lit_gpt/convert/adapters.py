"""Adapters over a base: which base they belong to, and both as one model, merged tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from lit_gpt.checkpoint.format import Header
from lit_gpt.checkpoint.growth import grow_weights
from lit_gpt.checkpoint.torch_file import OpenTorchFile
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.convert.weights import StoredTensor
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.lora import AdapterWeights, Factor, add_factors, weights_of_state
from lit_gpt.tokenizer.tokenizer import Tokenizer

_FREE_KEYS = {"vocab_size", "padded_vocab_size", "dropout", "attn_dropout"}
"""Keys of the config in which an adapter's model may differ from its base: the vocabulary grows."""

_MOST_PADDING = 4096  # rows: vocabularies are padded to multiples of 128 or so


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory, compared with the base that it is for.

    Attributes:
        name: what the user called it.
        config: the shape of base and adapter together: the base's, but for a vocabulary that grew.
        tokenizer: of both together.
        weights: its terms.
        rank_stabilized: how a rank becomes a scale, where the terms are written with their ranks.
    """

    name: str
    config: GPTConfig
    tokenizer: Tokenizer | None
    weights: AdapterWeights
    rank_stabilized: bool = False


def read_adapter(file: OpenTorchFile, header: Header, base: SourceCheckpoint, name: str) -> Adapter:
    """An adapter of ours over its base.

    Args:
        file: its checkpoint.
        header: of that.
        base: what it is to be used with.
        name: what the user called it.

    Raises:
        UserError: if it was trained on another base, or is damaged.
    """
    entry = header.adapter
    assert entry is not None
    where = f"adapter {name}"
    entry.check_base(base.weights_sha256, base.name, where)
    tokenizer = base.tokenizer
    if header.tokenizer is not None:
        tokenizer = Tokenizer.from_dict(header.tokenizer, name)
    state = {key.removeprefix("model."): tensor for key, tensor in file.tensors("state_dict").items()}
    read = {key: file.read(tensor) for key, tensor in state.items()}
    weights = weights_of_state(read, header.config, entry.lora, entry.first_token, where)
    adapter = Adapter(name, header.config, tokenizer, weights, entry.lora.rank_stabilized)
    check_adapter(adapter, base)
    return adapter


def check_adapter(adapter: Adapter, base: SourceCheckpoint) -> None:
    """Refuse what does not fit the base, or is no number: it would reach others' rows of a batch.

    Raises:
        UserError: naming the layer.
    """
    where = f"adapter {adapter.name}"
    ours, theirs = adapter.config.to_dict(), base.config.to_dict()
    for key, value in theirs.items():
        if key not in _FREE_KEYS and ours[key] != value:
            raise UserError(f"{where} is for a model of {key}={ours[key]}, {base.name} has {value}: use its own base")
    for layer, factors in adapter.weights.factors.items():
        stored = base.weights.get(f"{layer}.weight")
        if stored is None or not layer.startswith("h.") or len(stored.shape) != 2:
            raise UserError(f"{where} has terms for {layer[:80]}, which {base.name} has not: use its own base")
        for factor in factors:
            n_out, n_in = stored.shape
            if factor.a.shape[1] != n_in or factor.start + len(factor.b) > n_out or len(factor.a) != factor.b.shape[1]:
                found = f"{tuple(factor.b.shape)} and {tuple(factor.a.shape)}"
                raise UserError(f"{where}: its term {found} for {layer} does not fit its weight {stored.shape}")
    _check_token_rows(adapter, base.config.vocab_rows, where)
    for layer, tensor in adapter.weights.tensors():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{where} holds NaN or infinity in {layer}: train it again, or use an earlier checkpoint")


def _check_token_rows(adapter: Adapter, base_rows: int, where: str) -> None:
    config, weights = adapter.config, adapter.weights
    wanted = {"wte"} if config.tie_embeddings else {"wte", "lm_head"}
    needed = config.vocab_rows > base_rows
    if config.vocab_rows > max(base_rows, config.vocab_size) + _MOST_PADDING:
        raise UserError(f"{where}: padded_vocab_size={config.padded_vocab_size} is far above its vocabulary: damaged")
    if (weights.token_rows or needed) and set(weights.token_rows) != wanted:
        raise UserError(f"{where} lacks the rows of new tokens ({', '.join(sorted(wanted))}): it is damaged")
    for name, rows in weights.token_rows.items():
        end = weights.first_token + len(rows)
        if (
            rows.ndim != 2
            or rows.shape[1] != config.n_embd
            or end > config.vocab_rows
            or weights.first_token > base_rows
        ):
            raise UserError(f"{where}: its rows {tuple(rows.shape)} of new tokens in {name} do not fit: it is damaged")
        if needed and end < config.vocab_size:
            raise UserError(f"{where} has no rows for the tokens from {end} on: it is damaged")


def merged(base: SourceCheckpoint, adapter: Adapter) -> SourceCheckpoint:
    """Base and adapter as one model, of which each tensor is merged when it is read."""
    weights = dict(base.weights)
    for layer, factors in adapter.weights.factors.items():
        name = f"{layer}.weight"
        stored = weights[name]
        weights[name] = replace(stored, read=partial(_read_merged, stored, factors), extent=None)
    rows = adapter.config.vocab_rows
    for module, own in adapter.weights.token_rows.items():
        stored = weights[f"{module}.weight"]
        read = partial(_read_grown, stored, own, adapter.weights.first_token, rows)
        weights[f"{module}.weight"] = StoredTensor((rows, *stored.shape[1:]), stored.dtype, read)
    bias = weights.get("lm_head.bias")
    if bias is not None and adapter.weights.token_rows:  # that of the new tokens stays as it began
        read_bias = partial(_read_grown_bias, bias, adapter)
        weights["lm_head.bias"] = StoredTensor((rows,), bias.dtype, read_bias)
    return replace(
        base,
        name=adapter.name,
        config=adapter.config,
        tokenizer=adapter.tokenizer,
        weights=weights,
        training=None,
        is_adapter=True,
    )


def _read_merged(stored: StoredTensor, factors: tuple[Factor, ...]) -> Tensor:
    return add_factors(stored.read(), factors)


def _read_grown(stored: StoredTensor, own: Tensor, first: int, rows: int) -> Tensor:
    """A tensor of `rows` rows: the stored ones, and from `first` on the adapter's own."""
    weight = stored.read()
    grown = weight.new_zeros(rows, weight.shape[1])
    kept = min(rows, len(weight))
    grown[:kept] = weight[:kept]
    grown[first : first + len(own)] = own
    return grown


def _read_grown_bias(stored: StoredTensor, adapter: Adapter) -> Tensor:
    first = adapter.weights.first_token
    ids = list(range(first, first + len(adapter.weights.token_rows["wte"])))
    return grow_weights({"lm_head.bias": stored.read()}, adapter.config, first, ids)["lm_head.bias"]
