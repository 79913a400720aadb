"""nanoGPT's `ckpt.pt` (github.com/karpathy/nanoGPT): the model, its arguments, and characters from `meta.pkl`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from lit_gpt.checkpoint.limits import check_fits
from lit_gpt.checkpoint.torch_file import OpenTorchFile
from lit_gpt.console.messages import note
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
CHECKPOINT = "ckpt.pt"
"""What nanoGPT's `train.py` calls it in its `--out_dir`."""
_META = "meta.pkl"
_MASK = r"\.attn\.bias$"  # the causal mask, a buffer where there is no flash attention
_GPT2_VOCAB, _GPT2_PADDED = 50257, 50304  # 64 · 786: nanoGPT's own padding of GPT-2's vocabulary
_LONGEST_NAME = 200  # of a folder, in bytes
_ARGUMENTS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")


def is_nanogpt(checkpoint: dict[str, Any]) -> bool:
    """Whether this is what nanoGPT's `train.py` saves."""
    return isinstance(checkpoint.get("model"), dict) and isinstance(checkpoint.get("model_args"), dict)


def open_nanogpt(file: OpenTorchFile, tokenizer: Tokenizer | None) -> SourceCheckpoint:
    """nanoGPT's checkpoint.

    Args:
        file: the checkpoint.
        tokenizer: the user's choice; None for the `meta.pkl` of its data, or GPT-2's where the vocabulary has its size.

    Raises:
        UserError: for arguments or tensors that are missing or do not fit.
    """
    path = file.path
    config = nanogpt_config(path, file.content["model_args"])
    stored = strip_prefix(stored_tensors(file, "model"), "_orig_mod.")  # torch.compile's prefix
    check_fits(config, [tensor.shape for tensor in stored.values()], str(path))
    plan = list(tensor_entries(config, TABLE))
    weights = to_our_names(config, plan, stored, str(path), _MASK, "lm_head.weight")
    if tokenizer is None:
        tokenizer = _find_characters(path, _dataset(file.content), config.vocab_rows)
    if tokenizer is None and config.vocab_size == _GPT2_VOCAB:
        tokenizer = named_tokenizer("gpt2", config.vocab_size)
    elif tokenizer is None:
        note(f"without a tokenizer: to add one, copy {_META} from nanoGPT's data folder to {path.parent}")
    return SourceCheckpoint(str(path), "nanoGPT", config, tokenizer, weights, plan)


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


def _dataset(checkpoint: dict[str, Any]) -> str | None:
    """The folder in nanoGPT's `data/` that the checkpoint's config names; None for a name that leads out of there."""
    config = checkpoint.get("config")
    name = config.get("dataset") if isinstance(config, dict) else None
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        return None
    path = PurePosixPath(name)
    return None if path.is_absolute() or ".." in path.parts else name


def _meta_paths(checkpoint: Path, dataset: str | None) -> Iterator[Path]:
    """Where the characters of a checkpoint may be: nanoGPT writes to `out/`, and has its data in `data/DATASET/`."""
    yield checkpoint.with_name(_META)
    project = checkpoint.absolute().parent.parent
    if dataset is not None:
        yield project / "data" / dataset / _META
    yield project / _META


def _find_characters(checkpoint: Path, dataset: str | None, rows: int) -> Tokenizer | None:
    """The tokenizer of the `meta.pkl` that belongs to a checkpoint; None if there is none.

    One that is not beside the checkpoint may be of other data by now: it must have as many characters as the model has.

    Args:
        checkpoint: the file.
        dataset: as its config names it.
        rows: of the model's embedding.

    Raises:
        UserError: if the first that is found is damaged, wants to run code, or has ids that the model lacks.
    """
    for path in _meta_paths(checkpoint, dataset):
        if not os.path.isfile(path):  # False as well where it may not be looked at
            continue
        ids = _character_ids(path)
        if path.parent != checkpoint.parent:
            if len(ids) != rows:
                note(f"{path} has {len(ids)} characters, the model {rows}: it is not used")
                continue
            note(f"characters of {path}")
        elif max(ids.values(), default=0) >= rows:
            raise UserError(
                f"{path} has ids up to {max(ids.values())}, the model {rows} tokens: copy the one of its data there"
            )
        return _characters(ids)
    return None


def character_tokenizer(path: Path) -> Tokenizer:
    """The characters of nanoGPT's `meta.pkl`, with its ids.

    Bytes that it has no character for get ids past the model's vocabulary, so that text with a character that the model
    never saw is noticed and not misread.

    Raises:
        UserError: if the pickle wants to run code or holds something else.
    """
    return _characters(_character_ids(path))


def _character_ids(path: Path) -> dict[str, int]:
    """Character → id of a `meta.pkl`. Raises UserError as `character_tokenizer`."""
    meta = load_plain_pickle(path)
    table = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(table, dict) or not all(isinstance(c, str) and isinstance(i, int) for c, i in table.items()):
        raise UserError(f"{path} holds no characters with their ids (stoi): give nanoGPT's own meta.pkl")
    odd = next((text for text in table if len(text) != 1), None)
    if odd is not None:
        raise UserError(
            f"{path} holds {brief(odd)}, which is not one character: only character vocabularies are converted"
        )
    return table


def _characters(table: dict[str, int]) -> Tokenizer:
    """The tokenizer with these ids of characters."""
    ranks = {character.encode("utf-8", "surrogatepass"): number for character, number in table.items()}
    free = max(ranks.values(), default=-1) + 1
    absent = (byte for byte in EVERY_BYTE if byte not in ranks)
    ranks.update({byte: free + i for i, byte in enumerate(absent)})
    return Tokenizer.build("char", CHARACTERS, ranks, {}, end_of_text=None)
