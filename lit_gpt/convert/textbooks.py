"""Checkpoints of two textbooks' models.

"Build a Large Language Model (From Scratch)" saves a bare state dict, or one beside its optimizer; the transformer book
(github.com/waylandzhang/llm-transformer-book) saves `{"model_state_dict", "h_params"}`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_gpt.checkpoint.limits import check_fits
from lit_gpt.checkpoint.torch_file import OpenTorchFile
from lit_gpt.convert.pickles import stored_tensors, strip_prefix
from lit_gpt.convert.source import SourceCheckpoint, named_tokenizer
from lit_gpt.convert.weights import NameTable, StoredTensor, tensor_entries, to_our_names
from lit_gpt.errors import UserError, brief
from lit_gpt.model.config import PRESETS, GPTConfig
from lit_gpt.tokenizer.tokenizer import Tokenizer

RASCHKA_TABLE: NameTable = {
    "wte": "tok_emb",
    "wpe": "pos_emb",
    "h.{}.ln_1.weight": "trf_blocks.{}.norm1.scale",
    "h.{}.ln_1.bias": "trf_blocks.{}.norm1.shift",
    "h.{}.attn.c_attn": tuple(f"trf_blocks.{{}}.att.W_{part}" for part in ("query", "key", "value")),
    "h.{}.attn.c_proj": "trf_blocks.{}.att.out_proj",
    "h.{}.ln_2.weight": "trf_blocks.{}.norm2.scale",
    "h.{}.ln_2.bias": "trf_blocks.{}.norm2.shift",
    "h.{}.mlp.c_fc": "trf_blocks.{}.ff.layers.0",
    "h.{}.mlp.c_proj": "trf_blocks.{}.ff.layers.2",
    "ln_f.weight": "final_norm.scale",
    "ln_f.bias": "final_norm.shift",
    "lm_head": "out_head",
}
# A state dict does not say into how many heads its rows are cut. These widths are GPT-2's; others have to be told.
_HEADS_OF_WIDTH = {
    size.n_embd: size.n_head for size in map(GPTConfig.from_preset, PRESETS) if size.position == "learned"
}
_H_PARAMS = ("context_length", "d_model", "num_blocks", "num_heads", "max_token_value")


def is_raschka(checkpoint: dict[str, Any]) -> bool:
    """Whether this is a state dict of "LLMs from scratch", bare or beside its optimizer."""
    state = checkpoint.get("model_state_dict", checkpoint)
    return isinstance(state, dict) and any(isinstance(name, str) and name.endswith("tok_emb.weight") for name in state)


def open_raschka(
    file: OpenTorchFile, tokenizer: Tokenizer | None, n_head: int | None, n_head_option: str
) -> SourceCheckpoint:
    """A `.pth` of "LLMs from scratch".

    Args:
        file: the checkpoint.
        tokenizer: the user's choice; None for the book's, GPT-2's.
        n_head: number of heads; None for GPT-2's at that width.
        n_head_option: how the user gives it, for the error message.

    Raises:
        UserError: if the number of heads cannot be known, or tensors are missing or do not fit.
    """
    path = file.path
    keys = ("model_state_dict",) if "model_state_dict" in file.content else ()
    stored = strip_prefix(stored_tensors(file, *keys), "_orig_mod.")
    config = _raschka_config(path, stored, n_head, n_head_option)
    check_fits(config, [tensor.shape for tensor in stored.values()], str(path))
    plan = list(tensor_entries(config, RASCHKA_TABLE))
    weights = to_our_names(config, plan, stored, str(path), r"\.att\.mask$")
    if tokenizer is None and config.vocab_size == GPTConfig().vocab_size:
        tokenizer = named_tokenizer("gpt2", config.vocab_size)
    return SourceCheckpoint(str(path), "LLMs from scratch", config, tokenizer, weights, plan)


def _raschka_config(path: Path, stored: dict[str, StoredTensor], n_head: int | None, n_head_option: str) -> GPTConfig:
    width, hidden = _shape(path, stored, "tok_emb.weight"), _shape(path, stored, "trf_blocks.0.ff.layers.0.weight")
    numbers = [name.split(".")[1] for name in stored if name.startswith("trf_blocks.")]
    odd = next((number for number in numbers if not (number.isascii() and number.isdigit() and len(number) < 7)), None)
    if odd is not None:
        raise UserError(f"{path} has a block numbered {brief(odd)}: it is no state dict of the book's GPTModel")
    heads = _HEADS_OF_WIDTH.get(width[1]) if n_head is None else n_head
    if heads is None:
        raise UserError(f"{path} does not say how many heads its width of {width[1]} has: give {n_head_option}")
    return GPTConfig(
        vocab_size=width[0],
        block_size=_shape(path, stored, "pos_emb.weight")[0],
        n_layer=1 + max(map(int, numbers)),
        n_head=heads,
        n_embd=width[1],
        intermediate_size=None if hidden[0] == 4 * width[1] else hidden[0],
        qkv_bias="trf_blocks.0.att.W_query.bias" in stored,
        tie_embeddings=False,
    )


def _shape(path: Path, stored: dict[str, StoredTensor], name: str) -> tuple[int, ...]:
    if name not in stored or len(stored[name].shape) != 2:
        raise UserError(f"{path} has no matrix {name}: it is no state dict of the book's GPTModel")
    return stored[name].shape


def is_transformer_book(checkpoint: dict[str, Any]) -> bool:
    """Whether this is the transformer book's `model.ckpt`."""
    return isinstance(checkpoint.get("model_state_dict"), dict) and isinstance(checkpoint.get("h_params"), dict)


def open_transformer_book(file: OpenTorchFile, tokenizer: Tokenizer | None) -> SourceCheckpoint:
    """The transformer book's `model.ckpt`.

    Its vocabulary ends at the largest id that its training text held, so the tokenizer is `cl100k_base` without the
    tokens past that.

    Raises:
        UserError: for hyperparameters or tensors that are missing or do not fit.
    """
    path, values = file.path, file.content["h_params"]
    missing = [name for name in _H_PARAMS if not isinstance(values.get(name), int)]
    if missing:
        raise UserError(f"{path}: h_params lacks {', '.join(missing)}: it was not written by the book's train.py")
    config = GPTConfig(
        vocab_size=values["max_token_value"],
        block_size=values["context_length"],
        n_layer=values["num_blocks"],
        n_head=values["num_heads"],
        n_embd=values["d_model"],
        mlp="relu",
        position="sinusoidal",
        qkv_bias=False,
        head_bias=True,
        tie_embeddings=False,
        dropout=values.get("dropout", 0.0),
    )
    stored = strip_prefix(stored_tensors(file, "model_state_dict"), "_orig_mod.")
    check_fits(config, [tensor.shape for tensor in stored.values()], str(path))
    plan = list(tensor_entries(config, transformer_book_table(config)))
    weights = to_our_names(config, plan, stored, str(path), r"\.mha\.heads\.\d+\.(mask|tril)$")
    tokenizer = tokenizer or named_tokenizer("cl100k_base", config.vocab_size)
    return SourceCheckpoint(str(path), "transformer book", config, tokenizer, weights, plan)


def transformer_book_table(config: GPTConfig) -> NameTable:
    """The book's names. Each head has matrices of its own: our rows are all queries, then all keys, then all values."""
    block = "transformer_blocks.{}."
    heads = [f"{block}mha.heads.{head}.W{part}" for part in "qkv" for head in range(config.n_head)]
    return {
        "wte": "token_embedding_lookup_table",
        "h.{}.ln_1": block + "ln1",
        "h.{}.attn.c_attn": tuple(heads),
        "h.{}.attn.c_proj": block + "mha.projection_layer",
        "h.{}.ln_2": block + "ln2",
        "h.{}.mlp.c_fc": block + "ffn.ffn.0",
        "h.{}.mlp.c_proj": block + "ffn.ffn.2",
        "ln_f": f"transformer_blocks.{config.n_layer}",
        "lm_head": "model_out_linear_layer",
    }
