"""The configuration of a GPT and the named presets. Imports no torch, so that `--help` stays fast."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_gpt.errors import UserError, brief, nearest
from lit_gpt.model.config_checks import check_count, check_layers, check_number, check_rope_scaling, name_of

Position = Literal["learned", "sinusoidal", "rope"]
Norm = Literal["layernorm", "rmsnorm"]
MLPKind = Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu", "geglu_tanh"]
BlockNorm = Literal["pre", "post", "both"]
GATED = ("swiglu", "geglu_tanh")
"""Kinds of MLP with a third matrix, whose product goes through the activation and multiplies the first one's."""


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
        intermediate_size: width of the MLP; None for 4 · `n_embd`, or for the gated kinds, which have a third
            matrix, the multiple of 32 (a group of int4) nearest to 8/3 · `n_embd`: as many weights. That is filled in.
        mlp: activation of the MLP. `gelu` is exact, `gelu_tanh` GPT-2's approximation, `relu2` its square
            (arXiv 2109.08668), `swiglu` and `geglu_tanh` gated by SiLU and `gelu_tanh` (arXiv 2002.05202).
        norm: `layernorm`, or `rmsnorm` (arXiv 1910.07467).
        norm_eps: added to the variance.
        norm_bias: whether LayerNorm has a bias.
        norm_unit_offset: RMSNorm multiplies by 1 + weight, in fp32 at least (Gemma, arXiv 2403.08295).
        block_norm: norms of a block: `pre`, before attention and MLP (GPT-2), `post`, of what they return (OLMo 2,
            arXiv 2501.00656), or `both` (Gemma 3, arXiv 2503.19786).
        parallel_residual: the MLP reads what the attention reads, and not its result (GPT-NeoX, arXiv 2204.06745).
        position: `learned` (GPT-2), `sinusoidal` (fixed, arXiv 1706.03762) or `rope` (arXiv 2104.09864, half-split
            as in Llama's published weights).
        rotary_dim: leading dimensions of each head that rotary positions turn; None for all (GPT-NeoX: a quarter).
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, or Hugging Face's mapping with `rope_type` `linear` or `llama3` and its parameters.
        rope_local_theta: their base in the layers with a sliding window, without scaling; None for no other than
            elsewhere (Gemma 3).
        sliding_window: None, or how many tokens a query sees at most, its own included (arXiv 2310.06825).
        global_layers: the layers, from 0, that see the whole context in spite of `sliding_window`; None for none.
        qk_norm: RMSNorm over each head's queries and keys before the rotation (arXiv 2010.04245).
        qk_norm_full: `qk_norm` over all heads at once, with a weight for each of their dimensions (OLMo 2).
        attn_scale: factor of the attention scores; None for 1 / √`head_dim`.
        qkv_bias: bias of `attn.c_attn`.
        proj_bias: bias of `attn.c_proj`.
        mlp_bias: bias of the MLP's matrices.
        head_bias: bias of `lm_head`.
        scale_embeddings: multiply the embeddings of tokens by √`n_embd` (arXiv 1706.03762, Gemma).
        tie_embeddings: `lm_head` shares its weight with `wte`.
        dropout: probability, on embeddings, attention weights and both residual branches; training only.
        attn_dropout: that on attention weights, if it is another: on a CPU it takes most of the time of dropout.
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
    norm_unit_offset: bool = False
    block_norm: BlockNorm = "pre"
    parallel_residual: bool = False
    position: Position = "learned"
    rotary_dim: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_local_theta: float | None = None
    sliding_window: int | None = None
    global_layers: list[int] | None = None
    qk_norm: bool = False
    qk_norm_full: bool = False
    attn_scale: float | None = None
    qkv_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    scale_embeddings: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    attn_dropout: float | None = None
    logit_softcap: float | None = None
    init_std: float = 0.02
    zero_init_proj: bool = False

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: naming the field, its value and the remedy.
        """
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            check_count(name, getattr(self, name))
        for name in _OPTIONAL_COUNTS:
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in kinds:
                raise UserError(f"{name}={brief(value)} is unknown: {nearest(name_of(value), kinds)}")
        if self.mlp in GATED and self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 32 * max(1, round(self.n_embd / 12)))
        self._check_switches_and_numbers()
        self._check_heads()
        self._check_rotary()
        self._check_combinations()
        if self.padded_vocab_size is not None and self.padded_vocab_size < self.vocab_size:
            raise UserError(
                f"padded_vocab_size={self.padded_vocab_size} is below vocab_size={self.vocab_size}: raise it"
            )
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
        for name in ("norm_eps", "rope_theta", "init_std"):
            check_number(name, getattr(self, name))
        for name, value in (("dropout", self.dropout), ("attn_dropout", self.attention_dropout)):
            check_number(name, value)
            if not 0.0 <= value < 1.0:
                raise UserError(f"{name}={value} is not a probability below 1: choose a value in [0, 1)")
        for name in ("norm_eps", "init_std"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")
        if self.rope_theta <= 0:
            raise UserError(f"rope_theta={self.rope_theta} must be positive: 10000 is usual")
        for name in ("logit_softcap", "attn_scale", "rope_local_theta"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value)
                if value <= 0:
                    raise UserError(f"{name}={value} must be positive: leave it out for none")

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

    def _check_rotary(self) -> None:
        check_rope_scaling(self.rope_scaling)
        if self.position == "rope" and self.rotary_size % 2:
            name = "head_dim" if self.rotary_dim is None else "rotary_dim"
            raise UserError(f"rotary positions turn pairs, but {name}={self.rotary_size} is odd: choose an even one")
        if self.rotary_size > self.head_size:
            raise UserError(
                f"rotary_dim={self.rotary_dim} is more than head_dim={self.head_size}: choose at most that many"
            )
        check_layers("global_layers", self.global_layers, self.n_layer)

    def _check_combinations(self) -> None:
        """Refuse a field that has no effect without another: with that one it was meant to go."""
        for name, needed, wanted in _NEEDS:
            if getattr(self, name) not in (None, False) and getattr(self, needed) in (None, False, *wanted):
                remedy = f"set {needed} as well" if not wanted else f"choose another {needed}"
                found = f"{needed}={getattr(self, needed)}"
                raise UserError(f"{name}={getattr(self, name)} has no effect with {found}: {remedy}, or leave it out")

    @property
    def kv_heads(self) -> int:
        """K, with the default filled in."""
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        """D, with the default filled in."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def rotary_size(self) -> int:
        """Dimensions of a head that rotary positions turn, with the default filled in."""
        return self.rotary_dim or self.head_size

    def window_of(self, layer: int) -> int | None:
        """How many tokens a query of this layer sees at most, its own included; None for all."""
        return None if layer in (self.global_layers or ()) else self.sliding_window

    @property
    def mlp_size(self) -> int:
        """Width of the MLP, with the default filled in."""
        return self.intermediate_size or 4 * self.n_embd

    @property
    def attention_dropout(self) -> float:
        """Probability, on attention weights, with the default filled in."""
        return self.dropout if self.attn_dropout is None else self.attn_dropout

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and head matrices."""
        return self.padded_vocab_size or self.vocab_size

    def matmul_weights(self) -> int:
        """Number of weights that a token is multiplied with in a forward pass: the head's included, embeddings not."""
        qkv = self.n_embd * (self.n_head + 2 * self.kv_heads) * self.head_size
        proj = self.n_head * self.head_size * self.n_embd
        mlp = (3 if self.mlp in GATED else 2) * self.n_embd * self.mlp_size
        return self.n_layer * (qkv + proj + mlp) + self.n_embd * self.vocab_rows

    def least_weights(self) -> int:
        """A lower bound of the number of weights that a file of the model holds: its matrices, without biases."""
        learned = self.block_size * self.n_embd if self.position == "learned" else 0
        untied = 0 if self.tie_embeddings else self.n_embd * self.vocab_rows
        return self.matmul_weights() + learned + untied

    def position_table_bytes(self) -> int:
        """Size of the table of positions that is computed, and not among the weights; 0 for learned positions."""
        rotary = self.rotary_size * (1 if self.rope_local_theta is None else 2)
        width = {"learned": 0, "sinusoidal": self.n_embd, "rope": rotary}[self.position]
        return 4 * self.block_size * width

    def forward_flops_per_token(self, context: int | None = None) -> float:
        """FLOPs of one token's forward pass at a context of `context` tokens (`block_size` if None).

        Two per weight and 4 · n_layer · H · D · context for the attention, the convention of PaLM (arXiv
        2204.02311, appendix B) and of PyTorch's FlopCounterMode: neither causality nor a sliding window is
        discounted. Training costs three times as much.
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
                raise UserError(f'unknown model config key "{name_of(key)}": {nearest(name_of(key), known)}')
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
    "norm_unit_offset",
    "parallel_residual",
    "qk_norm",
    "qk_norm_full",
    "qkv_bias",
    "proj_bias",
    "mlp_bias",
    "head_bias",
    "scale_embeddings",
    "tie_embeddings",
    "zero_init_proj",
)
_OPTIONAL_COUNTS = (
    *("n_kv_head", "head_dim", "intermediate_size", "padded_vocab_size", "rotary_dim", "sliding_window"),
)
_KINDS = {
    "mlp": get_args(MLPKind),
    "norm": get_args(Norm),
    "position": get_args(Position),
    "block_norm": get_args(BlockNorm),
}
_NEEDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("norm_unit_offset", "norm", ("layernorm",)),
    ("rotary_dim", "position", ("learned", "sinusoidal")),
    ("rope_local_theta", "position", ("learned", "sinusoidal")),
    ("rope_local_theta", "sliding_window", ()),
    ("global_layers", "sliding_window", ()),
    ("qk_norm_full", "qk_norm", ()),
)
"""A field, another, and the values of that one, beside none, with which the first has no effect."""
_MAX_TABLE_BYTES = 1 << 30

# The block of Qwen3 (arXiv 2505.09388), which other engines run: docs/interop.md. What each part is worth was measured:
# docs/benchmarks.md
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
    # The transformer book's model (github.com/waylandzhang/llm-transformer-book): a matrix of its own for each head's
    # queries, keys and values, which are one here.
    "transformer-book": {
        "position": "sinusoidal",
        "mlp": "relu",
        "qkv_bias": False,
        "head_bias": True,
        "tie_embeddings": False,
        "dropout": 0.1,
        "n_layer": 6,
        "n_head": 4,
        "n_embd": 80,
        "block_size": 128,
        "vocab_size": 100256,  # of cl100k_base, which the book uses; `fit` has that of its data
    },
    "nano": {**_MODERN, "n_layer": 6, "n_head": 4, "n_embd": 256, "block_size": 256},
    "modern-124m": {**_MODERN},
    "modern-350m": {**_MODERN, "n_layer": 24, "n_head": 16, "n_embd": 1024},
    "modern-1.5b": {**_MODERN, "n_layer": 48, "n_head": 25, "n_embd": 1600},
}
