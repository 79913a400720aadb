"""`tokenizer.json` with byte fallback, as Llama 2, Mistral, Phi-3 and Gemma have it: transformers' ids or a refusal."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_fallback_files import SHAPES, byte_fallback_file
from fuzzing import changed, damaged, fuzz
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt import load
from lit_gpt.checkpoint.format import load_model, save_model
from lit_gpt.convert.recognise import open_source
from lit_gpt.convert.tokenizer_json import convert_tokenizer, read_tokenizer, write_tokenizer, write_tokenizer_config
from lit_gpt.convert.write import write_hf
from lit_gpt.data.workers import Workers
from lit_gpt.errors import UserError
from lit_gpt.generation.complete import encode_prompt
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import Tokenizer

DETAILS = {"eos": "</s>", "eos_id": None, "bos": None, "chat_template": None}


def converted(values: dict[str, Any], **details: Any) -> Tokenizer:
    return convert_tokenizer(values, {**DETAILS, **details}, "x: tokenizer.json", "x")


def folder_of(shape: str, folder: Path, **side: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(byte_fallback_file(shape)))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>", **side}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


@cache
def texts_of_every_script(count: int) -> tuple[str, ...]:
    """Random texts of characters from the whole of Unicode, a block or two and some ASCII at a time."""
    draw = random.Random(0)
    blocks = [range(start, start + 0x80) for start in range(0, 0x30000, 0x80) if not 0xD800 <= start < 0xE000]
    ascii_text = "the quick brown fox, 12 3.5\n\t  "
    texts: list[str] = []
    for _ in range(count):
        pool = [*map(chr, draw.choice(blocks)), *map(chr, draw.choice(blocks)), *ascii_text * 4]
        texts.append("".join(draw.choices(pool, k=draw.randrange(24))))
    return tuple(texts)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_ids_on_thousands_of_texts_of_every_script(shape: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder_of(shape, tmp_path))
    ours = read_tokenizer(tmp_path, {}, "x")
    assert ours is not None
    texts = texts_of_every_script(4000)  # each block some five times
    wanted = theirs(list(texts), add_special_tokens=False)["input_ids"]
    assert [ours.encode(text) for text in texts] == wanted
    assert all(ours.decode(ids) == theirs.decode(ids) for ids in wanted[:1000])
    assert theirs("fox")["input_ids"] == encode_prompt(ours, "fox")  # with what stands before every text


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_ours_in_transformers_and_back(shape: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = converted(byte_fallback_file(shape), chat_template="{{ x }}")
    (tmp_path / "tokenizer.json").write_text(json.dumps(write_tokenizer(ours, "x")))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(write_tokenizer_config(ours, 64)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.chat_template) == (2, 1, "{{ x }}")
    for text in texts_of_every_script(300):
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids)
    back = read_tokenizer(tmp_path, {}, "x")
    assert back is not None and (back.hash, back.eot_id, back.bos_id) == (ours.hash, ours.eot_id, ours.bos_id)


@pytest.mark.slow
def test_details_are_carried_through_a_checkpoint(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "hf", chat_template="{{ messages }}")
    tokenizer = read_tokenizer(folder, {}, "org/some-model")
    assert tokenizer is not None and (tokenizer.name, tokenizer.chat_template) == ("some-model", "{{ messages }}")
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, block_size=16, n_layer=1, n_head=2, n_embd=8))
    save_model(tmp_path / "a.ckpt", model, tokenizer)
    _, again = load_model(tmp_path / "a.ckpt")
    assert again is not None and again.to_dict() == tokenizer.to_dict()
    write_hf(open_source(str(tmp_path / "a.ckpt")), tmp_path / "out")
    back = open_source(str(tmp_path / "out")).tokenizer
    assert back is not None and back.hash == tokenizer.hash and back.chat_template == "{{ messages }}"
    assert torch.equal(open_source(str(tmp_path / "out")).weights["wte.weight"].read(), model.wte.weight)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["The quick brown", "你好 fox", " def f(x):"])
def test_a_whole_model_writes_what_transformers_writes(prompt: str, tmp_path: Path) -> None:
    """A Mistral with its tokenizer, past its window, with what stands before every text in front."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 8, "vocab_size": 484}
    reference = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    reference.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder_of("llama", tmp_path))
    ids = theirs(prompt, return_tensors="pt")
    new = reference.generate(**ids, max_new_tokens=30, do_sample=False)[0].tolist()[ids["input_ids"].shape[1] :]
    generator = load(str(tmp_path))
    wanted = b"".join(generator.tokenizer.token_bytes(token) for token in new).decode("utf-8", "replace")
    assert generator.generate(prompt, strategy="greedy", max_new_tokens=30) == wanted


@pytest.mark.slow
def test_where_end_and_beginning_are_told_by_other_fields() -> None:
    values = byte_fallback_file("llama")
    assert converted(values, eos=None, eos_id=481).end_of_text == "<|end|>"
    assert converted(values, eos="absent").eot_id is None
    values["post_processor"] = None
    assert converted(values).bos_id is None
    assert converted(values, bos="<s>").bos_id == 1
    for token in values["added_tokens"]:
        token["special"] = False
    assert converted(values, bos="<s>").specials == {"<s>": 1, "</s>": 2, "<|user|>": 480, "<|end|>": 481}
    values["added_tokens"] = []
    assert converted(values).specials == {"</s>": 2}


def test_padding_that_a_file_asks_for_is_left_out() -> None:
    values = byte_fallback_file("llama")
    fixed = {"strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_to_multiple_of": None}
    values["padding"] = {**fixed, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    values["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    assert converted(values).hash == converted(byte_fallback_file("llama")).hash


@pytest.mark.slow
def test_workers_tokenize_with_it() -> None:
    tokenizer = converted(byte_fallback_file("gemma"))
    jobs = [[("The quick fox", True, "train")], [("你好", True, "train")]]
    with Workers(tokenizer, "uint16", 2) as workers:
        found = [result["train"].tokens.tolist() for result in workers.map(jobs)]
    assert found == [[*tokenizer.encode(text), 2] for text in ("The quick fox", "你好")]


def with_value(*path: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        values = inside = byte_fallback_file("llama")
        for key in path[:-2]:
            inside = inside[key]
        inside[path[-2]] = path[-1]
        return values

    return make


def without(token: str) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        values = byte_fallback_file("llama")
        del values["model"]["vocab"][token]
        return values

    return make


METASPACE = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": False}
REPLACE = {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "\u2581"}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False}
REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "normaliser": (with_value("normalizer", {"type": "NFKC"}), "normalizer 'NFKC' is not supported"),
    "regular expression": (with_value("normalizer", REPLACE), "Replace with pattern="),
    "no spaces": (with_value("normalizer", None), "its spaces are not written as"),
    "other space": (with_value("pre_tokenizer", METASPACE), "Metaspace with replacement='_'"),
    "digits": (with_value("pre_tokenizer", SPLIT), "Split with pattern="),
    "bytes": (with_value("pre_tokenizer", {"type": "ByteLevel"}), "pre_tokenizer 'ByteLevel' is not supported"),
    "decoder": (with_value("decoder", {"type": "WordPiece"}), "decoder 'WordPiece' is not supported"),
    "no decoder": (with_value("decoder", None), "its decoder does not turn"),
    "decoder's type": (with_value("decoder", 3), "its decoder is 3, not an object"),
    "many steps": (with_value("decoder", "decoders", [{"type": "Fuse"}] * 9), "is a sequence of"),
    "dropout": (with_value("model", "dropout", 0.5), "dropout=0.5"),
    "switch": (with_value("model", "ignore_merges", "yes"), "ignore_merges='yes' is not true or false"),
    "no merges": (with_value("model", "merges", None), "it has no vocab and merges"),
    "merge of one": (with_value("model", "merges", [["a"]]), "is no pair"),
    "merge of none": (with_value("model", "merges", [["a", "\u2603"]]), "which is no token"),
    "byte": (without("<0x41>"), "it lacks 1 of the 256 bytes, <0x41> first"),
    "id": (with_value("model", "vocab", "a", 1 << 30), "is not in 0 …"),
    "two of one id": (with_value("model", "vocab", "<0x41>", 1), "have one id, 1"),
    "added id": (with_value("added_tokens", 1, "id", 7), "has another id in the vocabulary"),
    "added twice": (with_value("added_tokens", 1, "content", "<unk>"), "is no text of its own"),
    "flag": (with_value("added_tokens", 1, "lstrip", 3), "lstrip of its added token '<s>' is 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_done_is_refused_with_the_reason(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, message = REFUSED[case]
    with pytest.raises(UserError) as caught:
        converted(make())
    assert message in str(caught.value) and str(caught.value).startswith("x: tokenizer.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert capfd.readouterr().err == ""


def test_a_special_token_that_merges_make_is_refused() -> None:
    values = byte_fallback_file("llama")
    left, right = values["model"]["merges"][0]
    number = values["model"]["vocab"][left + right]
    values["added_tokens"].append({"id": number, "content": left + right, "special": True})
    with pytest.raises(UserError, match="text can merge into its special token"):
        converted(values)


@pytest.mark.slow
@fuzz
@given(data=st.data())
def test_fuzz_a_file(data: st.DataObject, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = byte_fallback_file(data.draw(st.sampled_from(SHAPES)))
    for text in (
        data.draw(damaged(json.dumps(values).encode())),
        json.dumps(data.draw(changed(values))).encode("utf-8", "replace"),
    ):
        (tmp_path / "tokenizer.json").write_bytes(text)
        try:
            found = read_tokenizer(tmp_path, {}, "x")
            assert found is not None
            Tokenizer.from_dict(found.to_dict()).encode("the text")
        except UserError as error:
            assert len(str(error)) < 1000
    assert "panicked" not in capfd.readouterr().err
