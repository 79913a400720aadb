"""`lit_gpt info --by part`, `--shapes`, `--names source`: against sums by hand, a forward pass, written files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_config
from torch import nn

from lit_gpt.__main__ import main
from lit_gpt.insight.info.describe import tensors_of
from lit_gpt.insight.info.parts import count_parts
from lit_gpt.insight.info.shapes import walk_shapes
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT

SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": False, "head_bias": True, "position": "sinusoidal", "mlp": "relu"},
    {"position": "rope", "n_kv_head": 2, "mlp": "swiglu", "norm": "rmsnorm", "qk_norm": True, "dropout": 0.1},
    {"position": "rope", "rotary_dim": 4, "parallel_residual": True, "n_layer": 3},
    {"position": "rope", "norm": "rmsnorm", "block_norm": "both", "mlp": "geglu_tanh", "sliding_window": 4},
    {"position": "rope", "norm": "rmsnorm", "block_norm": "post", "qk_norm": True, "qk_norm_full": True},
]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["info", "--format", "json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_count_of_llms_from_scratch(capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of its chapter 4."""
    assert main(["info", "--preset", "llms-from-scratch-124m", "--by", "part"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for figures in (
        "token embedding │ 50,257 × 768",
        "38,597,376",
        "786,432",
        "2,360,064 + 4,722,432 + 3,072",
        "12 × 7,085,568",
        "1,536",
        "163,009,536",
        "163,009,536 − 38,597,376 = 124,412,160",
    ):
        assert figures in text
    assert main(["info", "--preset", "gpt2", "--by", "part"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "124,439,808 + 38,597,376 = 163,037,184" in text and "│ head" not in text


@pytest.mark.parametrize("shape", SHAPES)
def test_the_parts_are_the_whole(shape: dict[str, Any]) -> None:
    config = tiny_config(**shape)
    count, model = count_parts(config, tensors_of(config)), GPT(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.per_block == sum(parameter.numel() for parameter in model.h[0].parameters())
    for part in (*count.before, *count.block, *count.after):
        products = [term.split(" × ") for term in part.sum.split(" + ")]
        assert part.count == sum(torch.Size(int(x.replace(",", "")) for x in term).numel() for term in products)
    assert count.tied == (config.vocab_rows * config.n_embd if config.tie_embeddings else 0)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_shapes_are_those_of_a_forward_pass_with_numbers(shape: dict[str, Any]) -> None:
    config = tiny_config(**shape)
    model, seen = GPT(config).eval(), {}

    def hook(name: str) -> Any:
        return lambda module, inputs, output: seen.update({name: (tuple(inputs[0].shape), tuple(output.shape))})

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)):
            module.register_forward_hook(hook(name))
    model(torch.zeros(3, 7, dtype=torch.long))
    steps = walk_shapes(config, 3, 7)
    walked = {step.name: (step.before, step.after) for step in steps}
    assert seen.items() <= walked.items()
    products = [step for step in steps if "softmax" in step.name]
    assert [step.name.split(":")[0] for step in products] == [f"h.{layer}.attn" for layer in range(config.n_layer)]
    assert {step.before for step in products} == {(3, config.n_head, 7, config.head_size)}
    assert steps[-1].name == "lm_head" and steps[-1].after == (3, 7, config.vocab_rows)


@pytest.mark.slow
def test_the_way_of_a_batch_through_gpt2(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--preset", "llms-from-scratch-124m", "--shapes", "--batch_size", "2", "--context", "4")
    steps = {step["name"]: (step["before"], step["after"]) for step in printed(capsys, *words)["shapes"]}
    assert steps["wte"] == ([2, 4], [2, 4, 768])
    assert steps["h.0.mlp.c_fc"] == ([2, 4, 768], [2, 4, 3072])
    assert steps["h.11.mlp.c_proj"] == ([2, 4, 3072], [2, 4, 768])
    assert steps["lm_head"] == ([2, 4, 768], [2, 4, 50257])
    assert main(["info", *words]) == 0
    text = capsys.readouterr().out
    assert "h.1 … h.11" in text and "(2, 12, 4, 64)" in text and "(2, 4, 50,257)" in text


@pytest.mark.slow
def test_a_model_of_any_size_has_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    steps = printed(capsys, "--preset", "gpt2-xl", "--shapes")["shapes"]
    assert steps[-1]["after"] == [8, 1024, 50257]


def save_book(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of the transformer book, whose names and shapes are its own."""
    width, heads, layers, vocabulary = 80, 4, 2, 70
    block = {
        **{f"mha.heads.{head}.W{part}.weight": (width // heads, width) for head in range(heads) for part in "qkv"},
        "mha.projection_layer.weight": (width, width),
        "mha.projection_layer.bias": (width,),
        **{f"ln{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")},
        **{"ffn.ffn.0.weight": (4 * width, width), "ffn.ffn.0.bias": (4 * width,)},
        **{"ffn.ffn.2.weight": (width, 4 * width), "ffn.ffn.2.bias": (width,)},
    }
    shapes = {
        "token_embedding_lookup_table.weight": (vocabulary, width),
        **{f"transformer_blocks.{i}.{name}": shape for i in range(layers) for name, shape in block.items()},
        **{f"transformer_blocks.{layers}.{kind}": (width,) for kind in ("weight", "bias")},
        "model_out_linear_layer.weight": (vocabulary, width),
        "model_out_linear_layer.bias": (vocabulary,),
    }
    state = {name: torch.randn(*shape) for name, shape in shapes.items()}
    values = {"context_length": 16, "d_model": width, "num_blocks": layers, "num_heads": heads}
    torch.save({"model_state_dict": state, "h_params": values | {"max_token_value": vocabulary}}, path)
    return state


def test_the_names_of_the_transformer_book(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_gpt.convert.textbooks.named_tokenizer", lambda name, size: None)  # its file may be absent
    monkeypatch.setenv("COLUMNS", "200")
    state = save_book(tmp_path / "model.ckpt")
    words = ("--init_from", str(tmp_path / "model.ckpt"), "--names", "source")
    tensors = printed(capsys, *words)["source_tensors"]
    assert {tensor["name"]: tuple(tensor["shape"]) for tensor in tensors} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    assert sum(tensor["count"] for tensor in tensors) == sum(tensor.numel() for tensor in state.values())
    assert main(["info", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "transformer_blocks.0.mha.heads.1.Wq.weight" in line)
    assert "[20, 80]" in line and "1,600" in line and "h.0.attn.c_attn.weight (rows 20 to 39)" in line


def test_the_names_of_gpt2_at_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=70, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    tensors = printed(capsys, "--init_from", str(tmp_path), "--names", "source")["source_tensors"]
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert {tensor["name"]: tensor["shape"] for tensor in tensors} == expected
    ours = {tensor["name"]: tensor["ours"] for tensor in tensors}
    assert ours["transformer.h.1.attn.c_attn.weight"] == "h.1.attn.c_attn.weight (transposed)"


def test_a_checkpoint_of_ours_has_one_set_of_names(capsys: pytest.CaptureFixture[str]) -> None:
    fixture = Path(__file__).parent.parent / "fixtures" / "gpt2.ckpt"
    tensors = printed(capsys, "--init_from", str(fixture), "--names", "source")["source_tensors"]
    assert tensors and all(tensor["name"] == tensor["ours"] for tensor in tensors)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--preset", "gpt2", "--by", "parts"), "by 'parts' is unknown: did you mean \"part\"?"),
        (("--preset", "gpt2", "--names", "theirs"), "names 'theirs' is unknown: "),
        (("--preset", "gpt2", "--names", "source"), "--names source is for --init_from: leave it out"),
        (("--preset", "gpt2", "--shapes", "--context", "2000"), "context"),
    ],
)
def test_bad_input(words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", *words]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error


def test_the_count_needs_no_table_of_positions() -> None:
    config = GPTConfig.from_preset("nano", vocab_size=4096)
    assert [part.name for part in count_parts(config, tensors_of(config)).before] == ["token embedding"]
