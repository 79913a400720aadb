"""Fields of `config.json` of Llama and its relatives as a `GPTConfig`, and back: one `LlamaVariant` for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lit_gpt.convert.hf_config import (
    Requirements,
    Windows,
    read_rope,
    read_windows,
    refuse,
    rotary_dim,
    rotary_fraction,
    write_rope,
    write_windows,
)
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig


@dataclass(frozen=True)
class LlamaVariant:
    """How a model type of the Llama family differs from the others.

    Attributes:
        qkv_bias: bias of queries, keys and values; None where `attention_bias` says so.
        proj_bias: bias of the output projection, likewise.
        has_mlp_bias: whether `mlp_bias` is a field of its config.
        has_head_dim: whether `head_dim` is one; where it is not, heads are hidden_size / num_attention_heads wide.
        head_dim: its default; None for hidden_size / num_attention_heads.
        windows: which layers can have a sliding window; `layer_types` goes before everything else.
        has_partial_rotary: whether `partial_rotary_factor` is a field of its config.
        has_rope_scaling: whether `linear` and `llama3` scaling are known for it.
        tied: whether the head shares the embedding's weight where the config does not say.
        activation: the field that names it, and its names.
        shape: fields of `GPTConfig` that have this value in every model of the type.
        constants: fields that are always written with this value.
    """

    qkv_bias: bool | None = None
    proj_bias: bool | None = None
    has_mlp_bias: bool = False
    has_head_dim: bool = True
    head_dim: int | None = None
    windows: Windows = "never"
    has_partial_rotary: bool = False
    has_rope_scaling: bool = True
    tied: bool = False
    activation: tuple[str, tuple[str, ...]] = ("hidden_act", ("silu", "swish"))
    shape: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)


def read_llama(values: dict[str, Any], where: str, variant: LlamaVariant) -> GPTConfig:
    """The fields of Llama or a relative as a config; `where` names the file in errors."""
    refuse(values, where, variant.activation[0], *variant.activation[1])
    bias = bool(values.get("attention_bias", False))
    theta, scaling, fraction = read_rope(values, where)
    window, global_layers = read_windows(values, where, variant.windows)
    shape: dict[str, Any] = {
        "vocab_size": values["vocab_size"],
        "block_size": values["max_position_embeddings"],
        "n_layer": values["num_hidden_layers"],
        "n_head": values["num_attention_heads"],
        "n_kv_head": values.get("num_key_value_heads"),
        "n_embd": values["hidden_size"],
        "head_dim": values.get("head_dim") or variant.head_dim,
        "intermediate_size": values["intermediate_size"],
        "mlp": "swiglu",
        "norm": "rmsnorm",
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "position": "rope",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": window,
        "global_layers": global_layers,
        "qkv_bias": bias if variant.qkv_bias is None else variant.qkv_bias,
        "proj_bias": bias if variant.proj_bias is None else variant.proj_bias,
        "mlp_bias": bool(values.get("mlp_bias", False)),
        "tie_embeddings": _or(values.get("tie_word_embeddings"), variant.tied),
        "dropout": values.get("attention_dropout") or 0.0,
        "init_std": values.get("initializer_range", 0.02),
    }
    config = GPTConfig(**{**shape, **variant.shape})
    if fraction != 1 and not variant.has_partial_rotary:
        raise UserError(f"{where}: partial_rotary_factor={fraction} is not supported: convert a model without it")
    return replace(config, rotary_dim=rotary_dim(config, fraction))


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def write_llama(config: GPTConfig, variant: LlamaVariant) -> dict[str, Any]:
    """The inverse of `read_llama`."""
    values = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_size,
        variant.activation[0]: variant.activation[1][0],
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rope_parameters": write_rope(config),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_std,
        "use_cache": True,
    }
    if variant.has_head_dim:
        values["head_dim"] = config.head_size
    if variant.has_mlp_bias:
        values["mlp_bias"] = config.mlp_bias
    if variant.qkv_bias is None:
        values["attention_bias"] = config.qkv_bias
    if variant.has_partial_rotary:
        values["partial_rotary_factor"] = rotary_fraction(config)
        values["rope_parameters"] = {**write_rope(config), "partial_rotary_factor": rotary_fraction(config)}
    if variant.windows == "always":
        values["sliding_window"] = config.sliding_window
    elif variant.windows == "by layer":
        values |= write_windows(config)
    return {**values, **variant.constants}


def llama_requirements(config: GPTConfig, variant: LlamaVariant) -> Requirements:
    """What this variant of Llama can express, beside what every architecture can."""
    wanted: Requirements = {"mlp": ("swiglu",), "norm": ("rmsnorm",)}
    wanted |= {name: (value,) for name, value in variant.shape.items()}
    if not variant.has_mlp_bias:
        wanted["mlp_bias"] = (False,)
    if variant.qkv_bias is False:
        wanted["qkv_bias"] = (False,)
    if variant.proj_bias is not True:
        wanted["proj_bias"] = (config.qkv_bias if variant.proj_bias is None else False,)
    if not variant.has_head_dim:
        wanted["head_dim"] = (None, config.n_embd // config.n_head)
    if variant.has_partial_rotary:
        wanted["rotary_dim"] = (config.rotary_dim,)
    if not variant.has_rope_scaling:
        wanted["rope_scaling"] = (None,)
    if variant.windows != "never":
        wanted["sliding_window"] = (config.sliding_window,)
    if variant.windows == "by layer":
        wanted["global_layers"] = (config.global_layers,)
    return wanted
