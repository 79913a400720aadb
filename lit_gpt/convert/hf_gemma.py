"""Fields of Gemma 3's `config.json` (the text model's) as a `GPTConfig`, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lit_gpt.convert.hf_config import Requirements, refuse, write_rope
from lit_gpt.convert.hf_llama import LlamaVariant, llama_requirements, read_llama, write_llama
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig

VARIANT = LlamaVariant(
    head_dim=256,
    windows="by layer",
    tied=True,
    activation=("hidden_activation", ("gelu_pytorch_tanh",)),
    shape={
        "mlp": "geglu_tanh",
        "norm_unit_offset": True,
        "block_norm": "both",
        "qk_norm": True,
        "scale_embeddings": True,
    },
)
_THETA, _LOCAL_THETA, _SCALAR, _PATTERN = 1_000_000.0, 10_000.0, 256, 6  # transformers' defaults
_MAX_LAYERS = 10_000
_LEAST_SCALE = 1e-4


def read_gemma3(values: dict[str, Any], where: str) -> GPTConfig:
    """Gemma 3's fields as a config; `where` names the file in errors."""
    refuse(values, where, "attn_logit_softcapping")
    refuse(values, where, "use_bidirectional_attention", False)
    values, local_theta = _with_one_rope(values, where)
    values = {**values, "layer_types": values.get("layer_types") or _layer_types(values, where)}
    config = read_llama(values, where, VARIANT)
    scalar = values.get("query_pre_attn_scalar") or _SCALAR
    return replace(
        config,
        rope_local_theta=None if config.sliding_window is None else local_theta,
        attn_scale=None if scalar == config.head_size else scalar**-0.5,
        logit_softcap=values.get("final_logit_softcapping"),
    )


def _with_one_rope(values: dict[str, Any], where: str) -> tuple[dict[str, Any], float]:
    """The fields with the rotary frequencies of the layers without a window, and the base of those with one."""
    by_kind = values.get("rope_parameters") or {}
    if by_kind and not ("full_attention" in by_kind or "sliding_attention" in by_kind):
        raise UserError(f"{where}: rope_parameters without full_attention is not supported: get it again")
    whole, local = by_kind.get("full_attention") or {}, by_kind.get("sliding_attention") or {}
    refuse(local, f"{where}: sliding_attention", "rope_type", "default")
    theta = whole.get("rope_theta") or values.get("rope_theta") or _THETA
    local_theta = local.get("rope_theta") or values.get("rope_local_base_freq") or _LOCAL_THETA
    scaling = {**whole, **(values.get("rope_scaling") or {}), "rope_theta": theta}
    return {**values, "rope_parameters": scaling, "rope_scaling": None}, float(local_theta)


def _layer_types(values: dict[str, Any], where: str) -> list[str]:
    """Every sixth layer sees the whole context, where the config has no list."""
    n_layer, pattern = values["num_hidden_layers"], values.get("sliding_window_pattern") or _PATTERN
    if n_layer is None or not 0 < n_layer <= _MAX_LAYERS or pattern < 1:
        raise UserError(f"{where}: num_hidden_layers={n_layer} in a pattern of {pattern} is no model's: get it again")
    return ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(n_layer)]


def write_gemma3(config: GPTConfig) -> dict[str, Any]:
    """The inverse of `read_gemma3`."""
    local_theta = config.rope_local_theta or config.rope_theta
    return {
        **write_llama(config, VARIANT),
        "sliding_window": config.sliding_window or config.block_size,
        "rope_local_base_freq": local_theta,
        "rope_parameters": {
            "full_attention": write_rope(config),
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
        "query_pre_attn_scalar": _scalar(config),
        "final_logit_softcapping": config.logit_softcap,
        "attn_logit_softcapping": None,
    }


def _scalar(config: GPTConfig) -> int:
    """The whole number whose inverse root multiplies the scores."""
    return config.head_size if config.attn_scale is None else round(max(config.attn_scale, _LEAST_SCALE) ** -2)


def gemma3_requirements(config: GPTConfig) -> Requirements:
    """What Gemma 3 can express, beside what every architecture can."""
    is_scaled_there = config.sliding_window is not None and config.rope_local_theta is None
    return {
        **llama_requirements(config, VARIANT),
        "rope_local_theta": (config.rope_local_theta,),
        "rope_scaling": (None,) if is_scaled_there else (config.rope_scaling,),  # layers with a window are not scaled
        "attn_scale": (None, max(1, _scalar(config)) ** -0.5),
        "logit_softcap": (config.logit_softcap,),
    }
