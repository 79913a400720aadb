"""PEFT's folders (`adapter_config.json`, `adapter_model.safetensors`) ↔ our adapters, over a base of any family.

PEFT names its terms after the modules of transformers, which the name tables of `lit_gpt.convert.hf_architectures`
translate: a fused matrix of theirs may be several layers of ours, and the other way round. A term of one is then cut
into, or put together from, terms of the other.

Axes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lit_gpt.convert.adapters import Adapter, check_adapter
from lit_gpt.convert.hf import open_safetensors
from lit_gpt.convert.hf_architectures import ARCHITECTURES, tensor_plan, write_config
from lit_gpt.convert.peft_config import CONFIG, PeftConfig, read_peft_config
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.convert.tokenizer_json import read_tokenizer
from lit_gpt.convert.weights import StoredTensor, TensorEntry
from lit_gpt.convert.write import check_absent, tokenizer_files, whole_folder, write_safetensors
from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_write
from lit_gpt.model.lora import AdapterWeights, Factor
from lit_gpt.tokenizer.json_object import read_json
from lit_gpt.tokenizer.tokenizer import Tokenizer

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HASH = "lit_gpt_base_sha256"
"""A key of ours in the metadata of the weights: PEFT has no field for which base an adapter is for."""
_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class _Piece:
    """Where rows of a layer of ours are in a module of theirs.

    Attributes:
        ours: our layer.
        theirs: their module.
        start: the first of the rows in ours.
        at: the first of the rows in theirs.
        rows: how many.
        total: rows of their module.
        heads: 0, or the number of heads by which they order queries, keys and values.
    """

    ours: str
    theirs: str
    start: int
    at: int
    rows: int
    total: int
    heads: int


def model_type_of(base: SourceCheckpoint) -> str:
    """The architecture of transformers that a base is, or would be written as.

    Raises:
        UserError: if there is none.
    """
    return base.kind if base.kind in ARCHITECTURES else write_config(base.config, base.name)["model_type"]


def _pieces(plan: Iterable[TensorEntry]) -> Iterator[_Piece]:
    """For every linear layer of the blocks the modules of theirs that it is made of."""
    for entry in plan:
        layer, _, kind = entry.ours.rpartition(".")
        if kind != "weight" or not layer.startswith("h.") or len(entry.shapes[0]) != 2:
            continue
        index, count = entry.part
        start = 0
        for name, shape in zip(entry.theirs, entry.shapes):
            total = shape[-1] if entry.transposed else shape[0]
            rows = total // count
            yield _Piece(layer, name.removesuffix(".weight"), start, index * rows, rows, total, entry.heads)
            start += rows


def _table_names(model_type: str, plan: Iterable[TensorEntry]) -> dict[str, str]:
    """Their modules → our embedding and head.

    The last name of ours is the one in use: transformers 5 has given the head of GPT-NeoX another one than the files.
    """
    found = {entry.theirs[0]: entry.ours for entry in plan if entry.ours in ("wte.weight", "lm_head.weight")}
    others = ARCHITECTURES[model_type].other_names
    found |= {other: found[name] for other, name in others.items() if name in found}
    return {theirs.removesuffix(".weight"): ours.removesuffix(".weight") for theirs, ours in found.items()}


def _by_head(b: Tensor, outer: int, inner: int) -> Tensor:
    """Rows in `outer` groups of `inner` groups, reordered to `inner` groups of `outer`."""
    return b.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2).contiguous()


# Reading ---------------------------------------------------------------------------------------------------------


def is_peft(folder: Path) -> bool:
    """Whether a folder is an adapter of PEFT's."""
    return (folder / CONFIG).is_file()


def base_address(folder: Path) -> str:
    """The base that an adapter of PEFT's names. Raises UserError if it names none."""
    name = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name or not name.isprintable():
        raise UserError(f"{folder / CONFIG} names no base: use lit_gpt convert BASE {folder} OUTPUT")
    return name


def read_peft(folder: Path, base: SourceCheckpoint, name: str) -> Adapter:
    """An adapter of PEFT's over its base.

    Args:
        folder: of the adapter.
        base: what it is to be used with.
        name: what the user called the adapter.

    Raises:
        UserError: for a feature or a name that is not expressed here, a shape that does not fit, or another base.
    """
    where = f"adapter {name}"
    config = read_peft_config(folder, where)
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{where} has no {WEIGHTS}: only safetensors are read; save it with safe_serialization=True")
    stored = {key.removeprefix(_PREFIX): tensor for key, tensor in open_safetensors(path).items()}
    _check_base(path, base, where)
    model_type = model_type_of(base)
    plan = tensor_plan(model_type, base.config)
    factors: dict[str, list[Factor]] = {}
    pieces: dict[str, list[_Piece]] = {}
    for piece in _pieces(plan):
        pieces.setdefault(piece.theirs, []).append(piece)
    for module in sorted({key.rpartition(".lora_")[0] for key in stored if ".lora_" in key}):
        if module not in pieces:
            known = sorted({one.split(".")[-1] for one in pieces})
            raise UserError(f"{where} has terms for {module[:80]}: here they can be for {', '.join(known)}")
        for piece, factor in _read_module(module, stored, config, pieces[module], where):
            factors.setdefault(piece.ours, []).append(factor)
    rows, first = _read_tokens(stored, config, _table_names(model_type, plan), where)
    left = [key for key in stored if ".lora_" not in key and not key.endswith(_TOKENS)]
    if left:
        raise UserError(
            f"{where} holds {left[0][:80]}, which is no low-rank term: merge it with PEFT, and convert that"
        )
    return _assembled(folder, base, name, AdapterWeights({k: tuple(v) for k, v in factors.items()}, rows, first))


def _assembled(folder: Path, base: SourceCheckpoint, name: str, weights: AdapterWeights) -> Adapter:
    """The adapter with the tokenizer and the vocabulary that go with it, checked."""
    tokenizer, config = base.tokenizer, base.config
    end = weights.first_token + max((len(rows) for rows in weights.token_rows.values()), default=0)
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(folder, {"model_type": model_type_of(base)}, name)
    if tokenizer is not None and tokenizer.n_vocab > max(end, config.vocab_size):
        raise UserError(
            f"adapter {name}: its tokenizer has {tokenizer.n_vocab} ids, and neither it nor {base.name} has rows for "
            f"those from {max(end, config.vocab_size)} on: merge it with PEFT, and convert that"
        )
    if end > config.vocab_size:
        config = replace(
            config, vocab_size=end, padded_vocab_size=None if end > config.vocab_rows else config.vocab_rows
        )
    adapter = Adapter(name, config, tokenizer, weights)
    check_adapter(adapter, base)
    return adapter


def _check_base(path: Path, base: SourceCheckpoint, where: str) -> None:
    with safe_open(path, "pt") as file:
        written = (file.metadata() or {}).get(_HASH)
    if written is not None and written != (found := base.weights_sha256):
        raise UserError(
            f"{where} was trained on another base than {base.name}: its weights have the hash {written[:12]}, "
            f"these {found[:12]}; give the base that it came from"
        )


def _read_module(
    module: str, stored: Mapping[str, StoredTensor], config: PeftConfig, pieces: list[_Piece], where: str
) -> Iterator[tuple[_Piece, Factor]]:
    """The term of a module of theirs as terms of the layers of ours that it is."""
    found = [stored.get(f"{module}.lora_{kind}.weight") for kind in "AB"]
    if found[0] is None or found[1] is None or any(len(one.shape) != 2 for one in found if one is not None):
        raise UserError(
            f"{where} has only one half of a term, or another kind of term, for {module[:80]}: it is damaged"
        )
    a, b = (_wide(one.read()) for one in found if one is not None)
    rank = config.rank_of(module)
    if len(a) != rank or b.shape[1] != rank or len(b) != pieces[0].total:
        shapes = f"{tuple(b.shape)} and {tuple(a.shape)}"
        raise UserError(f"{where}: its term {shapes} for {module} is not of rank {rank} and {pieces[0].total} outputs")
    scale = config.scale_of(module)
    for piece in pieces:
        part = b[piece.at : piece.at + piece.rows]
        yield piece, Factor(a, _by_head(part, piece.heads, 3) if piece.heads else part, scale, piece.start)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _read_tokens(
    stored: Mapping[str, StoredTensor], config: PeftConfig, names: Mapping[str, str], where: str
) -> tuple[dict[str, Tensor], int]:
    """Our embedding and head → their trained rows, and the first id of them."""
    rows, first = {}, 0
    for key, tensor in stored.items():
        if not key.endswith(_TOKENS):
            continue
        module = key.removesuffix(_TOKENS)
        ids = config.token_ids(module)
        if module not in names or len(tensor.shape) != 2 or tensor.shape[0] != len(ids):
            raise UserError(f"{where} has {key[:80]} of {tensor.shape} for {len(ids)} tokens: it is damaged")
        order = sorted(range(len(ids)), key=lambda index: ids[index])
        first = ids[order[0]]
        if [ids[index] for index in order] != list(range(first, first + len(ids))):
            raise UserError(f"{where} trains tokens that are not one row of ids ({ids[:5]} …): merge it with PEFT")
        rows[names[module]] = _wide(tensor.read())[order]
    return rows, first


# Writing ---------------------------------------------------------------------------------------------------------


def write_peft(adapter: Adapter, base: SourceCheckpoint, folder: Path) -> None:
    """A folder that PEFT loads over the base as transformers has it, such as `lit_gpt convert --to hf` writes.

    Args:
        adapter: what is written.
        base: of it.
        folder: where.

    Raises:
        UserError: if `folder` exists, or no architecture of transformers expresses the base.
    """
    check_absent(folder)
    model_type = model_type_of(base)
    plan = tensor_plan(model_type, base.config)
    modules = dict(_their_modules(adapter.weights, plan, adapter.rank_stabilized))
    tensors = {}
    for module, term in modules.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = _stored(term.a)
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = _stored(term.b)
    names = {ours: theirs for theirs, ours in _table_names(model_type, plan).items()}
    for ours, rows in adapter.weights.token_rows.items():
        tensors[f"{_PREFIX}{names[ours]}{_TOKENS}"] = _stored(rows)
    config = _config(adapter, modules, base.name, bool(ARCHITECTURES[model_type].transposed))
    first = adapter.weights.first_token
    config["trainable_token_indices"] = {
        names[ours].rpartition(".")[2]: list(range(first, first + len(rows)))
        for ours, rows in adapter.weights.token_rows.items()
    } or None
    texts = {CONFIG: json.dumps(config, ensure_ascii=False, indent=2)}
    if adapter.tokenizer is not None and not _is_same(adapter.tokenizer, base.tokenizer):
        texts |= tokenizer_files(adapter.tokenizer, adapter.config.block_size, adapter.name)
    with whole_folder(folder) as unfinished:
        for name, text in texts.items():
            with atomic_write(unfinished / name, "w") as file:
                file.write(text)
        write_safetensors(unfinished / WEIGHTS, tensors, {_HASH: base.weights_sha256})


def _is_same(tokenizer: Tokenizer, other: Tokenizer | None) -> bool:
    return other is not None and tokenizer.to_dict() == other.to_dict()


def _stored(tensor: Tensor) -> StoredTensor:
    return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass(frozen=True, eq=False)
class _Term:
    """The term of a module of theirs: A, B, and the alpha that gives its scale."""

    a: Tensor
    b: Tensor
    alpha: float


def _their_modules(
    weights: AdapterWeights, plan: list[TensorEntry], rank_stabilized: bool
) -> Iterator[tuple[str, _Term]]:
    """Each module of theirs that has a term."""
    found: dict[str, list[Factor]] = {}
    totals: dict[str, int] = {}
    for piece in _pieces(plan):
        totals[piece.theirs] = piece.total
        for factor in weights.factors.get(piece.ours, ()):
            if piece.heads:
                padding = (0, 0, factor.start, piece.rows - factor.start - len(factor.b))
                whole = torch.nn.functional.pad(factor.b, padding)
                factor = Factor(factor.a, _by_head(whole, 3, piece.heads), factor.scale)
            low, high = max(factor.start, piece.start), min(factor.start + len(factor.b), piece.start + piece.rows)
            if low < high:
                part = factor.b[low - factor.start : high - factor.start]
                at = piece.at + low - piece.start
                found.setdefault(piece.theirs, []).append(Factor(factor.a, part, factor.scale, at))
    for module, factors in found.items():
        yield module, _joined(factors, totals[module], rank_stabilized)


def _joined(factors: list[Factor], total: int, rank_stabilized: bool) -> _Term:
    """Several terms of a module as one of the sum of their ranks: a block-diagonal B.

    Those that share an A, as parts of one fused matrix do that was read from another, share it again.
    """
    groups: list[list[Factor]] = []
    for factor in factors:
        shared = next((g for g in groups if g[0].scale == factor.scale and torch.equal(g[0].a, factor.a)), None)
        if shared is None:
            groups.append([factor])
        else:
            shared.append(factor)
    scale = groups[0][0].scale
    rank = sum(len(group[0].a) for group in groups)
    b = groups[0][0].b.new_zeros(total, rank)
    column = 0
    for group in groups:
        width = len(group[0].a)
        for factor in group:
            rows = b[factor.start : factor.start + len(factor.b), column : column + width]
            rows.copy_(factor.b if factor.scale == scale else factor.b * (factor.scale / scale))
        column += width
    alpha = scale * (math.sqrt(rank) if rank_stabilized else rank)
    return _Term(torch.cat([group[0].a for group in groups]), b, alpha)


def _config(adapter: Adapter, modules: Mapping[str, _Term], base: str, transposed: bool) -> dict[str, Any]:
    """`adapter_config.json`; what differs from the most common rank and alpha is in the patterns."""
    ranks = {module: len(term.a) for module, term in modules.items()}
    alphas = {module: _plain(term.alpha) for module, term in modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 1
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": _targets(list(modules)),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "use_rslora": adapter.rank_stabilized,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "rank_pattern": {module: found for module, found in ranks.items() if found != rank},
        "alpha_pattern": {module: found for module, found in alphas.items() if found != alpha},
    }


def _plain(alpha: float) -> float | int:
    """A whole number as one, which other programs expect."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _targets(modules: list[str]) -> list[str]:
    """The modules by the ends of their names where all layers have the same, else by their whole names."""
    layers: dict[str, set[str]] = {}
    for module in modules:
        found = re.fullmatch(r"(.*\.\d+)\.(.+)", module)
        if found is None:
            return sorted(modules)
        layers.setdefault(found[1], set()).add(found[2])
    ends = list(layers.values())
    return sorted(ends[0]) if ends and all(end == ends[0] for end in ends) else sorted(modules)
