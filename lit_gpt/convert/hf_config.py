"""Fields of transformers' `config.json` as a `GPTConfig`, and back: GPT-2, and Llama with its relatives.

What a config asks for and this project does not do is refused by its field's name, never ignored. Which architecture
uses which of these functions is the table in `hf_architectures.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_gpt.convert.schema import COUNT, NUMBER, SWITCH, TEXT
from lit_gpt.errors import UserError, brief
from lit_gpt.model.config import GPTConfig

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
_ROPE = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": NUMBER,
    "factor": NUMBER,
    "low_freq_factor": NUMBER,
    "high_freq_factor": NUMBER,
    "original_max_position_embeddings": NUMBER,
    "partial_rotary_factor": NUMBER,
}
_COUNTS = (
    *("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "n_inner", "max_position_embeddings", "head_dim"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"),
    *("sliding_window", "max_window_layers"),
)
_NUMBERS = (
    *("layer_norm_epsilon", "rms_norm_eps", "resid_pdrop", "attention_dropout", "initializer_range", "rope_theta"),
    "partial_rotary_factor",
)
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
SCHEMA = {
    **dict.fromkeys(_COUNTS, COUNT),
    **dict.fromkeys(_NUMBERS, NUMBER),
    **dict.fromkeys(_SWITCHES, SWITCH),
    **dict.fromkeys(("model_type", "activation_function", "hidden_act"), TEXT),
    "layer_types": ([str], None),
    "rope_parameters": (_ROPE, None),
    "rope_scaling": (_ROPE, None),
    "eos_token_id": (int, [int], None),
}
"""Types of the fields that are read; which of them an architecture needs is in its function."""
Requirements = dict[str, tuple[Any, ...]]
"""Field of `GPTConfig` → the values that an architecture can express."""


@dataclass(frozen=True)
class LlamaVariant:
    """How a model type of the Llama family differs from the others.

    Attributes:
        qkv_bias: bias of queries, keys and values; None where `attention_bias` says so.
        proj_bias: bias of the output projection, likewise.
        qk_norm: whether queries and keys are normalised.
        has_mlp_bias: whether `mlp_bias` is a field of its config.
        head_dim: the default; None for hidden_size / num_attention_heads.
        always_slides: whether a `sliding_window` holds for every layer, unless `layer_types` says otherwise.
        constants: fields that are always written with this value.
    """

    qkv_bias: bool | None = None
    proj_bias: bool | None = None
    qk_norm: bool = False
    has_mlp_bias: bool = False
    head_dim: int | None = None
    always_slides: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)


def refuse(values: dict[str, Any], where: str, field: str, *allowed: Any) -> None:
    """Raise UserError if `field` is there and has none of the `allowed` values."""
    value = values.get(field)
    if value is not None and value not in allowed:
        raise UserError(f"{where}: {field}={brief(value)} is not supported: convert a model without it")


def read_gpt2(values: dict[str, Any], where: str) -> GPTConfig:
    """GPT-2's fields as a config; `where` names the file in errors."""
    refuse(values, where, "activation_function", *ACTIVATIONS)
    refuse(values, where, "scale_attn_weights", True)
    refuse(values, where, "scale_attn_by_inverse_layer_idx", False)
    refuse(values, where, "add_cross_attention", False)
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


def write_gpt2(config: GPTConfig) -> dict[str, Any]:
    """The inverse of `read_gpt2`."""
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.mlp)
    return {
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


def gpt2_requirements(config: GPTConfig) -> Requirements:
    """What GPT-2 can express, beside what every architecture can."""
    return {
        "position": ("learned",),
        "mlp": tuple(ACTIVATIONS.values()),
        "norm": ("layernorm",),
        "qk_norm": (False,),
        "n_kv_head": (None, config.n_head),
        "head_dim": (None, config.n_embd // config.n_head),
    }


def read_llama(values: dict[str, Any], where: str, variant: LlamaVariant) -> GPTConfig:
    """The fields of Llama or a relative as a config; `where` names the file in errors."""
    refuse(values, where, "hidden_act", "silu", "swish")
    refuse(values, where, "partial_rotary_factor", 1, 1.0)
    _refuse_sliding_window(values, where, variant)
    bias = bool(values.get("attention_bias", False))
    theta, scaling = _read_rope(values, where)
    return GPTConfig(
        vocab_size=values["vocab_size"],
        block_size=values["max_position_embeddings"],
        n_layer=values["num_hidden_layers"],
        n_head=values["num_attention_heads"],
        n_kv_head=values.get("num_key_value_heads"),
        n_embd=values["hidden_size"],
        head_dim=values.get("head_dim") or variant.head_dim,
        intermediate_size=values["intermediate_size"],
        mlp="swiglu",
        norm="rmsnorm",
        norm_eps=values.get("rms_norm_eps", 1e-6),
        position="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=variant.qk_norm,
        qkv_bias=bias if variant.qkv_bias is None else variant.qkv_bias,
        proj_bias=bias if variant.proj_bias is None else variant.proj_bias,
        mlp_bias=bool(values.get("mlp_bias", False)),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        dropout=values.get("attention_dropout") or 0.0,
        init_std=values.get("initializer_range", 0.02),
    )


def _refuse_sliding_window(values: dict[str, Any], where: str, variant: LlamaVariant) -> None:
    """Refuse a window that some layer uses and that is shorter than the context; several configs name one unused."""
    window = values.get("sliding_window")
    if window is None or window >= values["max_position_embeddings"]:
        return
    layers = values.get("layer_types")
    if layers is not None:
        used = "sliding_attention" in layers
    elif variant.always_slides:
        used = True
    else:
        first = values.get("max_window_layers", 28)  # transformers' default for Qwen
        used = bool(values.get("use_sliding_window")) and first < values["num_hidden_layers"]
    if used:
        raise UserError(f"{where}: sliding_window={window} is in use and not supported: convert a model without it")


def _read_rope(values: dict[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
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
        raise UserError(f"{where}: {field} of rope_type {brief(kind)} is not supported: default, linear and llama3 are")
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


def write_llama(config: GPTConfig, variant: LlamaVariant) -> dict[str, Any]:
    """The inverse of `read_llama`."""
    values = {
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
    if variant.has_mlp_bias:
        values["mlp_bias"] = config.mlp_bias
    if variant.qkv_bias is None:
        values["attention_bias"] = config.qkv_bias
    return {**values, **variant.constants}


def llama_requirements(config: GPTConfig, variant: LlamaVariant) -> Requirements:
    """What this variant of Llama can express, beside what every architecture can."""
    wanted: Requirements = {"mlp": ("swiglu",), "norm": ("rmsnorm",)}
    if not variant.has_mlp_bias:
        wanted["mlp_bias"] = (False,)
    if variant.proj_bias is None:
        wanted["proj_bias"] = (config.qkv_bias,)
    return wanted
