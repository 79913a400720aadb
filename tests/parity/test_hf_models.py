"""Each Hugging Face family, made tiny and random by transformers itself, against our conversion of it, both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.convert.recognise import load_source, open_source
from lit_gpt.convert.write import write_hf, write_lit_gpt
from lit_gpt.errors import UserError
from lit_gpt.model.gpt import GPT

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

V, T = 97, 48
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
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
}


def make(folder: Path, family: str, values: dict[str, Any], **save: Any) -> Any:
    """A random model of transformers, saved by it; away from the initial zeros, which would hide a missing bias."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**values)
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, **save)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(1))


def greedy(model: GPT, idx: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        idx = torch.cat([idx, model(idx).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """hf → lit_gpt → hf → lit_gpt: equal logits, equal greedy ids in float64, and every bit back."""
    family, values = FAMILIES[name]
    reference = make(tmp_path / "hf", family, values)
    idx = tokens()
    model, tokenizer = load_source(str(tmp_path / "hf"))
    assert tokenizer is None
    assert distance(model(idx).logits, reference(idx).logits) < 1e-5

    prompt = idx[:1, :8]
    wanted = reference.double().generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False, pad_token_id=0
    )
    assert torch.equal(greedy(model.double(), prompt, 32), wanted)

    ours = open_source(str(tmp_path / "hf"))
    write_lit_gpt(ours, tmp_path / "a.ckpt")
    write_hf(open_source(str(tmp_path / "a.ckpt")), tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float64).eval()
    assert type(again) is type(reference)
    assert distance(again(idx).logits, reference(idx).logits) < 1e-12
    returned = again.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False, pad_token_id=0
    )
    assert torch.equal(returned, wanted)

    back = open_source(str(tmp_path / "again"))
    assert back.config == ours.config
    assert back.weights.keys() == ours.weights.keys()
    for key, stored in ours.weights.items():
        assert torch.equal(stored.read(), back.weights[key].read()), key
    write_lit_gpt(back, tmp_path / "b.ckpt")
    assert torch.load(tmp_path / "a.ckpt")["state_dict"].keys() == torch.load(tmp_path / "b.ckpt")["state_dict"].keys()


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


REFUSED = {
    "model_type": ("Llama", {"model_type": "gemma2"}, "model_type 'gemma2'"),
    "yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
    "old yarn": (
        "Llama",
        {"rope_parameters": None, "rope_scaling": {"type": "yarn"}},
        "rope_scaling of rope_type 'yarn'",
    ),
    "window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": None},
        "sliding_window=8",
    ),
    "some windows": (
        "Qwen3",
        {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
        "sliding_window=8",
    ),
    "activation": ("Llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "gpt2 activation": ("GPT2", {"activation_function": "silu"}, "activation_function='silu'"),
    "inverse layers": ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    "quantised": ("Llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
    "partial": ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "lacking": ("Llama", {"vocab_size": None}, "vocab_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_expressed_is_refused_by_its_field(case: str, tmp_path: Path) -> None:
    family, change, message = REFUSED[case]
    make(tmp_path, family, GPT2 if family == "GPT2" else LLAMA)
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
    tensors = load_file(file)
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
