"""The configuration of a GPT and the named presets. Imports no torch, so that `--help` stays fast."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_gpt.errors import UserError, brief, nearest

Position = Literal["learned", "sinusoidal", "rope"]
Norm = Literal["layernorm", "rmsnorm"]
MLPKind = Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu"]


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2 124M; presets and files only override them.

    Attributes:
        vocab_size: number of token ids (V) that the model can read and write.
        padded_vocab_size: rows of the embedding and head matrices; None for `vocab_size`. The extra rows serve
            the hardware only: their logits never leave the model.
        block_size: the longest context, in tokens.
        n_layer: number of blocks.
        n_head: query heads (H).
        n_kv_head: key and value heads (K); None for `n_head`. Fewer is grouped-query attention (arXiv 2305.13245).
        n_embd: width of the residual stream (C).
        head_dim: width of one head (D); None for `n_embd // n_head`.
        intermediate_size: width of the MLP; None for 4 · `n_embd`, or for SwiGLU, which has a third matrix, for the
            multiple of 32 (a group of int4) that is nearest to 8/3 · `n_embd`: as many weights. That one is filled in.
        mlp: activation of the MLP. `gelu` is exact, `gelu_tanh` GPT-2's approximation, `relu2` its square
            (arXiv 2109.08668), `swiglu` gated (arXiv 2002.05202).
        norm: `layernorm`, or `rmsnorm` (arXiv 1910.07467).
        norm_eps: added to the variance.
        norm_bias: whether LayerNorm has a bias.
        position: `learned` (GPT-2), `sinusoidal` (fixed, arXiv 1706.03762) or `rope` (arXiv 2104.09864, half-split
            as in Llama's published weights).
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, or Hugging Face's mapping with `rope_type` `linear` or `llama3` and its parameters.
        qk_norm: RMSNorm over each head's queries and keys before the rotation (arXiv 2010.04245).
        qkv_bias: bias of `attn.c_attn`.
        proj_bias: bias of `attn.c_proj`.
        mlp_bias: bias of the MLP's matrices.
        head_bias: bias of `lm_head`.
        tie_embeddings: `lm_head` shares its weight with `wte`.
        dropout: probability, on embeddings, attention weights and both residual branches; training only.
        logit_softcap: None, or c in c · tanh(logits / c) (arXiv 2408.00118).
        init_std: standard deviation of the initial weights.
        zero_init_proj: start the residual projections at zero instead of at init_std / √(2 · n_layer).
    """

    vocab_size: int = 50257
    padded_vocab_size: int | None = None
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    n_embd: int = 768
    head_dim: int | None = None
    intermediate_size: int | None = None
    mlp: MLPKind = "gelu_tanh"
    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    position: Position = "learned"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    qk_norm: bool = False
    qkv_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    logit_softcap: float | None = None
    init_std: float = 0.02
    zero_init_proj: bool = False

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: naming the field, its value and the remedy.
        """
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            _check_count(name, getattr(self, name))
        for name in ("n_kv_head", "head_dim", "intermediate_size", "padded_vocab_size"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name, kinds in (("mlp", get_args(MLPKind)), ("norm", get_args(Norm)), ("position", get_args(Position))):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in kinds:
                raise UserError(f"{name}={brief(value)} is unknown: {nearest(_name(value), kinds)}")
        if self.mlp == "swiglu" and self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 32 * max(1, round(self.n_embd / 12)))
        self._check_switches_and_numbers()
        self._check_heads()
        if self.padded_vocab_size is not None and self.padded_vocab_size < self.vocab_size:
            raise UserError(
                f"padded_vocab_size={self.padded_vocab_size} is below vocab_size={self.vocab_size}: raise it"
            )
        _check_rope_scaling(self.rope_scaling)
        table = self.position_table_bytes()
        if table > _MAX_TABLE_BYTES:
            most = self.block_size * _MAX_TABLE_BYTES // table
            raise UserError(
                f"block_size={self.block_size} needs a table of {table / 2**30:.0f} GiB with position={self.position}: "
                f"choose at most {most}"
            )

    def _check_switches_and_numbers(self) -> None:
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}={brief(getattr(self, name))} must be true or false")
        for name in ("norm_eps", "rope_theta", "dropout", "init_std"):
            _check_number(name, getattr(self, name))
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout={self.dropout} is not a probability below 1: choose a value in [0, 1)")
        for name in ("norm_eps", "init_std"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")
        if self.rope_theta <= 0:
            raise UserError(f"rope_theta={self.rope_theta} must be positive: 10000 is usual")
        if self.logit_softcap is not None:
            _check_number("logit_softcap", self.logit_softcap)
            if self.logit_softcap <= 0:
                raise UserError(f"logit_softcap={self.logit_softcap} must be positive: leave it out for none")

    def _check_heads(self) -> None:
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                f"choose n_embd={max(1, self.n_embd // self.n_head) * self.n_head}, another n_head, or set head_dim"
            )
        if self.n_head % self.kv_heads:
            raise UserError(
                f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}: choose a divisor of n_head"
            )
        if self.position == "rope" and self.head_size % 2:
            raise UserError(f"rotary positions turn pairs, but head_dim={self.head_size} is odd: choose an even one")

    @property
    def kv_heads(self) -> int:
        """K, with the default filled in."""
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        """D, with the default filled in."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def mlp_size(self) -> int:
        """Width of the MLP, with the default filled in."""
        return self.intermediate_size or 4 * self.n_embd

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and head matrices."""
        return self.padded_vocab_size or self.vocab_size

    def matmul_weights(self) -> int:
        """Number of weights that a token is multiplied with in a forward pass: the head's included, embeddings not."""
        qkv = self.n_embd * (self.n_head + 2 * self.kv_heads) * self.head_size
        proj = self.n_head * self.head_size * self.n_embd
        mlp = (3 if self.mlp == "swiglu" else 2) * self.n_embd * self.mlp_size
        return self.n_layer * (qkv + proj + mlp) + self.n_embd * self.vocab_rows

    def least_weights(self) -> int:
        """A lower bound of the number of weights that a file of the model holds: its matrices, without biases."""
        learned = self.block_size * self.n_embd if self.position == "learned" else 0
        untied = 0 if self.tie_embeddings else self.n_embd * self.vocab_rows
        return self.matmul_weights() + learned + untied

    def position_table_bytes(self) -> int:
        """Size of the table of positions that is computed, and not among the weights; 0 for learned positions."""
        width = {"learned": 0, "sinusoidal": self.n_embd, "rope": self.head_size}[self.position]
        return 4 * self.block_size * width

    def forward_flops_per_token(self, context: int | None = None) -> float:
        """FLOPs of one token's forward pass at a context of `context` tokens (`block_size` if None).

        Two per weight and 4 · n_layer · H · D · context for the attention, the convention of PaLM (arXiv
        2204.02311, appendix B) and of PyTorch's FlopCounterMode: causality is not discounted. Training costs
        three times as much.
        """
        context = self.block_size if context is None else context
        return 2.0 * self.matmul_weights() + 4.0 * self.n_layer * self.n_head * self.head_size * context

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """The inverse of `to_dict`; a key that is left out has its default.

        Raises:
            UserError: for an unknown key (with the nearest right name) or a wrong value.
        """
        if not isinstance(values, dict):
            raise UserError(f"the model's config is {brief(values)}, no mapping of names to values")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f'unknown model config key "{_name(key)}": {nearest(_name(key), known)}')
        return cls(**values)

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> GPTConfig:
        """A named shape, with single values overridden.

        >>> GPTConfig.from_preset("gpt2", n_layer=2).n_embd
        768

        Raises:
            UserError: for an unknown preset (with the nearest right name), key or value.
        """
        return cls.from_dict({**preset_values(preset), **overrides})


def preset_values(preset: str) -> dict[str, Any]:
    """What `preset` sets, as a new dict. Raises UserError, with the nearest right name, when there is none."""
    if preset not in PRESETS:
        raise UserError(f'unknown preset "{preset}": {nearest(preset, PRESETS)}')
    return dict(PRESETS[preset])


_SWITCHES = (
    "norm_bias",
    "qk_norm",
    "qkv_bias",
    "proj_bias",
    "mlp_bias",
    "head_bias",
    "tie_embeddings",
    "zero_init_proj",
)
_MAX_COUNT = 1 << 31
_MAX_TABLE_BYTES = 1 << 30
_ROPE_SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kind of scaling → the numbers that it needs."""


def _name(value: object) -> str:
    return value[:80] if isinstance(value, str) else brief(value)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}={brief(value)} must be a whole number of at least 1")
    if value >= _MAX_COUNT:
        raise UserError(f"{name}={brief(value)} is too large: choose a number below {_MAX_COUNT}")


def _check_number(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not -_MAX_COUNT < value < _MAX_COUNT:  # NaN is in no range
        raise UserError(f"{name}={brief(value)} must be a number")


def _check_rope_scaling(scaling: Any) -> None:
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
            raise UserError(f'unknown key "{_name(name)}" in rope_scaling: {nearest(_name(name), known)}')
        if name == "rope_type":
            continue
        _check_number(f"rope_scaling.{name}", value)
        if value <= 0:
            raise UserError(f"rope_scaling.{name}={value} must be positive")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise UserError(
            f"rope_scaling.high_freq_factor={scaling['high_freq_factor']} must be above "
            f"low_freq_factor={scaling['low_freq_factor']}"
        )


# The block of Qwen3 (arXiv 2505.09388), which other engines run. Each part has earned its place in an ablation, or costs
# nothing: docs/benchmarks.md
_MODERN: dict[str, Any] = {
    "position": "rope",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "qk_norm": True,
    "qkv_bias": False,
    "proj_bias": False,
    "mlp_bias": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    # Raschka, "Build a Large Language Model (From Scratch)", chapter 4: GPT-2 124M, untied, no QKV bias.
    "llms-from-scratch-124m": {"qkv_bias": False, "tie_embeddings": False},
    "nano": {**_MODERN, "n_layer": 6, "n_head": 4, "n_embd": 256, "block_size": 256},
    "modern-124m": {**_MODERN},
    "modern-350m": {**_MODERN, "n_layer": 24, "n_head": 16, "n_embd": 1024},
    "modern-1.5b": {**_MODERN, "n_layer": 48, "n_head": 25, "n_embd": 1600},
}
