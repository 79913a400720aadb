"""Greedy and beam search against transformers' `generate`, on tiny random GPT-2 and Llama models in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lit_gpt.generation.complete import complete
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT

V, BLOCK, EOS = 97, 256, 5
PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2]]
WIDTH = max(map(len, PROMPTS))


def sharpen(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)


def gpt2() -> tuple[Any, GPT]:
    theirs = (
        GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=BLOCK, n_embd=32, n_layer=2, n_head=4)).eval().double()
    )
    sharpen(theirs)
    ours = GPT(GPTConfig(vocab_size=V, block_size=BLOCK, n_embd=32, n_layer=2, n_head=4)).eval().double()
    weights = {}
    for name, value in theirs.state_dict().items():
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))  # their Conv1D
        weights[name.removeprefix("transformer.")] = value.T if transposed else value
    ours.load_state_dict(weights)
    return theirs, ours


def llama() -> tuple[Any, GPT]:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=V, intermediate_size=48, max_position_embeddings=BLOCK, rms_norm_eps=1e-5, **shape)
    theirs = LlamaForCausalLM(config).eval().double()
    sharpen(theirs)
    plain = dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias", "tie_embeddings"), False)
    ours = GPT(
        GPTConfig(
            vocab_size=V, block_size=BLOCK, n_layer=2, n_embd=32, n_head=4, n_kv_head=2, intermediate_size=48,
            position="rope", norm="rmsnorm", mlp="swiglu", **plain,
        )
    )  # fmt: skip
    given = theirs.state_dict()
    names = {
        "ln_1.weight": "input_layernorm.weight",
        "ln_2.weight": "post_attention_layernorm.weight",
        "attn.c_proj.weight": "self_attn.o_proj.weight",
        "mlp.c_gate.weight": "mlp.gate_proj.weight",
        "mlp.c_fc.weight": "mlp.up_proj.weight",
        "mlp.c_proj.weight": "mlp.down_proj.weight",
    }
    weights = {
        "wte.weight": given["model.embed_tokens.weight"],
        "ln_f.weight": given["model.norm.weight"],
        "lm_head.weight": given["lm_head.weight"],
    }
    for i in range(2):
        layer = f"model.layers.{i}."
        weights |= {f"h.{i}.{mine}": given[layer + its] for mine, its in names.items()}
        parts = [given[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"]
        weights[f"h.{i}.attn.c_attn.weight"] = torch.cat(parts)
    ours = ours.eval().double()
    ours.load_state_dict(weights)
    return theirs, ours


MODELS = {"gpt2": gpt2, "llama": llama}


def exact_rope(theirs: Any, ours: GPT) -> None:
    """Both keep their rotary tables in fp32, ours from frequencies in float64: give both the same one."""
    if ours.rope is not None:
        frequency = theirs.model.rotary_emb.inv_freq.double()
        angle = torch.arange(BLOCK, dtype=torch.float32)[:, None] * frequency.float()
        ours.rope.table = torch.stack([angle.cos(), angle.sin()], dim=1).double()


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, GPT]:
    theirs, ours = MODELS[request.param]()
    exact_rope(theirs, ours)
    return theirs, ours


def run(model: GPT, prompts: list[list[int]], **settings: Any) -> list[Any]:
    results = dict(complete(Engine(model, model.config, max_slots=24), prompts, GenerationConfig(**settings)))
    return [results[i] for i in range(len(prompts))]


@torch.no_grad()
def generate(model: Any, prompts: list[list[int]], **settings: Any) -> Any:
    """What they write after all prompts at once, each behind copies of its first id, which are masked.

    An id of the prompt, since a penalty is for all that stands there, masked or not.
    """
    return model.generate(
        torch.tensor([[prompt[0]] * (WIDTH - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (WIDTH - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        do_sample=False,
        pad_token_id=EOS,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_ids_are_identical_for_200_tokens(pair: tuple[Any, GPT], penalty: float) -> None:
    theirs, ours = pair
    prompts = PROMPTS[1:]
    results = run(ours, prompts, strategy="greedy", max_new_tokens=200, repetition_penalty=penalty)
    expected = generate(theirs, prompts, max_new_tokens=200, eos_token_id=None, num_beams=1, repetition_penalty=penalty)
    assert [one.ids for (one,) in results] == expected.sequences[:, WIDTH:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("num_beams", "length_penalty"), [(2, 1.0), (5, -1.0), (5, 0.0), (5, 2.0)])
def test_beam_search_results_and_scores_are_identical(
    pair: tuple[Any, GPT], num_beams: int, length_penalty: float
) -> None:
    theirs, ours = pair
    settings = {"num_beams": num_beams, "length_penalty": length_penalty, "max_new_tokens": 24}
    results = run(ours, PROMPTS, strategy="beam", num_samples=num_beams, stop_token_ids=[EOS], **settings)
    expected = generate(
        theirs, PROMPTS, eos_token_id=EOS, early_stopping="never", num_return_sequences=num_beams, **settings
    )
    completions = [one for of_prompt in results for one in of_prompt]
    assert len(completions) == len(expected.sequences) == 3 * num_beams
    for one, ids, score in zip(completions, expected.sequences, expected.sequences_scores):
        assert one.ids == trimmed(ids[WIDTH:].tolist())
        assert one.score == pytest.approx(score.item(), rel=1e-5)


def trimmed(ids: list[int]) -> list[int]:
    """Without what they pad with after the end."""
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids
