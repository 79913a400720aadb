"""The table of Hugging Face architectures: each config of ours has one, and a new one is one entry."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from lit_gpt.convert.hf_architectures import ARCHITECTURES, read_config, tensor_plan, write_config
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig

ROPE = GPTConfig(
    vocab_size=50, block_size=16, n_layer=2, n_head=4, n_embd=32, mlp="swiglu", norm="rmsnorm", position="rope"
)


def test_one_architecture_suits_each_config_and_mistral_none() -> None:
    flags = (False, True)
    for qk_norm, qkv_bias, proj_bias, position in itertools.product(flags, flags, flags, ("rope", "learned")):
        config = replace(ROPE, qk_norm=qk_norm, qkv_bias=qkv_bias, proj_bias=proj_bias, position=position)  # type: ignore[arg-type]
        suited = [name for name, architecture in ARCHITECTURES.items() if architecture.suits(config)]
        if position != "rope":
            assert suited == ["gpt2"]
        elif qk_norm:
            assert suited == ["qwen3"]
        else:
            assert suited == (["qwen2"] if qkv_bias and not proj_bias else ["llama"])


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "mistral"])
def test_a_config_that_an_architecture_writes_is_read_back(name: str) -> None:
    plain = GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=4, n_embd=32)
    bare = replace(ROPE, qkv_bias=False, proj_bias=False, mlp_bias=False)
    config = {
        "gpt2": plain,
        "llama": bare,
        "qwen2": replace(bare, qkv_bias=True),
        "qwen3": replace(bare, qk_norm=True, head_dim=16),
    }[name]
    values = write_config(config, "x")
    assert (values["model_type"], values["architectures"]) == (name, [ARCHITECTURES[name].class_name])
    again = read_config(values, "x")
    assert (again.kv_heads, again.head_size, again.mlp_size) == (config.kv_heads, config.head_size, config.mlp_size)
    assert (again.qkv_bias, again.qk_norm, again.mlp) == (config.qkv_bias, config.qk_norm, config.mlp)


def test_a_new_architecture_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {ours: f"net.{theirs}" for ours, theirs in ARCHITECTURES["gpt2"].tensors.items()}
    config = GPTConfig(vocab_size=50, block_size=16, n_layer=1, n_head=4, n_embd=32)
    new = replace(ARCHITECTURES["gpt2"], class_name="NewForCausalLM", tensors=table, transposed=frozenset())
    monkeypatch.setitem(ARCHITECTURES, "new", new)
    monkeypatch.setitem(ARCHITECTURES, "gpt2", replace(ARCHITECTURES["gpt2"], suits=lambda config: False))
    values = write_config(config, "x")
    assert values["model_type"] == "new" and read_config(values, "x").n_embd == 32
    plan = {entry.ours: entry for entry in tensor_plan("new", config)}
    assert plan["wte.weight"].theirs == ("net.transformer.wte.weight",)
    assert not plan["h.0.attn.c_attn.weight"].transposed
    with pytest.raises(UserError, match='did you mean "new"'):
        read_config({"model_type": "neww"}, "x")
