"""The table of Hugging Face architectures: each config of ours has one, and a new one is one entry."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from fuzzing import changed, fuzz
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.convert.hf_architectures import ARCHITECTURES, HINTS, read_config, tensor_plan, write_config
from lit_gpt.convert.hf_config import FEATURES, rotary_dim, rotary_fraction
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig

ROPE = GPTConfig(
    vocab_size=50, block_size=16, n_layer=2, n_head=4, n_embd=32, mlp="swiglu", norm="rmsnorm", position="rope"
)


BARE = replace(ROPE, qkv_bias=False, proj_bias=False, mlp_bias=False)
CONFIGS = {
    "gpt2": GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=4, n_embd=32),
    "gpt_neox": replace(ROPE, norm="layernorm", mlp="gelu", rotary_dim=2, parallel_residual=True),
    "gemma3_text": replace(
        BARE,
        mlp="geglu_tanh",
        norm_unit_offset=True,
        block_norm="both",
        qk_norm=True,
        scale_embeddings=True,
        sliding_window=4,
        global_layers=[1],
        rope_theta=1e6,
        rope_local_theta=1e4,
        attn_scale=168**-0.5,
        logit_softcap=30.0,
    ),
    "olmo2": replace(BARE, block_norm="post", qk_norm=True, qk_norm_full=True, n_kv_head=2),
    "qwen3": replace(BARE, qk_norm=True, head_dim=16),
    "qwen2": replace(BARE, qkv_bias=True, sliding_window=4, global_layers=[0]),
    "phi3": replace(BARE, rotary_dim=6, sliding_window=4),
    "mistral": replace(BARE, sliding_window=4, head_dim=16),
    "llama": BARE,
}
OTHER_VALUES: dict[str, Any] = {
    "norm_unit_offset": True,
    "block_norm": "both",
    "parallel_residual": True,
    "rotary_dim": 4,
    "rope_local_theta": 500.0,
    "sliding_window": 8,
    "global_layers": [1],
    "qk_norm": True,
    "qk_norm_full": True,
    "attn_scale": 0.123,
    "head_bias": True,
    "scale_embeddings": True,
    "logit_softcap": 3.0,
}


def test_the_first_architecture_that_suits_has_what_tells_it_from_the_others() -> None:
    flags = (False, True)
    for qk_norm, qkv_bias, proj_bias, position in itertools.product(flags, flags, flags, ("rope", "learned")):
        config = replace(ROPE, qk_norm=qk_norm, qkv_bias=qkv_bias, proj_bias=proj_bias, position=position)  # type: ignore[arg-type]
        suited = next(name for name, architecture in ARCHITECTURES.items() if architecture.suits(config))
        if position != "rope":
            assert suited == "gpt2"
        elif qk_norm:
            assert suited == "qwen3"
        else:
            assert suited == ("qwen2" if qkv_bias and not proj_bias else "llama")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_config_that_an_architecture_writes_is_read_back(name: str) -> None:
    config = CONFIGS[name]
    values = write_config(config, "x")
    assert (values["model_type"], values["architectures"]) == (name, [ARCHITECTURES[name].class_name])
    again = read_config(values, "x")
    assert (again.kv_heads, again.head_size, again.mlp_size) == (config.kv_heads, config.head_size, config.mlp_size)
    assert (again.qkv_bias, again.mlp, again.norm) == (config.qkv_bias, config.mlp, config.norm)
    assert {name: getattr(again, name) for name in FEATURES} == {name: getattr(config, name) for name in FEATURES}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_feature_is_lost_on_the_way_out(name: str) -> None:
    """A feature is in what transformers reads, or the model is refused; it is never a hint that only we read."""
    assert OTHER_VALUES.keys() == FEATURES.keys()
    outcomes = []
    for feature, value in OTHER_VALUES.items():
        try:
            values = write_config(replace(CONFIGS[name], **{feature: value}), "x")
        except UserError as error:
            outcomes.append(str(error))
        else:
            outcomes.append("written")
            assert not FEATURES.keys() & values.get(HINTS, {}).keys(), feature
            assert getattr(read_config(values, "x"), feature) == value
    assert any(feature in message for message in outcomes for feature in OTHER_VALUES)


@pytest.mark.slow
def test_fractions_of_a_head_are_those_that_transformers_rounds_back() -> None:
    for head_dim in range(2, 300, 2):
        for wanted in range(2, head_dim, 2):
            config = replace(BARE, head_dim=head_dim, rotary_dim=wanted)
            assert rotary_dim(config, rotary_fraction(config)) == wanted


def test_a_new_architecture_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {ours: f"net.{theirs}" for ours, theirs in ARCHITECTURES["gpt2"].tensors.items()}
    config = GPTConfig(vocab_size=50, block_size=16, n_layer=1, n_head=4, n_embd=32)
    new = replace(ARCHITECTURES["gpt2"], class_name="NewForCausalLM", tensors=table, transposed=frozenset())
    monkeypatch.setattr("lit_gpt.convert.hf_architectures.ARCHITECTURES", {"new": new, **ARCHITECTURES})
    values = write_config(config, "x")
    assert values["model_type"] == "new" and read_config(values, "x").n_embd == 32
    plan = {entry.ours: entry for entry in tensor_plan("new", config)}
    assert plan["wte.weight"].theirs == ("net.transformer.wte.weight",)
    assert not plan["h.0.attn.c_attn.weight"].transposed
    with pytest.raises(UserError, match='did you mean "new"'):
        read_config({"model_type": "neww"}, "x")


@fuzz
@given(data=st.data(), name=st.sampled_from(sorted(ARCHITECTURES)))
def test_fuzz_values_of_a_config(data: st.DataObject, name: str) -> None:
    values = write_config(CONFIGS[name], "x")
    try:
        read_config(data.draw(changed(values)), "config.json")
    except UserError as error:
        assert "config.json" in str(error) and "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize(("dropout", "on_weights"), [(0.1, None), (0.1, 0.0), (0.0, 0.2)])
def test_gpt2_has_a_dropout_of_attention_weights(dropout: float, on_weights: float | None) -> None:
    config = replace(CONFIGS["gpt2"], dropout=dropout, attn_dropout=on_weights)
    written = write_config(config, "x")
    assert written["attn_pdrop"] == (dropout if on_weights is None else on_weights)
    assert read_config(written, "x") == config
