"""The Hugging Face architectures that are converted: the names of their tensors and the fields of their config.

To add one, add an entry to `ARCHITECTURES`, with a table of tensor names and functions that read and write its
`config.json`, if none of those here will do. docs/families.md says what was checked of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lit_gpt.convert.hf_config import (
    FEATURES,
    SCHEMA,
    Requirements,
    gpt2_requirements,
    read_gpt2,
    refuse,
    write_gpt2,
)
from lit_gpt.convert.hf_gemma import gemma3_requirements, read_gemma3, write_gemma3
from lit_gpt.convert.hf_gpt_neox import gpt_neox_requirements, read_gpt_neox, write_gpt_neox
from lit_gpt.convert.hf_llama import LlamaVariant, llama_requirements, read_llama, write_llama
from lit_gpt.convert.schema import check_schema
from lit_gpt.convert.weights import NameTable, Part, TensorEntry, tensor_entries
from lit_gpt.errors import UserError, brief, nearest
from lit_gpt.model.config import GPTConfig

GPT2_TABLE: NameTable = {
    "wte": "transformer.wte",
    "wpe": "transformer.wpe",
    "h.{}.ln_1": "transformer.h.{}.ln_1",
    "h.{}.attn.c_attn": "transformer.h.{}.attn.c_attn",
    "h.{}.attn.c_proj": "transformer.h.{}.attn.c_proj",
    "h.{}.ln_2": "transformer.h.{}.ln_2",
    "h.{}.mlp.c_fc": "transformer.h.{}.mlp.c_fc",
    "h.{}.mlp.c_proj": "transformer.h.{}.mlp.c_proj",
    "ln_f": "transformer.ln_f",
    "lm_head": "lm_head",
}
LLAMA_TABLE: NameTable = {
    "wte": "model.embed_tokens",
    "h.{}.ln_1": "model.layers.{}.input_layernorm",
    "h.{}.attn.c_attn": tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    "h.{}.attn.c_proj": "model.layers.{}.self_attn.o_proj",
    "h.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "h.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "h.{}.ln_2": "model.layers.{}.post_attention_layernorm",
    "h.{}.mlp.c_fc": "model.layers.{}.mlp.up_proj",
    "h.{}.mlp.c_gate": "model.layers.{}.mlp.gate_proj",
    "h.{}.mlp.c_proj": "model.layers.{}.mlp.down_proj",
    "ln_f": "model.norm",
    "lm_head": "lm_head",
}
PHI3_TABLE: NameTable = {
    **LLAMA_TABLE,
    "h.{}.attn.c_attn": "model.layers.{}.self_attn.qkv_proj",
    "h.{}.mlp.c_gate": Part("model.layers.{}.mlp.gate_up_proj", 0, 2),
    "h.{}.mlp.c_fc": Part("model.layers.{}.mlp.gate_up_proj", 1, 2),
}
OLMO2_TABLE: NameTable = {
    **LLAMA_TABLE,
    "h.{}.ln_1_post": "model.layers.{}.post_attention_layernorm",
    "h.{}.ln_2_post": "model.layers.{}.post_feedforward_layernorm",
}
GEMMA3_TABLE: NameTable = {
    **OLMO2_TABLE,
    "h.{}.ln_2": "model.layers.{}.pre_feedforward_layernorm",
}
GPT_NEOX_TABLE: NameTable = {
    "wte": "gpt_neox.embed_in",
    "h.{}.ln_1": "gpt_neox.layers.{}.input_layernorm",
    "h.{}.attn.c_attn": "gpt_neox.layers.{}.attention.query_key_value",
    "h.{}.attn.c_proj": "gpt_neox.layers.{}.attention.dense",
    "h.{}.ln_2": "gpt_neox.layers.{}.post_attention_layernorm",
    "h.{}.mlp.c_fc": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "h.{}.mlp.c_proj": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "ln_f": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}
CONV1D = frozenset({"h.{}.attn.c_attn", "h.{}.attn.c_proj", "h.{}.mlp.c_fc", "h.{}.mlp.c_proj"})
"""GPT-2's `Conv1D` keeps its weight as (in, out), `nn.Linear` as (out, in)."""
HINTS = "lit_gpt"
"""A key of our own in `config.json`: what theirs cannot say, such as a bias that is absent and not merely zero."""


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers.

    Attributes:
        class_name: the class that transformers builds.
        tensors: our modules → theirs.
        read: `config.json` and how errors name it → our config.
        write: our config → the fields of `config.json`.
        suits: whether a model of ours with this config, which no entry above suits, is written as this architecture.
        requirements: the values that fields of ours must have then, or the model is refused.
        transposed: modules of ours whose weight is stored as (in, out).
        by_head: modules of ours whose queries, keys and values are stored head by head.
        base_prefix: of names which a checkpoint that was saved without its head lacks.
        other_names: other names of tensors, which some files have → those in the table.
    """

    class_name: str
    tensors: NameTable
    read: Callable[[dict[str, Any], str], GPTConfig]
    write: Callable[[GPTConfig], dict[str, Any]]
    suits: Callable[[GPTConfig], bool]
    requirements: Callable[[GPTConfig], Requirements]
    transposed: frozenset[str] = frozenset()
    by_head: frozenset[str] = frozenset()
    base_prefix: str = ""
    other_names: Mapping[str, str] = field(default_factory=dict)


def _llama_like(
    class_name: str,
    suits: Callable[[GPTConfig], bool],
    variant: LlamaVariant,
    tensors: NameTable = LLAMA_TABLE,
) -> Architecture:
    return Architecture(
        class_name,
        tensors,
        read=partial(read_llama, variant=variant),
        write=partial(write_llama, variant=variant),
        suits=suits,
        requirements=partial(llama_requirements, variant=variant),
    )


ARCHITECTURES = {
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        GPT2_TABLE,
        read_gpt2,
        write_gpt2,
        suits=lambda config: config.position != "rope",
        requirements=gpt2_requirements,
        transposed=CONV1D,
        base_prefix="transformer.",
    ),
    "gpt_neox": Architecture(
        "GPTNeoXForCausalLM",
        GPT_NEOX_TABLE,
        read_gpt_neox,
        write_gpt_neox,
        suits=lambda config: config.norm == "layernorm",
        requirements=gpt_neox_requirements,
        by_head=frozenset({"h.{}.attn.c_attn"}),
        other_names={"lm_head.weight": "embed_out.weight"},
    ),
    "gemma3_text": Architecture(
        "Gemma3ForCausalLM",
        GEMMA3_TABLE,
        read_gemma3,
        write_gemma3,
        suits=lambda config: config.norm_unit_offset,
        requirements=gemma3_requirements,
    ),
    "olmo2": _llama_like(
        "Olmo2ForCausalLM",
        lambda config: config.block_norm == "post",
        LlamaVariant(has_head_dim=False, shape={"block_norm": "post", "qk_norm": True, "qk_norm_full": True}),
        OLMO2_TABLE,
    ),
    "qwen3": _llama_like(
        "Qwen3ForCausalLM",
        lambda config: config.qk_norm,
        LlamaVariant(head_dim=128, windows="by layer", shape={"qk_norm": True}),
    ),
    "qwen2": _llama_like(
        "Qwen2ForCausalLM",
        lambda config: config.qkv_bias and not config.proj_bias,
        LlamaVariant(qkv_bias=True, proj_bias=False, windows="by layer"),
    ),
    "phi3": _llama_like(
        "Phi3ForCausalLM",
        lambda config: config.rotary_dim is not None,  # with all dimensions turned it is a Mistral or a Llama
        LlamaVariant(
            qkv_bias=False,
            proj_bias=False,
            has_head_dim=False,
            windows="always",
            has_partial_rotary=True,
            has_rope_scaling=False,
        ),
        PHI3_TABLE,
    ),
    "mistral": _llama_like(
        "MistralForCausalLM",
        lambda config: config.sliding_window is not None,  # without a window it is a Llama
        LlamaVariant(qkv_bias=False, proj_bias=False, windows="always"),
    ),
    "llama": _llama_like("LlamaForCausalLM", lambda config: True, LlamaVariant(has_mlp_bias=True)),
}
"""`model_type` in `config.json` → architecture."""


def read_config(values: dict[str, Any], where: str) -> GPTConfig:
    """`config.json` as a config of ours.

    Raises:
        UserError: naming the field that is missing or asks for what this project does not do.
    """
    check_schema(values, SCHEMA, where)
    model_type = values.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"{where}: model_type {brief(model_type)} is not supported: {nearest(str(model_type)[:80], ARCHITECTURES)}"
        )
    refuse(values, where, "quantization_config", None)
    try:
        return ARCHITECTURES[model_type].read(values, where)
    except KeyError as error:
        raise UserError(f"{where} lacks {error}: get it again") from None
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(where) else f"{where}: {message}") from None


def write_config(config: GPTConfig, where: str) -> dict[str, Any]:
    """Our config as a `config.json`, the inverse of `read_config`.

    Raises:
        UserError: if no architecture of transformers expresses it, naming the fields.
    """
    config = replace(config, padded_vocab_size=None)  # rows without a meaning, which transformers would sample from
    model_type, architecture = next(item for item in ARCHITECTURES.items() if item[1].suits(config))
    wanted: Requirements = {name: (value,) for name, value in FEATURES.items()} | architecture.requirements(config)
    faults = [
        f"{name}={getattr(config, name)!r}" for name, allowed in wanted.items() if getattr(config, name) not in allowed
    ]
    if faults:
        raise UserError(
            f"{where}: no Hugging Face architecture that is known here has {', '.join(faults)}; the nearest is "
            f"{model_type}: convert a model of its kind"
        )
    # Without a pad_token_id transformers has its own, such as Phi-3's 32000, which must be in the vocabulary.
    base = {"architectures": [architecture.class_name], "model_type": model_type, "pad_token_id": None}
    values = {**base, **architecture.write(config)}
    again, ours = read_config(values, where).to_dict(), config.to_dict()
    hints = {name: value for name, value in ours.items() if again[name] != value}
    return values | {HINTS: hints} if hints else values


def tensor_plan(model_type: str, config: GPTConfig) -> list[TensorEntry]:
    """Where each tensor of a model of this shape is in a folder of `model_type`."""
    architecture = ARCHITECTURES[model_type]
    return list(tensor_entries(config, architecture.tensors, architecture.transposed, architecture.by_head))
