"""Each Hugging Face family, made tiny and random by transformers itself, against our conversion of it, both ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.convert.recognise import load_source, open_source
from lit_gpt.convert.write import write_hf, write_lit_gpt
from lit_gpt.errors import UserError
from lit_gpt.inference.prepare import prepare_for_inference
from lit_gpt.model.kv_cache import KVCache

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

V, T = 97, 24
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {
    "vocab_size": V,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
PHI3 = {**LLAMA, "pad_token_id": None, "original_max_position_embeddings": 64}
HALF_ROTARY = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
GPT_NEOX = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
GEMMA3 = {
    **LLAMA,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied": ("GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "relu"}),
    "llama 3": ("Llama", LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama 3.1": ("Llama", LLAMA | {"rope_parameters": LLAMA3_ROPE}),
    "llama 3.2": ("Llama", LLAMA | {"rope_parameters": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True}),
    "llama linear": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, "attention_bias": True},
    ),
    "smollm2": ("Llama", LLAMA | {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2.5": ("Qwen2", LLAMA | {"tie_word_embeddings": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen2 windows": ("Qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
    "llama 2": ("Llama", LLAMA | {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "tinyllama": ("Llama", LLAMA | {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
    "mistral 0.1": ("Mistral", LLAMA | {"sliding_window": 8, "head_dim": 16}),
    "mistral 0.3": ("Mistral", LLAMA | {"sliding_window": None, "rope_parameters": {"rope_theta": 1e6}}),
    "phi 3 mini": ("Phi3", PHI3 | {"sliding_window": 7, "num_key_value_heads": 4}),
    "phi 4 mini": ("Phi3", PHI3 | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "olmo 2": ("Olmo2", LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "olmo 2 multi-head": ("Olmo2", LLAMA | {"num_key_value_heads": None, "attention_bias": True}),
    "pythia": ("GPTNeoX", GPT_NEOX),
    "gpt neox sequential": (
        "GPTNeoX",
        GPT_NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_new", "rope_parameters": HALF_ROTARY},
    ),
    "gemma 3 1b": ("Gemma3Text", GEMMA3),
    "gemma 3 long": (
        "Gemma3Text",
        GEMMA3
        | {
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 20.0,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
}
COMES_BACK_AS = {"mistral 0.3": "Llama", "phi 3 mini": "Mistral"}
"""Families without a feature of their own are written as the simplest that has what they have."""


def make(folder: Path, family: str, values: dict[str, Any], **save: Any) -> Any:
    """A random model of transformers, saved by it; away from the initial zeros, which would hide a missing bias."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**values)
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family.removesuffix('Text')}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, **save)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(1))


def assert_greedy(model: Any, prompt: torch.Tensor, written: torch.Tensor) -> None:
    """What the model would write: each token is the likeliest after all before it, which one pass tells."""
    start = prompt.shape[1]
    assert torch.equal(written[:, :start], prompt) and written.shape[1] == T
    assert torch.equal(model(written[:, :-1]).logits[:, start - 1 :].argmax(-1), written[:, start:])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """hf → lit_gpt → hf: equal logits, equal greedy ids in float64, and every bit back."""
    family, values = FAMILIES[name]
    reference = make(tmp_path / "hf", family, values)
    idx = tokens()
    model, tokenizer = load_source(str(tmp_path / "hf"))
    assert tokenizer is None
    assert distance(model(idx).logits, reference(idx).logits) < 1e-5

    prompt = idx[:1, :8]
    wanted = reference.double().generate(
        prompt, attention_mask=torch.ones_like(prompt), max_length=T, do_sample=False, pad_token_id=0
    )
    assert_greedy(model.double(), prompt, wanted)

    ours = open_source(str(tmp_path / "hf"))
    write_lit_gpt(ours, tmp_path / "a.ckpt")
    write_hf(open_source(str(tmp_path / "a.ckpt")), tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float64).eval()
    wanted_class = f"{COMES_BACK_AS[name]}ForCausalLM" if name in COMES_BACK_AS else type(reference).__name__
    assert type(again).__name__ == wanted_class
    loaded = type(reference).from_pretrained(tmp_path / "hf", dtype=torch.float64).eval()  # constants in float64 too
    assert distance(again(idx).logits, loaded(idx).logits) < 1e-12
    assert_greedy(again, prompt, wanted)

    back = open_source(str(tmp_path / "again"))
    assert back.config == ours.config
    assert back.weights.keys() == ours.weights.keys()
    for key, stored in ours.weights.items():
        assert torch.equal(stored.read(), back.weights[key].read()), key


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_cached_ragged_and_prepared(name: str, tmp_path: Path) -> None:
    """Prompts of different lengths read in one padded step, then token by token, past every window; fp32 throughout."""
    family, values = FAMILIES[name]
    reference = make(tmp_path, family, values)
    idx = tokens()
    expected = reference(idx).logits
    for prepare in (False, True):
        model, _ = load_source(str(tmp_path))
        if prepare:
            prepare_for_inference(model, "fp32")
        cache = KVCache(model.config, 3, T, model.cache_dtype)
        slots, lengths = [2, 0], [5, 13]
        padded = idx[:, : max(lengths)].clone()
        padded[0, lengths[0] :] = 3
        got = model(padded, cache=cache.step(slots, max(lengths))).logits
        cache.extend(slots, lengths)
        for row, length in enumerate(lengths):
            assert distance(got[row, :length], expected[row, :length]) < 1e-5
        while max(lengths) < T:
            fed = torch.stack([idx[row, length] for row, length in enumerate(lengths)])[:, None]
            got = model(fed, cache=cache.step(slots, 1)).logits
            cache.extend(slots, 1)
            for row, length in enumerate(lengths):
                assert distance(got[row, 0], expected[row, length]) < 1e-5
            lengths = [length + 1 for length in lengths]


@torch.no_grad()
def test_a_pythia_as_it_is_on_the_hub(tmp_path: Path) -> None:
    """With masks and frequencies beside the weights, and the config's names of transformers 4."""
    from safetensors.torch import load_file, save_file

    reference = make(tmp_path, "GPTNeoX", GPT_NEOX)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # safetensors 0.5 maps the file
    for layer in range(2):
        prefix = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{prefix}.bias"] = torch.tril(torch.ones(1, 1, 64, 64))
        tensors[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(1)
    for old, new in (("lm_head.weight", "embed_out.weight"), ("embed_out.weight", "lm_head.weight")):
        renamed = {new if name == old else name: tensor for name, tensor in tensors.items()}
        save_file(renamed, file, {"format": "pt"})
        edited({"rope_parameters": None, "rotary_pct": 0.25, "rotary_emb_base": 10000})(tmp_path)
        assert distance(load_source(str(tmp_path))[0](tokens()).logits, reference(tokens()).logits) < 1e-5


@torch.no_grad()
def test_a_gemma_as_it_is_on_the_hub(tmp_path: Path) -> None:
    """The config's names of transformers 4: a pattern instead of a list, two bases, and no word of tied weights."""
    reference = make(tmp_path, "Gemma3Text", GEMMA3 | {"num_hidden_layers": 6, "layer_types": None})
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("layer_types", "rope_parameters", "tie_word_embeddings"):
        values.pop(name, None)
    old = {"sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(values | old))
    model, _ = load_source(str(tmp_path))
    assert model.config.global_layers == [5] and model.config.tie_embeddings
    assert distance(model(tokens()).logits, reference(tokens()).logits) < 1e-5


def test_both_forms_of_the_rotary_config(tmp_path: Path) -> None:
    """transformers 4 wrote `rope_theta` and `rope_scaling` (with `type` before that), 5 writes `rope_parameters`."""
    make(tmp_path, "Llama", LLAMA | {"rope_parameters": LLAMA3_ROPE})
    new = open_source(str(tmp_path)).config
    assert new.rope_theta == 500000.0
    for key in ("rope_type", "type"):
        values = json.loads((tmp_path / "config.json").read_text())
        values.pop("rope_parameters", None)
        scaling = {k: v for k, v in LLAMA3_ROPE.items() if k not in ("rope_theta", "rope_type")}
        values |= {"rope_theta": 500000.0, "rope_scaling": {**scaling, key: "llama3"}}
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert open_source(str(tmp_path)).config == new


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own shards are read, and ours are read by transformers."""
    reference = make(tmp_path / "hf", "Llama", LLAMA, max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    source = open_source(str(tmp_path / "hf"))
    assert distance(source.load()(tokens()).logits, reference(tokens()).logits) < 1e-5
    monkeypatch.setattr("lit_gpt.convert.write.SHARD_BYTES", 20_000)
    write_hf(source, tmp_path / "again")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(tokens()).logits, reference(tokens()).logits)


def test_the_hubs_gpt2_has_masks_and_no_prefix(tmp_path: Path) -> None:
    """The files on the hub hold `attn.bias` buffers, and were saved without the head."""
    from safetensors.torch import load_file, save_file

    reference = make(tmp_path, "GPT2", GPT2)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, 64, 64))
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file, {"format": "pt"})
    assert distance(load_source(str(tmp_path))[0](tokens()).logits, reference(tokens()).logits) < 1e-5


def test_half_precision_is_kept_or_changed(tmp_path: Path) -> None:
    make(tmp_path / "hf", "Qwen2", LLAMA)
    single = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    single.save_pretrained(tmp_path / "half")
    kept, _ = load_source(str(tmp_path / "half"))
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert distance(kept(tokens()).logits.float(), single(tokens()).logits.float()) < 3e-2
    widened, _ = load_source(str(tmp_path / "half"), dtype="float32")
    assert {p.dtype for p in widened.parameters()} == {torch.float32}
    write_hf(open_source(str(tmp_path / "half")), tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")  # before v5: float32
    assert again.dtype == torch.bfloat16 and torch.equal(again(tokens()).logits, single(tokens()).logits)


def edited(change: dict[str, Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(values))

    return edit


TINY = {"GPT2": GPT2, "GPTNeoX": GPT_NEOX, "Gemma3Text": GEMMA3, "Phi3": PHI3}
REFUSED = {
    "model_type": ("Llama", {"model_type": "gemma2"}, "model_type 'gemma2'"),
    "yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
    "old yarn": (
        "Llama",
        {"rope_parameters": None, "rope_scaling": {"type": "yarn"}},
        "rope_scaling of rope_type 'yarn'",
    ),
    "window": (
        "Llama",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        "sliding_window=8 is in use",
    ),
    "kinds of layers": (
        "Qwen3",
        {"sliding_window": 8, "layer_types": ["full_attention", "chunked_attention"]},
        "layer_types with 'chunked_attention'",
    ),
    "number of layers": ("Qwen3", {"sliding_window": 8, "layer_types": ["full_attention"]}, "1 of them for 2 layers"),
    "two bases": ("Llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention="),
    "longrope": ("Phi3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
    "soft-cap of scores": ("Gemma3Text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    "both directions": ("Gemma3Text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    "one base for two": ("Gemma3Text", {"rope_parameters": {"rope_type": "default"}}, "without full_attention"),
    "scaled local base": (
        "Gemma3Text",
        {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "rope_type='linear'",
    ),
    "pattern": ("Gemma3Text", {"layer_types": None, "sliding_window_pattern": -1}, "a pattern of -1"),
    "scale": ("Gemma3Text", {"query_pre_attn_scalar": -4}, "attn_scale="),
    "gpt neox activation": ("GPTNeoX", {"hidden_act": "silu"}, "hidden_act='silu'"),
    "rotary fraction": ("GPTNeoX", {"rope_parameters": None, "rotary_pct": 1.5}, "partial_rotary_factor=1.5"),
    "many layers": ("Mistral", {"sliding_window": 8, "num_hidden_layers": 1 << 40}, "num_hidden_layers"),
    "activation": ("Llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "gpt2 activation": ("GPT2", {"activation_function": "silu"}, "activation_function='silu'"),
    "inverse layers": ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    "quantised": ("Llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
    "partial": ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "lacking": ("Llama", {"vocab_size": None}, "vocab_size"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of a family, made once."""

    @cache
    def folder_of(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        make(folder, family, TINY.get(family, LLAMA))
        return folder

    return folder_of


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_expressed_is_refused_by_its_field(case: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    family, change, message = REFUSED[case]
    shutil.copytree(saved(family), tmp_path, dirs_exist_ok=True)
    edited(change)(tmp_path)
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unused_sliding_windows_are_no_hindrance(tmp_path: Path) -> None:
    make(tmp_path, "Qwen2", LLAMA)
    edited({"use_sliding_window": False, "sliding_window": 8, "layer_types": None})(tmp_path)
    assert open_source(str(tmp_path)).config.n_layer == 2


def test_one_error_lists_every_wrong_tensor(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make(tmp_path, "Llama", LLAMA)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # safetensors 0.5 maps the file
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].to(torch.int8)
    tensors["surplus.weight"] = torch.zeros(1)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path))
    for fault in (
        "model.norm.weight is missing",
        "model.layers.1.self_attn.k_proj.weight is missing",
        "model.layers.0.mlp.up_proj.weight is (3, 3), not (48, 32)",
        "model.layers.0.mlp.down_proj.weight is int8",
        "surplus.weight is unexpected",
    ):
        assert fault in str(caught.value)


def test_a_tied_head_that_differs_is_noticed(tmp_path: Path) -> None:
    make(tmp_path, "Llama", LLAMA)
    edited({"tie_word_embeddings": True})(tmp_path)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        open_source(str(tmp_path))
