"""Fields of GPT-NeoX's `config.json`, which Pythia's models have, as a `GPTConfig`, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lit_gpt.convert.hf_config import (
    ACTIVATIONS,
    Requirements,
    read_rope,
    refuse,
    rotary_dim,
    rotary_fraction,
    write_rope,
)
from lit_gpt.model.config import GPTConfig

_FRACTION = 0.25  # transformers' default


def read_gpt_neox(values: dict[str, Any], where: str) -> GPTConfig:
    """GPT-NeoX's fields as a config; `where` names the file in errors."""
    refuse(values, where, "hidden_act", *ACTIVATIONS)
    fraction = values.get("rotary_pct")
    names = {
        "rope_theta": values.get("rotary_emb_base") or values.get("rope_theta"),
        "partial_rotary_factor": _FRACTION if fraction is None else fraction,
    }
    theta, scaling, fraction = read_rope({**values, **names}, where)
    has_bias = values.get("attention_bias", True) is not False
    config = GPTConfig(
        vocab_size=values["vocab_size"],
        block_size=values["max_position_embeddings"],
        n_layer=values["num_hidden_layers"],
        n_head=values["num_attention_heads"],
        n_embd=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        mlp=ACTIVATIONS[values.get("hidden_act") or "gelu"],  # type: ignore[arg-type]
        norm_eps=values.get("layer_norm_eps", 1e-5),
        parallel_residual=values.get("use_parallel_residual", True) is not False,
        position="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=has_bias,
        proj_bias=has_bias,
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        dropout=values.get("hidden_dropout") or 0.0,
        init_std=values.get("initializer_range", 0.02),
    )
    return replace(config, rotary_dim=rotary_dim(config, fraction))


def write_gpt_neox(config: GPTConfig) -> dict[str, Any]:
    """The inverse of `read_gpt_neox`."""
    fraction = rotary_fraction(config)
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_size,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.mlp),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "rotary_pct": fraction,
        "rotary_emb_base": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rope_parameters": {**write_rope(config), "partial_rotary_factor": fraction},
        "attention_bias": config.qkv_bias or config.proj_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_std,
    }


def gpt_neox_requirements(config: GPTConfig) -> Requirements:
    """What GPT-NeoX can express, beside what every architecture can."""
    return {
        "norm": ("layernorm",),
        "mlp": tuple(ACTIVATIONS.values()),
        "n_kv_head": (None, config.n_head),
        "head_dim": (None, config.n_embd // config.n_head),
        "rotary_dim": (config.rotary_dim,),
        "parallel_residual": (config.parallel_residual,),
    }
