"""`config.json` of transformers in our words, and back.

GPT-2, and Llama with its relatives that differ in a bias or two. What a config asks for and this project does not do is
refused by its field's name, never ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError, nearest
from lit_gpt.model.config import GPTConfig

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
HINTS = "lit_gpt"
"""A key of our own in `config.json`: what theirs cannot say, such as a bias that is absent and not merely zero."""


@dataclass(frozen=True)
class Family:
    """A model type of transformers in the Llama family.

    Attributes:
        architecture: the class that transformers builds.
        qkv_bias: bias of queries, keys and values; None where `attention_bias` says so.
        proj_bias: bias of the output projection, likewise.
        qk_norm: whether queries and keys are normalised.
        head_dim: the default; None for hidden_size / num_attention_heads.
    """

    architecture: str
    qkv_bias: bool | None = None
    proj_bias: bool | None = None
    qk_norm: bool = False
    head_dim: int | None = None


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, proj_bias=False),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
    "mistral": Family("MistralForCausalLM", qkv_bias=False, proj_bias=False),
}


def read_config(values: dict[str, Any], where: str) -> GPTConfig:
    """`config.json` in our words.

    Raises:
        UserError: naming the field that is missing or asks for what this project does not do.
    """
    model_type = values.get("model_type")
    if model_type != "gpt2" and model_type not in FAMILIES:
        known = ["gpt2", *FAMILIES]
        raise UserError(f"{where}: model_type {model_type!r} is not supported: {nearest(str(model_type), known)}")
    _refuse(values, where, "quantization_config", None)
    try:
        return _gpt2_config(values, where) if model_type == "gpt2" else _llama_config(values, where)
    except KeyError as error:
        raise UserError(f"{where} lacks {error}: get it again") from None


def _refuse(values: dict[str, Any], where: str, field: str, *allowed: Any) -> None:
    """Raise UserError if `field` is there and has none of the `allowed` values."""
    value = values.get(field)
    if value is not None and value not in allowed:
        raise UserError(f"{where}: {field}={value!r} is not supported: convert a model without it")


def _gpt2_config(values: dict[str, Any], where: str) -> GPTConfig:
    _refuse(values, where, "activation_function", *ACTIVATIONS)
    _refuse(values, where, "scale_attn_weights", True)
    _refuse(values, where, "scale_attn_by_inverse_layer_idx", False)
    _refuse(values, where, "add_cross_attention", False)
    return GPTConfig(
        vocab_size=values["vocab_size"],
        block_size=values["n_positions"],
        n_layer=values["n_layer"],
        n_head=values["n_head"],
        n_embd=values["n_embd"],
        intermediate_size=values.get("n_inner"),
        mlp=ACTIVATIONS[values.get("activation_function") or "gelu_new"],  # type: ignore[arg-type]
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=values.get("tie_word_embeddings", True),
        dropout=values.get("resid_pdrop", 0.1),
        init_std=values.get("initializer_range", 0.02),
    )


def _llama_config(values: dict[str, Any], where: str) -> GPTConfig:
    family = FAMILIES[values["model_type"]]
    _refuse(values, where, "hidden_act", "silu", "swish")
    _refuse(values, where, "partial_rotary_factor", 1, 1.0)
    _refuse_sliding_window(values, where)
    bias = bool(values.get("attention_bias", False))
    theta, scaling = read_rope(values, where)
    return GPTConfig(
        vocab_size=values["vocab_size"],
        block_size=values["max_position_embeddings"],
        n_layer=values["num_hidden_layers"],
        n_head=values["num_attention_heads"],
        n_kv_head=values.get("num_key_value_heads"),
        n_embd=values["hidden_size"],
        head_dim=values.get("head_dim") or family.head_dim,
        intermediate_size=values["intermediate_size"],
        mlp="swiglu",
        norm="rmsnorm",
        norm_eps=values.get("rms_norm_eps", 1e-6),
        position="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=family.qk_norm,
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        proj_bias=bias if family.proj_bias is None else family.proj_bias,
        mlp_bias=bool(values.get("mlp_bias", False)),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        dropout=values.get("attention_dropout") or 0.0,
        init_std=values.get("initializer_range", 0.02),
    )


def _refuse_sliding_window(values: dict[str, Any], where: str) -> None:
    """Refuse a window that some layer uses and that is shorter than the context; several configs name one unused."""
    window = values.get("sliding_window")
    if window is None or window >= values["max_position_embeddings"]:
        return
    layers = values.get("layer_types")
    if layers is not None:
        used = "sliding_attention" in layers
    elif values["model_type"] == "mistral":
        used = True
    else:
        first = values.get("max_window_layers", 28)  # transformers' default for Qwen
        used = bool(values.get("use_sliding_window")) and first < values["num_hidden_layers"]
    if used:
        raise UserError(f"{where}: sliding_window={window} is in use and not supported: convert a model without it")


def read_rope(values: dict[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary frequencies, in either form.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one mapping `rope_parameters`.

    Raises:
        UserError: for a kind of scaling that this project does not do.
    """
    field = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    given = dict(values.get(field) or {})
    theta = given.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"{where}: {field} of rope_type {kind!r} is not supported: default, linear and llama3 are")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: {field} with partial_rotary_factor is not supported: convert a model without it")
    if kind == "default":
        return float(theta), None
    wanted = ["factor"]
    if kind == "llama3":
        wanted += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [name for name in wanted if given.get(name) is None]
    if missing:
        raise UserError(f"{where}: {field} of rope_type {kind} lacks {', '.join(missing)}: get it again")
    return float(theta), {"rope_type": kind, **{name: given[name] for name in wanted}}


def write_config(config: GPTConfig, where: str) -> dict[str, Any]:
    """Our config as a `config.json`, the inverse of `read_config`.

    Raises:
        UserError: if no architecture of transformers expresses it, naming the fields.
    """
    config = replace(config, padded_vocab_size=None)  # rows without a meaning, which transformers would sample from
    model_type, faults = _model_type(config)
    if faults:
        raise UserError(
            f"{where}: no Hugging Face architecture that is known here has {', '.join(faults)}; the nearest is "
            f"{model_type}: convert a model of its kind"
        )
    values = _gpt2_values(config) if model_type == "gpt2" else _llama_values(model_type, config)
    again, ours = read_config(values, where).to_dict(), config.to_dict()
    hints = {name: value for name, value in ours.items() if again[name] != value}
    return values | {HINTS: hints} if hints else values


def _model_type(config: GPTConfig) -> tuple[str, list[str]]:
    """The nearest model type, and the fields in which it differs."""
    wanted: dict[str, tuple[Any, ...]] = {"head_bias": (False,), "logit_softcap": (None,)}
    if config.position == "rope":
        model_type = "qwen3" if config.qk_norm else "llama"
        if config.qkv_bias and not config.proj_bias and not config.qk_norm:
            model_type = "qwen2"
        wanted |= {"mlp": ("swiglu",), "norm": ("rmsnorm",)}
        if model_type != "llama":
            wanted["mlp_bias"] = (False,)
        if model_type != "qwen2":
            wanted["proj_bias"] = (config.qkv_bias,)
    else:
        model_type = "gpt2"
        wanted |= {"position": ("learned",), "mlp": tuple(ACTIVATIONS.values()), "norm": ("layernorm",)}
        wanted |= {"qk_norm": (False,), "n_kv_head": (None, config.n_head)}
        wanted["head_dim"] = (None, config.n_embd // config.n_head)
    return model_type, [
        f"{name}={getattr(config, name)!r}" for name, allowed in wanted.items() if getattr(config, name) not in allowed
    ]


def _gpt2_values(config: GPTConfig) -> dict[str, Any]:
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.mlp)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.intermediate_size,
        "activation_function": activation,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "initializer_range": config.init_std,
    }


def _llama_values(model_type: str, config: GPTConfig) -> dict[str, Any]:
    values = {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.n_embd,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rope_parameters": {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.dropout,
        "initializer_range": config.init_std,
        "use_cache": True,
    }
    if model_type == "llama":
        values["mlp_bias"] = config.mlp_bias
    if model_type != "qwen2":
        values["attention_bias"] = config.qkv_bias
    else:
        values["use_sliding_window"] = False
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError if it is missing, damaged or something else."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object: get it again")
    return values
