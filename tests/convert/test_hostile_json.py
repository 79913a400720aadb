"""Damaged and hostile JSON of other projects: one line, no panic, and no more memory than the file is long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fuzzing import changed, damaged, fuzz
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from lit_gpt.convert.hf_architectures import ARCHITECTURES, read_config
from lit_gpt.convert.schema import check_schema
from lit_gpt.convert.tokenizer_json import read_tokenizer
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import json_object
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "sliding_window": None,
    "tie_word_embeddings": True,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 300,
    "n_positions": 32,
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "activation_function": "gelu_new",
}


@pytest.fixture(scope="module")
def content() -> bytes:
    """A `tokenizer.json` of byte-level BPE with special tokens."""
    tokenizer = HubTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, then the other"] * 3, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str(pretty=True).encode()


def read(folder: Path, tokenizer_json: bytes) -> Tokenizer | None:
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    return read_tokenizer(folder, {}, "x")


def edited(content: bytes, *path: Any) -> bytes:
    """`content` with the last of `path` at the place that the others name."""
    values = inside = json.loads(content)
    for key in path[:-2]:
        inside = inside[key]
    inside[path[-2]] = path[-1]
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("model", "vocab", "a", 3), "have one id, 3"),
        (("model", "vocab", "a", -3), "the id -3 of b'a' is not in 0"),
        (("model", "vocab", "a", 2**40), "is not in 0 … 16777215"),
        (("model", "vocab", "a", 10**30), "not a whole number"),
        (("model", "vocab", "a", "3"), "vocab: a is '3', not a whole number"),
        (("model", "vocab", [1]), "has no vocab and merges"),
        (("model", "merges", [["a"]]), "no pair"),
        (("model", "merges", [3]), "an item of x: tokenizer.json: merges is 3, not text or a list"),
        (("model", 3), "model is 3, not an object"),
        (("model", "dropout", {str(i): i for i in range(300)}), "dropout={'0': 0,"),
        (("added_tokens", [3]), "is 3, not an object"),
        (("added_tokens", [{"id": 3, "content": "<s>"}]), "have one id, 3"),
        (("added_tokens", [{"id": 3}]), "content is None, not text"),
        (("pre_tokenizer", [1]), "pre_tokenizer is [1], not an object"),
        (("pre_tokenizer", {"type": "Sequence", "pretokenizers": [3]}), "is 3, not an object"),
        (("pre_tokenizer", {"type": "Sequence"}), "not byte-level BPE"),
        (("normalizer", "NFC"), "normalizer is 'NFC', not an object"),
        (("post_processor", {"type": "TemplateProcessing", "single": 3}), "single is 3, not a list"),
    ],
    ids=str,
)
def test_a_tokenizer_of_other_types_is_refused_without_a_panic(
    path: tuple[Any, ...], message: str, content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, edited(content, *path))
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"[" + b"[]," * 3_000_000 + b"[]]", "which is too long"),
        (b"[1]", "holds no JSON object"),
        (b"\xff\xfe", "is damaged"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is damaged"),
    ],
    ids=["lists", "objects", "many values", "no object", "no text", "a long number"],
)
def test_json_that_is_deep_long_or_no_object(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(text)
    for attempt in (lambda: json_object.read_json(path), lambda: Tokenizer.load(path)):
        with pytest.raises(UserError) as error:
            attempt()
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    with pytest.raises(UserError, match=message):
        json_object.read_json(path)


def test_json_that_is_longer_than_any_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(10 << 30)  # takes no space on the disk
    with pytest.raises(UserError, match="it has more than 67108864 bytes"):
        json_object.read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": ["llama"]}, r"config\.json: model_type is \['llama'\], not text"),
        ({"vocab_size": "300"}, r"vocab_size is '300', not a whole number"),
        ({"vocab_size": None}, r"config\.json: vocab_size=None must be a whole number"),
        ({"rms_norm_eps": "1e-5"}, r"rms_norm_eps is '1e-5', not a whole number or a number"),
        ({"sliding_window": "4"}, "sliding_window is '4'"),
        ({"rope_scaling": [2]}, r"rope_scaling is \[2\], not an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling: factor is '2'"),
        ({"layer_types": 3}, "layer_types is 3, not a list"),
        ({"max_position_embeddings": 10**9}, "needs a table of 30 GiB"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers is 1"),
        ({"tie_word_embeddings": "no"}, "not true or false"),
    ],
    ids=str,
)
def test_a_config_of_other_types(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_config({**LLAMA, **values}, "config.json")
    assert str(error.value).startswith("config.json")


def test_a_schema_names_the_value_and_what_it_should_be() -> None:
    schema = {"a": (int, None), "b": [{"c": str}], "d": {str: bool}}
    check_schema({"b": [{"c": "x", "other": 3}], "d": {"e": True}}, schema, "f")
    for values, message in (
        ({"a": True, "b": []}, "f: a is True, not a whole number: get it again"),
        ({"b": [{}]}, "an item of f: b: c is None, not text: get it again"),
        ({"b": [], "d": {"e": 1}}, "f: d: e is 1, not true or false: get it again"),
        (3, "f is 3, not an object: get it again"),
    ):
        with pytest.raises(UserError) as error:
            check_schema(values, schema, "f")
        assert str(error.value) == message


# Fuzzing -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@fuzz
@given(data=st.data())
def test_fuzz_bytes_of_a_tokenizer_json(
    data: st.DataObject, content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        read(tmp_path, data.draw(damaged(content)))
    except UserError as error:
        assert len(str(error)) < 1000
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.slow
@fuzz
@given(data=st.data())
def test_fuzz_values_of_a_tokenizer_json(
    data: st.DataObject, content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        read(tmp_path, json.dumps(data.draw(changed(json.loads(content)))).encode("utf-8", "replace"))
    except UserError as error:
        assert len(str(error)) < 1000
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.slow
@fuzz
@given(data=st.data())
def test_fuzz_our_tokenizer(data: st.DataObject, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stored = get_tokenizer("byte").to_dict()
    path = tmp_path / "tokenizer.json"
    for text in (
        data.draw(damaged(json.dumps(stored).encode())),
        json.dumps(data.draw(changed(stored))).encode("utf-8", "replace"),
    ):
        path.write_bytes(text)
        try:
            Tokenizer.load(path).encode("the text")
        except UserError as error:
            assert len(str(error)) < 1000
    assert "panicked" not in capfd.readouterr().err


@fuzz
@given(data=st.data(), values=st.sampled_from([LLAMA, GPT2]), kind=st.sampled_from(sorted(ARCHITECTURES)))
def test_fuzz_a_config_of_hugging_face(data: st.DataObject, values: dict[str, Any], kind: str) -> None:
    try:
        read_config(data.draw(changed({**values, "model_type": kind})), "config.json")
    except UserError as error:
        assert len(str(error)) < 1000
