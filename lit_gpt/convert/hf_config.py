"""Fields of transformers' `config.json` as a `GPTConfig`, and back: what several architectures share, and GPT-2.

What a config asks for and this project does not do is refused by its field's name, never ignored. Which architecture
uses which of these functions is the table in `hf_architectures.py`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from lit_gpt.convert.schema import COUNT, NUMBER, SWITCH, TEXT
from lit_gpt.errors import UserError, brief
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.config_checks import check_count

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
    *("sliding_window", "max_window_layers", "sliding_window_pattern"),
)
_NUMBERS = (
    *("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps", "resid_pdrop", "attn_pdrop"),
    *("attention_dropout", "hidden_dropout"),
    *("initializer_range", "rope_theta", "rope_local_base_freq", "rotary_emb_base", "rotary_pct"),
    *("partial_rotary_factor", "query_pre_attn_scalar", "final_logit_softcapping"),
)
_SWITCHES = (*("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_parallel_residual"),)
SCHEMA = {
    **dict.fromkeys(_COUNTS, COUNT),
    **dict.fromkeys(_NUMBERS, NUMBER),
    **dict.fromkeys(_SWITCHES, SWITCH),
    **dict.fromkeys(("model_type", "activation_function", "hidden_act", "hidden_activation"), TEXT),
    "layer_types": ([str], None),
    "rope_parameters": ({**_ROPE, "full_attention": (_ROPE, None), "sliding_attention": (_ROPE, None)}, None),
    "rope_scaling": (_ROPE, None),
    "eos_token_id": (int, [int], None),
}
"""Types of the fields that are read; which of them an architecture needs is in its function."""
Requirements = dict[str, tuple[Any, ...]]
"""Field of `GPTConfig` → the values that an architecture can express."""
FEATURES: dict[str, Any] = {
    "norm_unit_offset": False,
    "block_norm": "pre",
    "parallel_residual": False,
    "rotary_dim": None,
    "rope_local_theta": None,
    "sliding_window": None,
    "global_layers": None,
    "qk_norm": False,
    "qk_norm_full": False,
    "attn_scale": None,
    "head_bias": False,
    "scale_embeddings": False,
    "logit_softcap": None,
}
"""Fields of `GPTConfig` that change what is computed and that most architectures lack → the value without them."""
Windows = Literal["never", "always", "by layer"]
"""Whether the layers of an architecture can have a sliding window: none, all or some of them."""
_FULL, _SLIDING = "full_attention", "sliding_attention"
_MAX_LAYERS = 10_000
_QWEN_WINDOW_LAYERS = 28
"""transformers' default for `max_window_layers`, the first layer with a window."""


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
    dropout, on_weights = values.get("resid_pdrop", 0.1), values.get("attn_pdrop", values.get("resid_pdrop", 0.1))
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
        dropout=dropout,
        attn_dropout=None if on_weights == dropout else on_weights,
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
        "attn_pdrop": config.attention_dropout,
        "initializer_range": config.init_std,
    }


def gpt2_requirements(config: GPTConfig) -> Requirements:
    """What GPT-2 can express, beside what every architecture can."""
    return {
        "position": ("learned",),
        "mlp": tuple(ACTIVATIONS.values()),
        "norm": ("layernorm",),
        "n_kv_head": (None, config.n_head),
        "head_dim": (None, config.n_embd // config.n_head),
    }


def read_windows(values: dict[str, Any], where: str, windows: Windows) -> tuple[int | None, list[int] | None]:
    """`sliding_window` and `global_layers` of a config; several configs name a window that no layer uses.

    Raises:
        UserError: for a window that is used and that the architecture cannot have, or layers of another kind.
    """
    window, layers = values.get("sliding_window"), values.get("layer_types")
    n_layer = values["num_hidden_layers"]
    if window is None:
        return None, None
    check_count("num_hidden_layers", n_layer)
    if n_layer > _MAX_LAYERS:
        raise UserError(f"{where}: num_hidden_layers={n_layer} is no model's: get it again")
    if layers is not None:
        odd = next((kind for kind in layers if kind not in (_FULL, _SLIDING)), None)
        if odd is not None or len(layers) != n_layer:
            found = f"{len(layers)} of them for {n_layer} layers" if odd is None else brief(odd)
            raise UserError(f"{where}: layer_types with {found} is not supported: only {_FULL} and {_SLIDING} are")
        local = [kind == _SLIDING for kind in layers]
    elif windows == "always":
        local = [True] * n_layer
    else:
        first = values.get("max_window_layers")
        first = _QWEN_WINDOW_LAYERS if first is None else first
        local = [bool(values.get("use_sliding_window")) and layer >= first for layer in range(n_layer)]
    if windows == "never" and any(local) and window < (values["max_position_embeddings"] or 0):
        raise UserError(f"{where}: sliding_window={window} is in use and not supported: convert a model without it")
    if windows == "never" or not any(local):
        return None, None
    return window, [i for i in range(n_layer) if not local[i]] or None


def write_windows(config: GPTConfig) -> dict[str, Any]:
    """The inverse of `read_windows`, for an architecture that has them by layer."""
    local = [config.window_of(layer) is not None for layer in range(config.n_layer)]
    values = {
        "use_sliding_window": any(local),
        "sliding_window": config.sliding_window,
        "layer_types": [_SLIDING if is_local else _FULL for is_local in local],
    }
    first = local.index(True) if any(local) else config.n_layer
    if all(local[first:]):
        values["max_window_layers"] = first  # what transformers read before it had layer_types
    return values


def read_rope(values: dict[str, Any], where: str) -> tuple[float, dict[str, Any] | None, float]:
    """Base and scaling of the rotary frequencies, in either form, and the fraction of a head that is turned.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one mapping `rope_parameters`.

    Raises:
        UserError: for a kind of scaling that this project does not do.
    """
    field = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    given = dict(values.get(field) or {})
    refuse(given, f"{where}: {field}", _FULL)
    refuse(given, f"{where}: {field}", _SLIDING)
    theta = given.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    fraction = _fraction(given.pop("partial_rotary_factor", None), values.get("partial_rotary_factor"), where)
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"{where}: {field} of rope_type {brief(kind)} is not supported: default, linear and llama3 are")
    if kind == "default":
        return float(theta), None, fraction
    wanted = ["factor"]
    if kind == "llama3":
        wanted += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [name for name in wanted if given.get(name) is None]
    if missing:
        raise UserError(f"{where}: {field} of rope_type {kind} lacks {', '.join(missing)}: get it again")
    return float(theta), {"rope_type": kind, **{name: given[name] for name in wanted}}, fraction


def _fraction(inner: float | None, outer: float | None, where: str) -> float:
    fraction = inner if inner is not None else 1.0 if outer is None else outer
    if not 0 < fraction <= 1:  # NaN is in no range
        raise UserError(f"{where}: partial_rotary_factor={fraction} is not in (0, 1]: get it again")
    return float(fraction)


def rotary_dim(config: GPTConfig, fraction: float) -> int | None:
    """The number of dimensions of a head that `fraction` of it is, as transformers rounds it; None for all."""
    return None if fraction == 1 else int(config.head_size * fraction)


def rotary_fraction(config: GPTConfig) -> float:
    """The inverse of `rotary_dim`: the fraction must not fall short by the last bit."""
    fraction = config.rotary_size / config.head_size
    return fraction if int(config.head_size * fraction) == config.rotary_size else math.nextafter(fraction, 1.0)


def write_rope(config: GPTConfig) -> dict[str, Any]:
    """Base and scaling in the form of transformers 5."""
    return {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
