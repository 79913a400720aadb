"""The one check of a prompt against a model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lit_gpt.errors import UserError
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.prompts import check_prompt, vocabulary_size
from lit_gpt.model.config import GPTConfig
from lit_gpt.tokenizer.tokenizer import get_tokenizer

CONFIG = GPTConfig(vocab_size=50, block_size=4, n_layer=1, n_head=1, n_embd=2)
PADDED = replace(CONFIG, vocab_size=300)
BYTES = get_tokenizer("byte")
SLIDE, STOP = GenerationConfig(), GenerationConfig(overflow="stop")


def test_a_prompt_that_fits_is_taken_as_it_is_and_an_empty_one_is_end_of_text() -> None:
    assert check_prompt("the prompt", (1, 49), CONFIG, STOP, None) == [1, 49]
    assert check_prompt("the prompt", [], PADDED, SLIDE, BYTES) == [256]
    assert check_prompt("the prompt", [1] * 9, PADDED, SLIDE, BYTES) == [1] * 9


def test_the_rows_of_a_padded_model_are_no_ids() -> None:
    assert vocabulary_size(PADDED, BYTES) == 257 and vocabulary_size(PADDED, None) == 300
    assert vocabulary_size(CONFIG, BYTES) == 50
    with pytest.raises(UserError, match=r"token id 257, outside the vocabulary of 257: use ids 0 … 256"):
        check_prompt("the prompt", [1, 257], PADDED, SLIDE, BYTES)


@pytest.mark.parametrize(
    ("ids", "generation_config", "message"),
    [
        ([], SLIDE, "prompt 3 is empty and the tokenizer has no end-of-text to start from: write a prompt"),
        ([1, 50], SLIDE, "prompt 3 has token id 50, outside the vocabulary of 50: use ids 0 … 49"),
        ([-1, 99], SLIDE, "prompt 3 has token id -1, outside the vocabulary of 50: use ids 0 … 49"),
        ([1] * 5, STOP, "prompt 3 has 5 tokens, the model's context is 4: shorten it, or use overflow slide"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(
    ids: list[int], generation_config: GenerationConfig, message: str
) -> None:
    with pytest.raises(UserError) as error:
        check_prompt("prompt 3", ids, CONFIG, generation_config, None)
    assert str(error.value) == message
