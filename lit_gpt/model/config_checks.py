"""Checks of single values of a `GPTConfig`: each error is one line that names the field, its value and the remedy."""

from __future__ import annotations

from typing import Any

from lit_gpt.errors import UserError, brief, nearest

_MAX_COUNT = 1 << 31
_ROPE_SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kind of scaling → the numbers that it needs."""


def name_of(value: object) -> str:
    """A value as errors quote a name: the start of a text, a short description of anything else."""
    return value[:80] if isinstance(value, str) else brief(value)


def check_count(name: str, value: Any) -> None:
    """Raise UserError for what is no whole number from 1 to 2³¹ - 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}={brief(value)} must be a whole number of at least 1")
    if value >= _MAX_COUNT:
        raise UserError(f"{name}={brief(value)} is too large: choose a number below {_MAX_COUNT}")


def check_number(name: str, value: Any) -> None:
    """Raise UserError for what is no number, is not finite, or is too large."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not -_MAX_COUNT < value < _MAX_COUNT:  # NaN is in no range
        raise UserError(f"{name}={brief(value)} must be a number")


def check_layers(name: str, layers: Any, n_layer: int) -> None:
    """Raise UserError for what is neither None nor a list of layers, each once."""
    if layers is None:
        return
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        raise UserError(f"{name}={brief(layers)} must be a list of layers, such as [5, 11]")
    outside = next((layer for layer in layers if not 0 <= layer < n_layer), None)
    if outside is not None:
        raise UserError(f"{name} has the layer {brief(outside)}, but n_layer={n_layer}: choose from 0 to {n_layer - 1}")
    if len(set(layers)) < len(layers):
        raise UserError(f"{name}={brief(layers)} names a layer twice: give each once")


def check_rope_scaling(scaling: Any) -> None:
    """Raise UserError for what is neither None nor a mapping with `rope_type` and its numbers."""
    if scaling is None:
        return
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else scaling
    if not isinstance(kind, str) or kind not in _ROPE_SCALING:
        raise UserError(f"rope_scaling of rope_type {brief(kind)} is not supported: use {' or '.join(_ROPE_SCALING)}")
    known = {"rope_type", *_ROPE_SCALING["llama3"]}
    missing = [name for name in _ROPE_SCALING[kind] if name not in scaling]
    if missing:
        raise UserError(f"rope_scaling of rope_type {kind} lacks {', '.join(sorted(missing))}")
    for name, value in scaling.items():
        if name not in known:
            raise UserError(f'unknown key "{name_of(name)}" in rope_scaling: {nearest(name_of(name), known)}')
        if name == "rope_type":
            continue
        check_number(f"rope_scaling.{name}", value)
        if value <= 0:
            raise UserError(f"rope_scaling.{name}={value} must be positive")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise UserError(
            f"rope_scaling.high_freq_factor={scaling['high_freq_factor']} must be above "
            f"low_freq_factor={scaling['low_freq_factor']}"
        )
