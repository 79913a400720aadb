"""Checkpoints of tiny bases and adapters, as `fit` writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from models import tiny_gpt

from lit_gpt.checkpoint.adapter import AdapterEntry
from lit_gpt.checkpoint.format import KEY, model_checkpoint, save_checkpoint, save_model
from lit_gpt.convert.recognise import open_source
from lit_gpt.model.lora import LoRAConfig, adapter_state, add_lora
from lit_gpt.tokenizer.chat_template import with_chat_template
from lit_gpt.tokenizer.tokenizer import get_tokenizer


def save_base(path: Path, seed: int = 0) -> Path:
    """A random model of bytes."""
    save_model(path, tiny_gpt(seed, std=None, dtype=torch.float32, block_size=64, init_std=0.3), get_tokenizer("byte"))
    return path


def save_adapter(path: Path, base: Path, seed: int, lora: LoRAConfig | None = None, chat: bool = False) -> Path:
    """A random adapter of `base`, with the special tokens of our chat template if it is for `chat`."""
    source, lora = open_source(str(base)), lora or LoRAConfig(rank=2, alpha=8.0)
    model, tokenizer, config = source.load(), source.tokenizer, source.config
    assert tokenizer is not None
    torch.manual_seed(seed)
    add_lora(model, config, lora)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.3)
    state = adapter_state(model)
    if chat:
        tokenizer = with_chat_template(tokenizer)
        state["wte.rows"] = torch.randn(tokenizer.n_vocab - config.vocab_size, config.n_embd)
        config = replace(config, vocab_size=tokenizer.n_vocab)
    checkpoint = model_checkpoint(config, tokenizer, state)
    entry = AdapterEntry(str(base.resolve()), source.weights_sha256, source.config.vocab_size, lora)
    checkpoint[KEY]["adapter"] = entry.to_dict()
    save_checkpoint(path, checkpoint)
    return path
