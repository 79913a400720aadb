"""Models as GGUF and back: bit for bit, the same in `gguf`'s own reader and in transformers, whole or not at all."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from environment import RunProgram
from gguf_samples import ARCHITECTURE, LLAMA, LLAMA3_SCALING, SHAPES, sample, sample_source

from lit_gpt import load
from lit_gpt.__main__ import main
from lit_gpt.convert.gguf_architectures import ROPE_FACTORS
from lit_gpt.convert.gguf_write import write_gguf
from lit_gpt.convert.recognise import load_source, open_source
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.convert.weights import StoredTensor
from lit_gpt.convert.write import write_hf, write_lit_gpt
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig

gguf = pytest.importorskip("gguf")


def equal_sources(a: SourceCheckpoint, b: SourceCheckpoint) -> None:
    """Config, tokenizer and every bit of the weights."""
    assert a.config == b.config
    assert (a.tokenizer is None) == (b.tokenizer is None)
    if a.tokenizer is not None and b.tokenizer is not None:
        assert a.tokenizer.to_dict() == b.tokenizer.to_dict()
    assert a.weights.keys() == b.weights.keys()
    for name, stored in a.weights.items():
        assert torch.equal(stored.read(), b.weights[name].read()), name


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_bit_for_bit(shape: str, tmp_path: Path) -> None:
    source = sample_source(tmp_path, shape, "bpe:400" if shape in ("gpt2", "llama") else None)
    write_gguf(source, tmp_path / "model.gguf", "f32")
    back = open_source(str(tmp_path / "model.gguf"))
    assert back.kind == f"GGUF ({ARCHITECTURE[shape]})"
    equal_sources(source, back)
    write_lit_gpt(back, tmp_path / "again.ckpt")
    equal_sources(source, open_source(str(tmp_path / "again.ckpt")))
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_without_what_we_add_the_model_is_the_same(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a file that another program wrote, which has no key of ours."""
    model, _ = sample(shape, None)
    source = sample_source(tmp_path, shape, None)
    if shape == "llama 3.1":  # of which known divisors tell the scaling
        scaling = LLAMA3_SCALING | {"original_max_position_embeddings": 8192}
        source = sample_source(tmp_path, shape, None, rope_scaling=scaling)
        model = source.load()
    with monkeypatch.context() as patched:
        patched.setattr("lit_gpt.convert.gguf_architectures.OUR_CONFIG", "another.program")
        write_gguf(source, tmp_path / "model.gguf")
    back = open_source(str(tmp_path / "model.gguf"))
    assert back.tokenizer is None
    idx = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(back.load()(idx).logits, model(idx).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_packages_own_reader_finds_what_it_should(shape: str, tmp_path: Path) -> None:
    """Names, types and shapes as llama.cpp has them, read by `gguf.GGUFReader`."""
    source = sample_source(tmp_path, shape, None)
    write_gguf(source, tmp_path / "model.gguf", "f16")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURE[shape])
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[architecture]}
    for tensor in reader.tensors:
        bare = tensor.name.rsplit(".", 1)[0]
        assert bare in known or ".".join(["blk", "{bid}", *bare.split(".")[2:]]) in known, tensor.name
        small = len(tensor.shape) == 1 or tensor.name == "position_embd.weight"
        assert tensor.tensor_type.name == ("F32" if small else "F16")
    tied = source.config.tie_embeddings
    assert ("output.weight" in {tensor.name for tensor in reader.tensors}) == (not tied)
    wte = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert list(wte.shape) == [source.config.n_embd, source.config.vocab_size]  # the fastest first
    assert np.array_equal(wte.data, source.weights["wte.weight"].read().half().numpy())
    fields = {key: field.contents() for key, field in reader.fields.items()}
    name = ARCHITECTURE[shape]
    assert fields["general.architecture"] == name and fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert fields[f"{name}.block_count"] == 2 and fields[f"{name}.context_length"] == 48
    if name != "gpt2":
        assert fields[f"{name}.attention.key_length"] == source.config.head_size
        assert fields[f"{name}.rope.dimension_count"] == source.config.head_size


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_transformers_writes_the_same_tokens(shape: str, tmp_path: Path) -> None:
    """Greedy ids of transformers from the file alone but for the config, of which its reader leaves out fields."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers.logging.set_verbosity_error()
    source = sample_source(tmp_path, shape, None)
    (tmp_path / "gguf").mkdir()
    write_gguf(source, tmp_path / "gguf/model.gguf", "f32")
    write_hf(source, tmp_path / "hf")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model.gguf", config=config, dtype=torch.float32
    ).eval()
    ours = source.load()
    idx = torch.randint(0, source.config.vocab_size, (1, 8), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(theirs(idx).logits, ours(idx).logits, rtol=1e-4, atol=1e-4)
    wanted = theirs.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=32, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(ours(wanted[:, :-1]).logits.argmax(-1)[:, 7:], wanted[:, 8:])  # each the likeliest here, too


PROMPTS = [
    *("First Citizen:", "The ", "Once upon a time", "def f(x):", "In 1984, ", "Don't ", "\n\n", "What is 2 + 2?"),
    *("你好", "从前有", "春天来了，", "人工智能是", "今天天气", "北京", "一二三"),
    *("Ελλάδα", "Привет", "こんにちは", "café", "👍🏽"),
]


@pytest.mark.slow
@torch.no_grad()
def test_text_in_transformers_from_the_file_alone_but_for_the_width_of_heads(tmp_path: Path) -> None:
    """Model and tokenizer of one file in transformers: the same 24 tokens as ours after 20 prompts."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers.logging.set_verbosity_error()
    source = sample_source(tmp_path, "qwen3", block_size=128)
    write_gguf(source, tmp_path / "model.gguf", "f32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf")
    config.head_dim = source.config.head_size
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32
    ).eval()
    ours = source.load()
    assert source.tokenizer is not None
    prompts = [source.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert tokenizer(PROMPTS, add_special_tokens=False)["input_ids"] == prompts
    width = max(map(len, prompts))
    wanted = theirs.generate(  # in one batch, each behind a padding that is masked
        torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert wanted.shape[1] == width + 24
    for prompt, ids, row in zip(PROMPTS, prompts, wanted):
        likeliest = ours(row[None, width - len(ids) : -1]).logits.argmax(-1)  # each after all before it
        assert torch.equal(likeliest[0, len(ids) - 1 :], row[width:]), prompt


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_every_type_has_its_size_and_its_values(dtype: str, tmp_path: Path) -> None:
    """The values are those that `gguf` reads from the file; the error is that of the type, and no more."""
    source = sample_source(tmp_path, "qwen3", None)
    write_gguf(source, tmp_path / "model.gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    bytes_of_32 = {"F32": 128, "F16": 64, "BF16": 64, "Q8_0": 34, "Q4_0": 18}
    back = open_source(str(tmp_path / "model.gguf"))
    assert {stored.dtype for stored in back.weights.values()} == {torch.float32}
    end = 0
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        wanted = "F32" if len(tensor.shape) == 1 else dtype.upper()
        if (dtype, tensor.name) == ("q4_0", "token_embd.weight"):
            wanted = "Q8_0"
        assert kind == wanted, tensor.name
        assert tensor.n_bytes == tensor.n_elements * bytes_of_32[kind] // 32
        end = tensor.data_offset + tensor.n_bytes
    assert (tmp_path / "model.gguf").stat().st_size == -(-end // 32) * 32
    for ours, name in (("wte.weight", "token_embd.weight"), ("h.1.mlp.c_proj.weight", "blk.1.ffn_down.weight")):
        tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
        values = back.weights[ours].read()
        assert np.array_equal(values.numpy(), gguf.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape))
        original = source.weights[ours].read()
        largest = original.reshape(-1, 32).abs().amax(-1, keepdim=True).expand(-1, 32).reshape(original.shape)
        step = {"F32": 0, "F16": 2**-10, "BF16": 2**-8, "Q8_0": 0.6 / 127, "Q4_0": 1.01 / 8}[tensor.tensor_type.name]
        assert ((values - original).abs() <= step * largest).all()


@pytest.mark.slow
def test_the_sources_dtype_is_kept_if_none_is_named(tmp_path: Path) -> None:
    source = sample_source(tmp_path, "llama", None)
    for dtype, kind in ((torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(source.to(dtype), path)
        tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.0.attn_v.weight")
        assert tensor.tensor_type.name == kind
        rounded = source.to(dtype).weights["h.0.attn.c_attn.weight"].read()
        assert torch.equal(open_source(str(path)).weights["h.0.attn.c_attn.weight"].read(), rounded.float())
    with pytest.raises(UserError, match=r"64 bits.*--dtype f32"):
        write_gguf(source.to(torch.float64), tmp_path / "F64.gguf")
    with pytest.raises(UserError, match='"q8" is none that GGUF is written in: did you mean "q8_0"'):
        write_gguf(source, tmp_path / "q8.gguf", "q8")


def test_rows_that_are_no_multiple_of_32_stay_in_f16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sample_source(tmp_path, "llama", None, intermediate_size=80)
    write_gguf(source, tmp_path / "model.gguf", "q4_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert (
        "2 tensors stay in f16, since their rows are no multiple of 32: blk.*.ffn_down.weight"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_file_of_the_packages_own_writer_is_read(tmp_path: Path) -> None:
    """Written by `gguf.GGUFWriter`: another alignment, every type of value, tensors in another order."""
    source = sample_source(tmp_path, "llama")
    write_gguf(source, tmp_path / "ours.gguf", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_custom_alignment(128)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"):
        getattr(writer, f"add_{kind}")(f"other.{kind}", 7)
    writer.add_bool("other.bool", True)
    for name, values in {"numbers": [1.5, 2.5], "texts": ["a", "你"], "bools": [True, False]}.items():
        writer.add_array(f"other.{name}", values)
    for tensor in reversed(reader.tensors):
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    equal_sources(open_source(str(tmp_path / "ours.gguf")), open_source(str(tmp_path / "theirs.gguf")))


def test_numbers_that_f16_has_not_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    source = sample_source(tmp_path, "llama", None)
    large = StoredTensor((64,), torch.float32, lambda: torch.full((64,), 1e6))
    weights = source.weights | {
        "h.1.mlp.c_fc.weight": StoredTensor((96, 64), torch.float32, lambda: torch.full((96, 64), 7e4))
    }
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight has numbers above 65504.*--dtype bf16"):
        write_gguf(replace(source, weights=weights), tmp_path / "model.gguf", "f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample.ckpt"]
    write_gguf(replace(source, weights=source.weights | {"ln_f.weight": large}), tmp_path / "model.gguf", "f16")


def test_killed_in_the_middle_nothing_is_left(tmp_path: Path) -> None:
    source = sample_source(tmp_path, "gpt2", None)

    def end() -> torch.Tensor:
        raise KeyboardInterrupt

    name = "h.1.mlp.c_fc.weight"
    broken = replace(source, weights=source.weights | {name: replace(source.weights[name], read=end)})
    with pytest.raises(KeyboardInterrupt):
        write_gguf(broken, tmp_path / "model.gguf", "q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample.ckpt"]
    write_gguf(source, tmp_path / "model.gguf", "q8_0")
    with pytest.raises(UserError, match="exists already"):
        write_gguf(source, tmp_path / "model.gguf", "q8_0")


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    source = sample_source(tmp_path, "qwen3", None)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(stored: StoredTensor) -> StoredTensor:
        def read() -> torch.Tensor:
            nonlocal most
            tensor = stored.read()
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            return tensor

        return replace(stored, read=read)

    watching = replace(source, weights={name: watched(stored) for name, stored in source.weights.items()})
    write_gguf(watching, tmp_path / "model.gguf", "q8_0")
    assert len(alive) >= len(source.weights) and most <= 2


def test_rows_that_only_pad_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    source = sample_source(tmp_path, "gpt2", None, padded_vocab_size=448)
    write_gguf(source, tmp_path / "model.gguf")
    back = open_source(str(tmp_path / "model.gguf"))
    assert back.config == replace(source.config, padded_vocab_size=None)
    assert torch.equal(
        back.weights["wte.weight"].read(), source.weights["wte.weight"].read()[: source.config.vocab_size]
    )


def test_biases_that_were_trained_in_between_are_read(tmp_path: Path) -> None:
    """A file of ours without biases, in which another program has set those that llama.cpp wants."""
    source = sample_source(tmp_path, "gpt2 untied, without biases", None)
    write_gguf(source, tmp_path / "model.gguf")
    tensor = next(
        tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors if tensor.name == "blk.0.attn_qkv.bias"
    )
    start = int(tensor.data_offset)
    del tensor
    with (tmp_path / "model.gguf").open("r+b") as file:
        file.seek(start)
        file.write(np.float32(0.5).tobytes())
    back = open_source(str(tmp_path / "model.gguf"))
    assert back.config.qkv_bias and back.weights["h.0.attn.c_attn.bias"].read()[0] == 0.5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "exact GELU": ({"mlp": "gelu"}, r"llama.cpp's gpt2 cannot have mlp='gelu': write it with --to hf"),
    "ReLU": ({"mlp": "relu"}, "cannot have mlp='relu'"),
    "no Hugging Face architecture": (LLAMA | {"mlp": "gelu", "qk_norm": True}, "mlp='gelu'"),
    "sinusoids": ({"position": "sinusoidal"}, "position='sinusoidal'"),
    "biased Qwen3": (LLAMA | {"qk_norm": True, "qkv_bias": True, "proj_bias": True}, "qwen3 cannot have qkv_bias=True"),
    "wide heads in Qwen2": (LLAMA | {"qkv_bias": True, "head_dim": 32}, "qwen2 cannot have head_dim=32"),
    "a window in Qwen3": (LLAMA | {"qk_norm": True, "sliding_window": 8}, "qwen3 cannot have sliding_window=8"),
    "a window in Qwen2": (LLAMA | {"qkv_bias": True, "sliding_window": 8}, "qwen2 cannot have sliding_window=8"),
    "Llama 3's scaling in Qwen3": (
        LLAMA | {"qk_norm": True, "rope_scaling": LLAMA3_SCALING},
        "qwen3 cannot have rope_scaling=",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused_by_its_name(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    source = sample_source(tmp_path, "gpt2", None, **changes)
    with pytest.raises(UserError, match=message):
        write_gguf(source, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_other_divisors_of_frequencies_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sample_source(tmp_path, "llama 3.1", None)
    with monkeypatch.context() as patched:
        patched.setattr("lit_gpt.convert.gguf_architectures.OUR_CONFIG", "another.program")
        write_gguf(source, tmp_path / "model.gguf")
    with pytest.raises(UserError, match=f"{ROPE_FACTORS} has other divisors than Llama 3.1 or 3.2"):
        open_source(str(tmp_path / "model.gguf"))


@pytest.mark.slow
def test_the_model_answers_from_python(tmp_path: Path) -> None:
    source = sample_source(tmp_path, "qwen3")
    write_gguf(source, tmp_path / "model.gguf", "f32")
    first, second = (load(str(tmp_path / name), "fp32") for name in ("sample.ckpt", "model.gguf"))
    texts = [gpt.generate("The quick", temperature=0, max_new_tokens=12) for gpt in (first, second)]
    assert texts[0] == texts[1]
    quantised = tmp_path / "without an ending"  # known by what it holds
    write_gguf(source, quantised, "q8_0")
    model, tokenizer = load_source(str(quantised))
    assert tokenizer is not None and model.config == source.config


@pytest.mark.slow
def test_the_program(
    tmp_path: Path, program: RunProgram, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample_source(tmp_path, "qwen3")
    done = program("convert", "sample.ckpt", "model.gguf", "--dtype", "q8_0", "--modelfile")
    assert (done.returncode, done.stdout) == (0, "model.gguf\n"), done.stderr
    assert "wrote Modelfile" in done.stderr and (tmp_path / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "model.gguf", "again.ckpt"]) == 0
    assert capsys.readouterr().out == "again.ckpt\n"
    equal_sources(open_source(str(tmp_path / "model.gguf")), open_source(str(tmp_path / "again.ckpt")))
    flags = ["--start", "The quick", "--strategy", "greedy", "--max_new_tokens", 8, "--trainer.precision", "32-true"]
    text = program("predict", "--init_from", "model.gguf", *flags).stdout
    generate = load(str(tmp_path / "again.ckpt"), "fp32").generate
    assert text == f"The quick{generate('The quick', strategy='greedy', max_new_tokens=8)}\n"
    capsys.readouterr()
    assert main(["convert", "sample.ckpt", "other", "--to", "gguf", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == "other\n"
    for arguments, message in (
        (("b.ckpt", "--dtype", "q8_0"), "--dtype q8_0 is one of GGUF"),
        (("b.gguf", "--dtype", "float64"), "--dtype float64 is none of GGUF"),
        (("b.gguf", "--to", "lit_gpt"), "--to lit_gpt does not write b.gguf"),
        (("b.ckpt", "--modelfile"), "--modelfile goes with GGUF"),
        (("b.gguf", "--modelfile"), "Modelfile exists already"),
        (("b.gguf", "--dtype", "q4_1"), '--dtype "q4_1" is unknown: did you mean "q4_0"?'),
        (("b.gguf", "--to", "ggml"), '--to "ggml" is unknown: did you mean "gguf"?'),
    ):
        assert main(["convert", "sample.ckpt", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and message in printed.err and printed.err.count("\n") == 1
    assert not list(tmp_path.glob("b.*"))


def test_the_config_comes_back_from_numbers_of_32_bits() -> None:
    from lit_gpt.convert.gguf_format import shortest_decimal

    assert [shortest_decimal(np.float32(x)) for x in (1e-5, 1e-6, 500000.0, 0.02)] == [1e-5, 1e-6, 500000.0, 0.02]
    assert GPTConfig(norm_eps=shortest_decimal(np.float32(1e-5))) == GPTConfig()
