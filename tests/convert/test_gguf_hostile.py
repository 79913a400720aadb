"""GGUF files that are cut off, damaged, foreign or made to do harm: one line each, before any memory is spent."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_samples import sample_source

from lit_gpt.convert.gguf_format import GgufTensor, pack_header, read_header
from lit_gpt.convert.gguf_write import write_gguf
from lit_gpt.convert.main import main
from lit_gpt.convert.recognise import open_source
from lit_gpt.errors import UserError

gguf = pytest.importorskip("gguf")
F32, Q8_0, Q4_K = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "Q8_0", "Q4_K"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good file of a model and a tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    write_gguf(sample_source(folder, "qwen3", "byte"), folder / "model.gguf", "q8_0")
    return folder / "model.gguf"


def refused(path: Path) -> str:
    """The one line with which the file is refused."""
    with pytest.raises(UserError) as caught:
        open_source(str(path))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500 and path.name in message
    return message


@pytest.mark.slow
def test_cut_off_anywhere_it_is_refused(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    path = tmp_path / "cut.gguf"
    lengths = [*range(0, 64), *range(64, len(content), len(content) // 60), len(content) - 33, len(content) - 64]
    for length in lengths:
        path.write_bytes(content[:length])
        refused(path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "trials"), [("byte", 60), (None, 150)])
def test_any_byte_changed_is_read_or_refused_in_one_line(kind: str | None, trials: int, tmp_path: Path) -> None:
    """Never another error; what is read has the model's shape. Most of a header is a tokenizer, if there is one."""
    path = tmp_path / "changed.gguf"
    write_gguf(sample_source(tmp_path, "qwen3", kind), path, "q8_0")
    content = path.read_bytes()
    header_size = min(tensor.start for tensor in read_header(path).tensors.values())
    draw = random.Random(0)
    for _ in range(trials):
        changed = bytearray(content)
        for _ in range(draw.choice([1, 1, 8])):
            changed[draw.randrange(header_size)] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
        path.write_bytes(changed)
        try:
            source = open_source(str(path))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
        else:
            assert source.config.n_layer == 2


def test_bytes_of_chance_after_the_magic(tmp_path: Path) -> None:
    path = tmp_path / "chance.gguf"
    draw = random.Random(0)
    for _ in range(100):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, draw.randrange(4), draw.randrange(4)) + draw.randbytes(200))
        refused(path)


def header(metadata: dict[str, Any] | None = None, *tensors: GgufTensor, data: int = 4096) -> bytes:
    return pack_header({"general.architecture": "llama"} if metadata is None else metadata, tensors) + bytes(data)


def with_counts(tensors: int, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + bytes(100)


def with_array(kind: int, count: int) -> bytes:
    key = struct.pack("<Q", 1) + b"a"
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, kind, count) + bytes(100)


def twice() -> bytes:
    one = struct.pack("<Q", 1) + b"a" + struct.pack("<II", 4, 7)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + one + one


NAME = "token_embd.weight"
DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "needs more than its 0 bytes"),
    "other magic": (lambda: b"GGML" + bytes(100), "does not begin with GGUF"),
    "version 1": (lambda: b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1: this lit_gpt reads 2 and 3"),
    "big-endian": (lambda: b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
    "many tensors": (lambda: with_counts(1 << 60, 1), "claims 1152921504606846976 tensors"),
    "many keys": (lambda: with_counts(1, 1 << 60), "claims 1152921504606846976 keys"),
    "many texts": (lambda: with_array(8, 1 << 50), "claims 1125899906842624 texts"),
    "texts past the end": (lambda: with_array(8, 1 << 20), "needs more than its"),
    "many numbers": (lambda: with_array(4, 1 << 40), "claims 1099511627776 numbers"),
    "numbers past the end": (lambda: with_array(10, 1 << 20), "needs more than its"),
    "array of arrays": (lambda: with_array(9, 1), "'a' is an array of arrays"),
    "a type that is none": (lambda: with_array(13, 1), "the type 13, which GGUF does not have"),
    "a key twice": (twice, "the key 'a' is there twice"),
    "alignment 0": (lambda: header({"general.alignment": 0}), "general.alignment is 0"),
    "alignment 24": (lambda: header({"general.alignment": 24}), "general.alignment is 24"),
    "one of several parts": (lambda: header({"split.count": 3}), "one of 3 parts: join them with llama-gguf-split"),
    "a tensor twice": (lambda: header(None, *[GgufTensor(NAME, (8, 8), F32, 0)] * 2), "is there twice"),
    "past the end": (lambda: header(None, GgufTensor(NAME, (8, 8), F32, 4096)), "ends at byte"),
    "absurd size": (lambda: header(None, GgufTensor(NAME, (1 << 62, 1 << 62), F32, 0)), "ends at byte"),
    "a size of 0": (lambda: header(None, GgufTensor(NAME, (8, 0), F32, 0)), "has the shape (8, 0)"),
    "half a block": (lambda: header(None, GgufTensor(NAME, (8, 48), Q8_0, 0)), "has the shape (8, 48) as Q8_0"),
    "five dimensions": (lambda: header(None, GgufTensor(NAME, (1,) * 5, F32, 0)), "has 5 dimensions"),
    "misaligned": (lambda: header(None, GgufTensor(NAME, (8, 8), F32, 4)), "which is no multiple of 32"),
    "one over another": (
        lambda: header(None, GgufTensor(NAME, (8, 8), F32, 0), GgufTensor("b", (8, 8), F32, 32)),
        "'token_embd.weight' and 'b' share bytes",
    ),
    "K quantisation": (
        lambda: header(None, GgufTensor(NAME, (1, 256), Q4_K, 0)),
        "quantised as Q4_K, which is not read",
    ),
    "unknown quantisation": (lambda: header(None, GgufTensor(NAME, (8, 8), 99, 0)), "quantised as type 99"),
    "no weights": (lambda: header(), "has no token_embd.weight"),
    "another architecture": (lambda: header({"general.architecture": "mamba"}), "the architecture 'mamba' is not read"),
    "no architecture": (lambda: header({}), "the architecture None is not read"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_header_that_lies_is_refused_in_little_memory(case: str, tmp_path: Path) -> None:
    make, message = DAMAGED[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(make())
    tracemalloc.start()
    try:
        assert message in refused(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def rewritten(whole: Path, path: Path, **changes: Any) -> Path:
    """The good file with keys of its metadata changed; None removes one."""
    read = read_header(whole)
    metadata = {key: getattr(value, "values", value) for key, value in read.metadata.items()}
    metadata = {
        key: value if isinstance(value, str | int | float | list) else value.tolist() for key, value in metadata.items()
    }
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    first = min(tensor.start for tensor in read.tensors.values())
    tensors = [GgufTensor(t.name, t.shape, t.kind, t.start - first) for t in read.tensors.values()]
    kept = {key: value for key, value in metadata.items() if value is not None}
    path.write_bytes(pack_header(kept, tensors) + whole.read_bytes()[first:])
    return path


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "another vocabulary": ({"qwen3__vocab_size": 300}, "vocab_size is 300, but token_embd.weight has 257 rows"),
    "fewer tokens": ({"tokenizer__ggml__tokens": ["a"]}, "has 1 tokens, but token_embd.weight has 257 rows"),
    "more layers": ({"qwen3__block_count": 3}, "blk.2.attn_norm.weight is missing"),
    "absurdly many layers": ({"qwen3__block_count": 1 << 30}, "n_layer=1073741824"),
    "a wider model": ({"qwen3__embedding_length": 128}, "token_embd.weight is (257, 64), not (257, 128)"),
    "an absurdly wide model": ({"qwen3__embedding_length": 1 << 30}, "its config describes at least"),
    "other heads": ({"qwen3__attention__head_count": 3}, "n_head=3 is not divisible"),
    "an absurd context": ({"qwen3__context_length": 1 << 31}, "block_size="),
    "a key is missing": ({"qwen3__embedding_length": None}, "lacks qwen3.embedding_length"),
    "a text for a number": ({"qwen3__block_count": "two"}, "is 'two', not a whole number"),
    "a list for a number": ({"qwen3__feed_forward_length": [96, 96]}, "not a whole number"),
    "no number": ({"qwen3__attention__layer_norm_rms_epsilon": float("nan")}, "norm_eps=nan must be a number"),
    "a sliding window": ({"qwen3__attention__sliding_window": 16}, "attention.sliding_window=16 is not supported"),
    "experts": ({"qwen3__expert_count": 8}, "qwen3.expert_count=8 is not supported"),
    "half a head rotated": ({"qwen3__rope__dimension_count": 12}, "qwen3.rope.dimension_count=12 is not supported"),
    "another scaling": ({"qwen3__rope__scaling__type": "yarn"}, "qwen3.rope.scaling.type='yarn' is not supported"),
    "a key that is not known": ({"qwen3__logit_scale": 2.0}, "qwen3.logit_scale=2.0 is not supported"),
    "another architecture": ({"general__architecture": "llama"}, "lacks llama."),
    "hints that are none": ({"lit_gpt__config": "{"}, "lit_gpt.config is '{', no JSON object"),
    "hints of another model": ({"lit_gpt__config": '{"n_layer": 5}'}, "blk.2.attn_norm.weight is missing"),
    "hints of no model": ({"lit_gpt__config": '{"n_layers": 2}'}, 'unknown model config key "n_layers"'),
    "hints for the tokenizer": ({"lit_gpt__tokenizer": "[]"}, "lit_gpt.tokenizer is '[]'"),
    "SentencePiece": ({"tokenizer__ggml__model": "llama"}, "a SentencePiece vocabulary, not byte-level BPE"),
    "another kind of tokenizer": ({"tokenizer__ggml__model": "bert"}, "of the kind 'bert'"),
    "another pre-tokenizer": ({"tokenizer__ggml__pre": "deepseek-llm"}, "pre-tokenizer 'deepseek-llm' is not known"),
    "no pre-tokenizer": ({"tokenizer__ggml__pre": None}, "pre-tokenizer None is not known"),
    "no merges": ({"tokenizer__ggml__merges": None}, "no tokens and merges"),
    "merges of nothing": ({"tokenizer__ggml__merges": ["a"]}, "the merge 'a' is no pair"),
    "merges of no token": ({"tokenizer__ggml__merges": ["a b"]}, "the merge of 'a' and 'b' is out of the order"),
    "an end that is no token": ({"tokenizer__ggml__eos_token_id": 1000}, "eos_token_id is 1000, which is none of"),
    "few types": ({"tokenizer__ggml__token_type": [1]}, "token_type is no list of 257 whole numbers"),
    "a token twice": ({"tokenizer__ggml__tokens": ["a"] * 257}, "has a token twice"),
    "a token of no bytes": ({"tokenizer__ggml__tokens": [f"你{n}" for n in range(257)]}, "is no string of bytes"),
    "a template that is none": ({"tokenizer__chat_template": 3}, "tokenizer.chat_template is 3, no text"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_metadata_that_contradicts_itself_or_the_tensors_is_refused(case: str, whole: Path, tmp_path: Path) -> None:
    changes, message = CONTRADICTIONS[case]
    assert message in refused(rewritten(whole, tmp_path / "bad.gguf", **changes))


def test_what_is_rewritten_unchanged_is_read(whole: Path, tmp_path: Path) -> None:
    again = open_source(str(rewritten(whole, tmp_path / "again.gguf")))
    source = open_source(str(whole))
    assert again.config == source.config
    assert all(torch.equal(stored.read(), source.weights[name].read()) for name, stored in again.weights.items())
    harmless = {
        "qwen3__expert_count": 0,
        "qwen3__attention__sliding_window": 48,
        "general__author": "x",
        "x__y": [1, 2],
    }
    assert open_source(str(rewritten(whole, tmp_path / "more.gguf", **harmless))).config == source.config


def test_a_surplus_tensor_is_named(whole: Path, tmp_path: Path) -> None:
    read = read_header(whole)
    names = {"blk.1.ffn_up.weight": "blk.7.ffn_up.weight"}
    first = min(tensor.start for tensor in read.tensors.values())
    tensors = [GgufTensor(names.get(t.name, t.name), t.shape, t.kind, t.start - first) for t in read.tensors.values()]
    metadata = {key: value for key, value in read.metadata.items() if not key.startswith("tokenizer")}
    (tmp_path / "bad.gguf").write_bytes(pack_header(metadata, tensors) + whole.read_bytes()[first:])
    message = refused(tmp_path / "bad.gguf")
    assert "blk.1.ffn_up.weight is missing" in message and "blk.7.ffn_up.weight is unexpected" in message


def test_a_file_that_changes_while_it_is_read_is_noticed(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole.read_bytes())
    source = open_source(str(path))
    path.write_bytes(whole.read_bytes()[:-4096])
    with pytest.raises(UserError, match="changed while it was read"):
        source.load()


def test_nothing_is_left_of_a_conversion_that_is_refused(whole: Path, tmp_path: Path) -> None:
    bad = rewritten(whole, tmp_path / "bad.gguf", qwen3__block_count=3)
    for output in ("a.ckpt", "b.gguf"):
        with pytest.raises(UserError):
            main([str(bad), str(tmp_path / output)])
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_source(str(tmp_path / "nowhere.gguf"))
    (tmp_path / "text.gguf").write_text("Once upon a time\n" * 10)
    assert "does not begin with GGUF" in refused(tmp_path / "text.gguf")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"did you mean .*model\.gguf"):
        open_source(str(tmp_path / "folder"))
