"""A vocabulary that grows: what the model says with the ids it had stays as it was, new rows are the mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from byte_fallback_files import byte_fallback_file
from models import tiny_gpt

from lit_gpt.checkpoint.growth import grow_weights, grown_config, new_special_ids
from lit_gpt.convert.tokenizer_json import convert_tokenizer
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.chat_template import with_chat_template
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer
from lit_gpt.tokenizer.train import train_tokenizer


def grown(model: GPT, known: int, new_ids: list[int]) -> GPT:
    """The model with these ids more."""
    config = grown_config(model.config, max(new_ids) + 1)
    made = GPT(config).double().eval()
    made.load_state_dict(grow_weights(model.state_dict(), config, known, new_ids))
    return made


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_embeddings": False},
        {"tie_embeddings": False, "head_bias": True},
        {"padded_vocab_size": 320},
        {"padded_vocab_size": 258, "tie_embeddings": False},
    ],
    ids=str,
)
def test_old_ids_keep_their_logits_and_new_ones_begin_as_the_mean(shape: dict[str, Any]) -> None:
    model = tiny_gpt(**shape)
    bigger = grown(model, 257, [257, 258])
    assert bigger.config.vocab_size == 259 and bigger.config.tie_embeddings == model.config.tie_embeddings
    idx = torch.randint(0, 257, (2, 12))
    before, after = model(idx).logits, bigger(idx).logits
    torch.testing.assert_close(after[..., :257], before, rtol=0, atol=1e-12)  # products are split by their width
    for name, old in model.state_dict().items():
        rows = 257 if name in ("wte.weight", "lm_head.weight", "lm_head.bias") else len(old)
        assert torch.equal(bigger.state_dict()[name][:rows], old[:rows]), name
    assert torch.allclose(after[..., 257:], before.mean(-1, keepdim=True).expand(-1, -1, 2), rtol=0, atol=1e-12)
    mean = model.wte.weight[:257].mean(0)
    assert torch.allclose(bigger.wte.weight[257:259], mean.expand(2, -1), rtol=0, atol=1e-15)
    assert (bigger.lm_head.weight is bigger.wte.weight) == model.config.tie_embeddings


def test_the_rows_of_ids_without_a_meaning_are_not_averaged_and_get_one() -> None:
    """A vocabulary of 270 for 257 ids: the new ones have random rows there already."""
    model = tiny_gpt(vocab_size=270, tie_embeddings=False)
    bigger = grown(model, 257, [257, 258])
    assert bigger.config == model.config
    assert torch.allclose(bigger.lm_head.weight[257], model.lm_head.weight[:257].mean(0), rtol=0, atol=1e-15)
    assert torch.equal(bigger.lm_head.weight[259:], model.lm_head.weight[259:])


@pytest.mark.parametrize(
    ("padded", "expected"), [(None, None), (50304, 50304), (50257, 50259), (50258, 50260), (50260, 50260)]
)
def test_padding_keeps_its_multiple(padded: int | None, expected: int | None) -> None:
    config = GPTConfig(vocab_size=50257, padded_vocab_size=padded)
    assert grown_config(config, 50259) == replace(config, vocab_size=50259, padded_vocab_size=expected)
    assert grown_config(GPTConfig(vocab_size=50304, padded_vocab_size=50304), 50310).padded_vocab_size == 50432
    assert grown_config(config, 50257) is config


def test_which_tokenizer_is_another_with_more_special_tokens() -> None:
    byte = get_tokenizer("byte")
    chat = with_chat_template(byte)
    assert new_special_ids(chat, byte) == [257, 258] and new_special_ids(byte, byte) == []
    assert new_special_ids(byte, chat) is None
    other = Tokenizer.build("byte", byte.pattern, byte.ranks, {"<|im_start|>": 256, "<|im_end|>": 257})
    assert new_special_ids(other, byte) is None  # another special token has the id of end-of-text
    far = Tokenizer.build("byte", byte.pattern, byte.ranks, {**byte.specials, "<|im_end|>": 300})
    assert new_special_ids(far, byte) is None
    merged = train_tokenizer("bpe:300", ["to be or not to be " * 9])
    assert new_special_ids(with_chat_template(merged), byte) is None
    details = {"eos": "</s>", "eos_id": None, "bos": None, "chat_template": None}
    fallback = convert_tokenizer(byte_fallback_file("llama"), details, "x", "x")
    assert new_special_ids(with_chat_template(fallback), fallback) == [fallback.n_vocab, fallback.n_vocab + 1]
    assert new_special_ids(with_chat_template(fallback), byte) is None
