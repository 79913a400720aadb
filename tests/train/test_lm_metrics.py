"""Loss, perplexity and bits per byte against brute force in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import get_tokenizer
from lit_gpt.tokenizer.train import train_tokenizer
from lit_gpt.train.lm_metrics import LanguageModelMetric, byte_lengths, count_bytes


def test_figures_equal_brute_force_over_ragged_batches(tiny_config: GPTConfig, tiny_model: GPT) -> None:
    tokenizer = train_tokenizer("bpe:257", ["the whole of it, said the cat — 你好"] * 20)
    lengths = byte_lengths(tokenizer, tiny_config.vocab_size)
    generator = torch.Generator().manual_seed(3)
    metric, nll, tokens, n_bytes = LanguageModelMetric(), 0.0, 0, 0
    for rows, width in ((4, 32), (4, 32), (1, 7)):  # the last batch is short
        idx = torch.randint(257, (rows, width), generator=generator)
        targets = torch.randint(257, (rows, width), generator=generator)
        targets[:, width // 2 :][torch.rand(rows, width - width // 2, generator=generator) < 0.3] = -100
        with torch.no_grad():
            output = tiny_model(idx, targets)
            metric.update(output.loss_sum, output.n_targets, count_bytes(targets, lengths))
            logits = tiny_model(idx).logits.double()
        for row, column in (targets >= 0).nonzero().tolist():
            target = int(targets[row, column])
            nll += (logits[row, column].exp().sum().log() - logits[row, column, target]).item()
            n_bytes += len(tokenizer.token_bytes(target))
            tokens += 1
    figures = metric.compute()
    assert figures["loss"].item() == pytest.approx(nll / tokens, rel=1e-6)
    assert figures["perplexity"].item() == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert figures["bits_per_byte"].item() == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-6)


def test_casts_do_not_reach_the_sums() -> None:
    module = nn.Module()
    module.metric = LanguageModelMetric()
    module.layer = nn.Linear(2, 2)
    module.to(torch.bfloat16)
    module.bfloat16()
    module.half()
    assert module.layer.weight.dtype == torch.float16
    for _ in range(1000):
        module.metric.update(torch.tensor(3.0), torch.tensor(1), 2)
    module.to(torch.bfloat16)
    figures = module.metric.compute()
    assert module.metric.nll.dtype == torch.float64
    assert module.metric.tokens.dtype == module.metric.n_bytes.dtype == torch.int64
    assert figures["loss"].item() == 3.0
    assert figures["bits_per_byte"].item() == pytest.approx(1.5 / math.log(2), rel=1e-12)


def test_bits_per_byte_of_a_uniform_guess_does_not_depend_on_the_tokenizer() -> None:
    """A model that gives each of n bytes 8 bits has 8 bits per byte whatever the tokens are."""
    text = "Wer immer strebend sich bemüht"
    for spec in ("byte", "char", "bpe:300"):
        tokenizer = get_tokenizer(spec) if spec == "byte" else train_tokenizer(spec, [text] * 9)
        ids = torch.tensor(tokenizer.encode(text))
        lengths = byte_lengths(tokenizer, tokenizer.n_vocab)
        assert int(count_bytes(ids, lengths)) == len(text.encode())
        metric = LanguageModelMetric()
        metric.update(torch.tensor(len(text.encode()) * 8 * math.log(2)), torch.tensor(len(ids)), len(text.encode()))
        assert metric.compute()["bits_per_byte"].item() == pytest.approx(8.0)


def test_without_bytes_there_are_no_bits_per_byte() -> None:
    metric = LanguageModelMetric()
    metric.update(torch.tensor(2.0), torch.tensor(1))
    assert set(metric.compute()) == {"loss", "perplexity"}
