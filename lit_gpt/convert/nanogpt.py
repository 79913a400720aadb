"""nanoGPT's `ckpt.pt` (github.com/karpathy/nanoGPT): the model, its arguments, and characters from `meta.pkl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_gpt.checkpoint.limits import check_fits
from lit_gpt.checkpoint.torch_file import OpenTorchFile
from lit_gpt.console import note
from lit_gpt.convert.pickles import load_plain_pickle, stored_tensors, strip_prefix
from lit_gpt.convert.source import SourceCheckpoint, named_tokenizer
from lit_gpt.convert.weights import NameTable, tensor_entries, to_our_names
from lit_gpt.errors import UserError, brief
from lit_gpt.model.config import GPTConfig
from lit_gpt.tokenizer.tokenizer import CHARACTERS, EVERY_BYTE, Tokenizer

TABLE: NameTable = {
    "wte": "transformer.wte",
    "wpe": "transformer.wpe",
    "h.{}.ln_1": "transformer.h.{}.ln_1",
    "h.{}.attn.c_attn": "transformer.h.{}.attn.c_attn",
    "h.{}.attn.c_proj": "transformer.h.{}.attn.c_proj",
    "h.{}.ln_2": "transformer.h.{}.ln_2",
    "h.{}.mlp.c_fc": "transformer.h.{}.mlp.c_fc",
    "h.{}.mlp.c_proj": "transformer.h.{}.mlp.c_proj",
    "ln_f": "transformer.ln_f",
}
_MASK = r"\.attn\.bias$"  # the causal mask, a buffer where there is no flash attention
_GPT2_VOCAB, _GPT2_PADDED = 50257, 50304  # 64 · 786: nanoGPT's own padding of GPT-2's vocabulary
_ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")


def is_nanogpt(checkpoint: dict[str, Any]) -> bool:
    """Whether this is what nanoGPT's `train.py` saves."""
    return isinstance(checkpoint.get("model"), dict) and isinstance(checkpoint.get("model_args"), dict)


def open_nanogpt(file: OpenTorchFile, tokenizer: Tokenizer | None) -> SourceCheckpoint:
    """nanoGPT's checkpoint.

    Args:
        file: the checkpoint.
        tokenizer: the user's choice; None for `meta.pkl` beside the file, or GPT-2's where the vocabulary has its size.

    Raises:
        UserError: for arguments or tensors that are missing or do not fit.
    """
    path = file.path
    config = nanogpt_config(path, file.content["model_args"])
    stored = strip_prefix(stored_tensors(file, "model"), "_orig_mod.")  # torch.compile's prefix
    check_fits(config, [tensor.shape for tensor in stored.values()], str(path))
    weights = to_our_names(config, list(tensor_entries(config, TABLE)), stored, str(path), _MASK, "lm_head.weight")
    meta = path.with_name("meta.pkl")
    if tokenizer is None and meta.is_file():
        tokenizer = character_tokenizer(meta)
    if tokenizer is None and config.vocab_size == _GPT2_VOCAB:
        tokenizer = named_tokenizer("gpt2", config.vocab_size)
    elif tokenizer is None:
        note(f"without a tokenizer: to add one, copy meta.pkl from nanoGPT's data folder to {path.parent}")
    return SourceCheckpoint(str(path), "nanoGPT", config, tokenizer, weights)


def nanogpt_config(path: Path, arguments: dict[str, Any]) -> GPTConfig:
    """nanoGPT's `model_args` as a config. Its activation is the exact GELU, unlike GPT-2's.

    Raises:
        UserError: if an argument is missing.
    """
    missing = [name for name in _ARGUMENTS if arguments.get(name) is None]
    if missing:
        raise UserError(f"{path}: model_args lacks {', '.join(missing)}: it was not written by nanoGPT's train.py")
    bias = bool(arguments["bias"])
    rows = arguments["vocab_size"]
    return GPTConfig(
        vocab_size=_GPT2_VOCAB if rows == _GPT2_PADDED else rows,
        padded_vocab_size=rows if rows == _GPT2_PADDED else None,
        block_size=arguments["block_size"],
        n_layer=arguments["n_layer"],
        n_head=arguments["n_head"],
        n_embd=arguments["n_embd"],
        mlp="gelu",
        norm_bias=bias,
        qkv_bias=bias,
        proj_bias=bias,
        mlp_bias=bias,
        dropout=arguments.get("dropout", 0.0),
    )


def character_tokenizer(path: Path) -> Tokenizer:
    """The characters of nanoGPT's `meta.pkl`, with its ids.

    Bytes that it has no character for get ids past the model's vocabulary, so that text with a character that the model
    never saw is noticed and not misread.

    Raises:
        UserError: if the pickle wants to run code or holds something else.
    """
    meta = load_plain_pickle(path)
    table = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(table, dict) or not all(isinstance(c, str) and isinstance(i, int) for c, i in table.items()):
        raise UserError(f"{path} holds no characters with their ids (stoi): give nanoGPT's own meta.pkl")
    odd = next((text for text in table if len(text) != 1), None)
    if odd is not None:
        raise UserError(
            f"{path} holds {brief(odd)}, which is not one character: only character vocabularies are converted"
        )
    ranks = {character.encode("utf-8", "surrogatepass"): number for character, number in table.items()}
    free = max(ranks.values(), default=-1) + 1
    absent = (byte for byte in EVERY_BYTE if byte not in ranks)
    ranks.update({byte: free + i for i, byte in enumerate(absent)})
    return Tokenizer.build("char", CHARACTERS, ranks, {}, end_of_text=None)
