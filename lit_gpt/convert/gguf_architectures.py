"""GGUF's architectures: the names of their tensors, and their metadata as fields of `config.json` and back.

What a file or a config asks for goes through the same functions as a Hugging Face folder's (`hf_config.py`). Here is
what llama.cpp calls it, and what llama.cpp computes differently or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lit_gpt.checkpoint.limits import check_plain
from lit_gpt.convert.gguf_format import shortest_decimal
from lit_gpt.convert.hf_architectures import HINTS, read_config, write_config
from lit_gpt.convert.weights import NameTable, StoredTensor, TensorEntry, tensor_entries
from lit_gpt.errors import UserError, brief
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.positions import scale_frequencies
from lit_gpt.tokenizer.json_object import parse_json

OUR_CONFIG = "lit_gpt.config"
"""A key of our own: what GGUF cannot say of a `GPTConfig`, as JSON. llama.cpp ignores keys that it does not know."""
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor in which llama.cpp keeps Llama 3's scaling of rotary frequencies: one divisor for each."""

_BLOCK: NameTable = {
    "wte": "token_embd",
    "h.{}.ln_1": "blk.{}.attn_norm",
    "h.{}.attn.c_proj": "blk.{}.attn_output",
    "h.{}.ln_2": "blk.{}.ffn_norm",
    "h.{}.mlp.c_fc": "blk.{}.ffn_up",
    "h.{}.mlp.c_proj": "blk.{}.ffn_down",
    "ln_f": "output_norm",
    "lm_head": "output",
}
_GPT2_TABLE: NameTable = {**_BLOCK, "wpe": "position_embd", "h.{}.attn.c_attn": "blk.{}.attn_qkv"}
_LLAMA_TABLE: NameTable = {
    **_BLOCK,
    "h.{}.attn.c_attn": ("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"),
    "h.{}.attn.q_norm": "blk.{}.attn_q_norm",
    "h.{}.attn.k_norm": "blk.{}.attn_k_norm",
    "h.{}.mlp.c_gate": "blk.{}.ffn_gate",
}
_GPT2_FIELDS = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_LLAMA_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_ROPE_KEYS = {
    "attention.value_length",
    "rope.dimension_count",
    *(f"rope.{key}" for key in ("scaling.type", "scaling.factor", "scale_linear", "scaling.original_context_length")),
}
_FRACTIONS = {"attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "rope.freq_base"}
_PASSED_OVER = {"vocab_size", "tensor_data_layout", "attention.causal", "rope.scaling.finetuned"}
_MUST_BE_ZERO = {"expert_count", "expert_used_count", "nextn_predict_layers"}
_KNOWN_SCALINGS = [
    {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 8192}
    for factor in (8.0, 32.0)
]
"""Of Llama 3.1 and 3.2: which of them made a file's divisors can be told from the divisors."""


@dataclass(frozen=True)
class GgufArchitecture:
    """An architecture of llama.cpp that is read and written.

    Attributes:
        tensors: our modules → their tensors.
        fields: keys of the metadata, without the architecture's name, → fields of `config.json`.
        constants: fields of `config.json` of which GGUF says nothing.
        allowed: a config of ours → for some of its fields, the values that llama.cpp computes with.
        rope: whether positions are rotary.
        pairs: whether queries and keys have the two numbers of each rotated pair side by side.
    """

    tensors: NameTable
    fields: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    allowed: Callable[[GPTConfig], dict[str, tuple[Any, ...]]] = lambda config: {}
    rope: bool = True
    pairs: bool = False


def _no_factors(config: GPTConfig) -> dict[str, tuple[Any, ...]]:
    """Only for `llama` does llama.cpp divide frequencies by factors."""
    scaling = config.rope_scaling or {}
    return {"rope_scaling": (None,) if scaling.get("rope_type") == "llama3" else (config.rope_scaling,)}


_NO_WINDOW: dict[str, tuple[Any, ...]] = {"sliding_window": (None,)}

GGUF_ARCHITECTURES = {
    "gpt2": GgufArchitecture(
        _GPT2_TABLE,
        _GPT2_FIELDS,
        constants={"activation_function": "gelu_new"},
        allowed=lambda config: {"mlp": ("gelu_tanh",)},
        rope=False,
    ),
    "llama": GgufArchitecture(_LLAMA_TABLE, _LLAMA_FIELDS, pairs=True),
    "qwen2": GgufArchitecture(
        _LLAMA_TABLE,
        _LLAMA_FIELDS,
        allowed=lambda config: _no_factors(config) | _NO_WINDOW | {"head_dim": (None, config.n_embd // config.n_head)},
    ),
    "qwen3": GgufArchitecture(
        _LLAMA_TABLE,
        _LLAMA_FIELDS,
        allowed=lambda config: _no_factors(config) | _NO_WINDOW | {"qkv_bias": (False,), "proj_bias": (False,)},
    ),
}
"""`general.architecture` → architecture; the names are those of transformers' `model_type`."""


@dataclass(frozen=True)
class GgufModel:
    """A model as GGUF describes it.

    Attributes:
        name: its architecture.
        config: its shape as llama.cpp sees it: with the biases that the architecture always has.
        metadata: what of the header is about it.
    """

    name: str
    config: GPTConfig
    metadata: dict[str, Any]

    def plan(self) -> list[TensorEntry]:
        """Where each of its tensors is."""
        return tensor_plan(self.name, self.config)


def tensor_plan(name: str, config: GPTConfig) -> list[TensorEntry]:
    """Where each tensor of a model of this shape is in a file of this architecture."""
    return list(tensor_entries(config, GGUF_ARCHITECTURES[name].tensors))


def describe(config: GPTConfig, where: str) -> GgufModel:
    """Our config as GGUF's metadata, the inverse of `read_model`.

    Raises:
        UserError: if none of llama.cpp's architectures that are known here computes it, naming the fields.
    """
    config = replace(config, padded_vocab_size=None)  # rows without a meaning, which llama.cpp would sample from
    values = write_config(config, where)
    name = values["model_type"]
    if name not in GGUF_ARCHITECTURES:
        raise UserError(
            f"{where}: GGUF is written for {', '.join(GGUF_ARCHITECTURES)}, and this is {name}: write it with --to hf"
        )
    architecture = GGUF_ARCHITECTURES[name]
    faults = [
        f"{key}={getattr(config, key)!r}"
        for key, allowed in architecture.allowed(config).items()
        if getattr(config, key) not in allowed
    ]
    if faults:
        raise UserError(f"{where}: llama.cpp's {name} cannot have {', '.join(faults)}: write it with --to hf")
    theirs = read_config({key: value for key, value in values.items() if key != HINTS}, where)
    metadata: dict[str, Any] = {f"{name}.vocab_size": config.vocab_size}
    for key, of_config in architecture.fields.items():
        value = theirs.mlp_size if values[of_config] is None else values[of_config]  # GPT-2's n_inner may be null
        metadata[f"{name}.{key}"] = float(value) if key in _FRACTIONS else value
    if architecture.rope:
        metadata |= _describe_rope(name, theirs)
    names = {part for entry in tensor_plan(name, theirs) for part in entry.theirs}
    as_read = {key: shortest_decimal(item) if isinstance(item, float) else item for key, item in metadata.items()}
    again, ours = _read_fields(name, as_read, names, config.vocab_size, where).to_dict(), config.to_dict()
    hints = {key: value for key, value in ours.items() if again[key] != value}
    return GgufModel(name, theirs, metadata | ({OUR_CONFIG: json.dumps(hints)} if hints else {}))


def _describe_rope(name: str, config: GPTConfig) -> dict[str, Any]:
    size = config.head_size
    values: dict[str, Any] = {f"{name}.attention.value_length": size, f"{name}.rope.dimension_count": size}
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        values |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": float(scaling["factor"])}
    return values


def read_model(metadata: Mapping[str, Any], stored: Mapping[str, StoredTensor], where: str) -> GgufModel:
    """What a header says of its model.

    Args:
        metadata: all of the header's.
        stored: its tensors.
        where: how errors name the file.

    Raises:
        UserError: for an architecture or key that this project does not do (naming it), or one that is missing.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF_ARCHITECTURES:
        raise UserError(
            f"{where}: the architecture {brief(name)} is not read from GGUF: {', '.join(GGUF_ARCHITECTURES)} are; "
            "convert its Hugging Face folder"
        )
    if "token_embd.weight" not in stored:
        raise UserError(f"{where} has no token_embd.weight: it holds no whole model")
    rows = stored["token_embd.weight"].shape[0]
    if metadata.get(f"{name}.vocab_size", rows) != rows:
        raise UserError(
            f"{where}: {name}.vocab_size is {brief(metadata[f'{name}.vocab_size'])}, but token_embd.weight has "
            f"{rows} rows: it is damaged"
        )
    config = _read_fields(name, metadata, stored, rows, where)
    if ROPE_FACTORS in stored:
        config = replace(config, rope_scaling=_scaling_of(config, stored[ROPE_FACTORS], _hints(metadata, where), where))
    return GgufModel(name, config, dict(metadata))


def read_hints(model: GgufModel, where: str) -> GPTConfig | None:
    """The config that we wrote, if the file is ours and says more than GGUF can.

    Raises:
        UserError: if what it says is no config.
    """
    hints = _hints(model.metadata, where)
    if not hints:
        return None
    try:
        return GPTConfig.from_dict({**model.config.to_dict(), **hints})
    except UserError as error:
        raise UserError(f"{where}: {OUR_CONFIG}: {error}") from None


def _hints(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    text = metadata.get(OUR_CONFIG, "{}")
    try:
        hints = parse_json(text.encode())
    except (AttributeError, ValueError):
        hints = None
    if not isinstance(hints, dict):
        raise UserError(f"{where}: {OUR_CONFIG} is {brief(text)}, no JSON object: it is damaged")
    check_plain(hints, f"{where}: {OUR_CONFIG}")
    return hints


def _read_fields(
    name: str, metadata: Mapping[str, Any], names: Collection[str], vocab_size: int, where: str
) -> GPTConfig:
    """The config that metadata and names of tensors describe, without hints and without factors of frequencies."""
    architecture = GGUF_ARCHITECTURES[name]
    own = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    values: dict[str, Any] = {
        "model_type": name,
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        **architecture.constants,
    }
    if architecture.rope:
        own = _with_defaults(own)
        values["rope_scaling"] = _read_scaling(name, own, where)
    for key, of_config in architecture.fields.items():
        if key not in own:
            raise UserError(f"{where} lacks {name}.{key}: get it again")
        values[of_config] = own[key]
    config = read_config(values, where)
    _refuse_others(name, own, config.block_size, where)
    return config


def _with_defaults(own: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp assumes where a file of rotary positions says nothing."""
    heads, width = own.get("attention.head_count"), own.get("embedding_length")
    size = width // heads if isinstance(heads, int) and isinstance(width, int) and heads > 0 else None
    return {
        "attention.head_count_kv": heads,
        "attention.key_length": size,
        "rope.freq_base": 10000.0,
        **own,
    }


def _read_scaling(name: str, own: dict[str, Any], where: str) -> dict[str, Any] | None:
    """`rope_scaling` as in `config.json`; llama.cpp takes a factor without a kind as linear."""
    size = own["attention.key_length"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, size) != size:
            raise UserError(
                f"{where}: {name}.{key}={brief(own[key])} is not supported: heads have {brief(size)} numbers"
            )
    kind, factor = own.get("rope.scaling.type", "linear"), own.get("rope.scaling.factor", own.get("rope.scale_linear"))
    if kind == "none" or (kind == "linear" and factor in (None, 0, 1)):
        return None
    if kind != "linear":
        raise UserError(f"{where}: {name}.rope.scaling.type={brief(kind)} is not supported: linear is")
    return {"rope_type": "linear", "factor": factor}


def _refuse_others(name: str, own: dict[str, Any], block_size: int, where: str) -> None:
    """Refuse what asks for something that is not done here, by its key."""
    architecture = GGUF_ARCHITECTURES[name]
    known = {*architecture.fields, *_PASSED_OVER, *(_ROPE_KEYS if architecture.rope else ())}
    window = own.get("attention.sliding_window")
    if isinstance(window, int) and window >= block_size:
        known.add("attention.sliding_window")
    for key, value in own.items():
        if key not in known and not (key in _MUST_BE_ZERO and value == 0):
            raise UserError(f"{where}: {name}.{key}={brief(value)} is not supported: get a model without it")


def rope_factors(config: GPTConfig) -> Tensor | None:
    """Llama 3's divisors of the rotary frequencies, float32 (D / 2,); None without that scaling."""
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") != "llama3":
        return None
    exponent = torch.arange(0, config.head_size, 2, dtype=torch.float64) / config.head_size
    frequency = config.rope_theta**-exponent
    return (frequency / scale_frequencies(frequency, scaling)).float()


def _scaling_of(config: GPTConfig, stored: StoredTensor, hints: dict[str, Any], where: str) -> dict[str, Any]:
    """The scaling that made these divisors: the one that the file's hints name, or that of a model that is known."""
    named = hints.get("rope_scaling")
    for scaling in [*([named] if named else []), *_KNOWN_SCALINGS]:
        expected = rope_factors(replace(config, rope_scaling=scaling))
        if expected is None or expected.shape != stored.shape:
            continue
        if torch.allclose(expected, stored.read().float(), rtol=1e-4, atol=0):
            return scaling
    raise UserError(
        f"{where}: {ROPE_FACTORS} has other divisors than Llama 3.1 or 3.2: convert the model's Hugging Face folder"
    )


def to_pairs(tensor: StoredTensor, heads: int) -> StoredTensor:
    """Rows of queries or keys with the two of each rotated pair side by side; ours are half a head apart."""
    return _reordered(tensor, (heads, 2, -1))


def from_pairs(tensor: StoredTensor, heads: int) -> StoredTensor:
    """The inverse of `to_pairs`."""
    return _reordered(tensor, (heads, -1, 2))


def _reordered(tensor: StoredTensor, split: tuple[int, int, int]) -> StoredTensor:
    def read() -> Tensor:
        data = tensor.read()
        return data.reshape(*split, *data.shape[1:]).transpose(1, 2).reshape(data.shape)

    return StoredTensor(tensor.shape, tensor.dtype, read)


def heads_of(name: str, architecture: str, config: GPTConfig) -> int | None:
    """How many heads the rows of this tensor of theirs are, if they are stored as pairs; None if they are not."""
    part = name.split(".")[-2]
    if not GGUF_ARCHITECTURES[architecture].pairs or part not in ("attn_q", "attn_k"):
        return None
    return config.n_head if part == "attn_q" else config.kv_heads
