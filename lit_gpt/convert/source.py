"""An open checkpoint of any kind, and how its kind is recognised: by what it holds, not by its name."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lit_gpt.checkpoint import KEY, build_model, read_header
from lit_gpt.command import note
from lit_gpt.config import GPTConfig
from lit_gpt.convert.pickles import load_torch, stored_tensors, strip_prefix
from lit_gpt.convert.weights import DTYPES, Entry, Stored, gather, model_shapes
from lit_gpt.errors import UserError, nearest
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer, get_tokenizer

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Source:
    """A checkpoint whose weights have not been read yet.

    Attributes:
        name: what the user called it.
        kind: whose format it is.
        config: the model's shape.
        tokenizer: its tokenizer, or None where the source has none.
        weights: by the names of `GPT.state_dict`; a tied head is not among them.
    """

    name: str
    kind: str
    config: GPTConfig
    tokenizer: Tokenizer | None
    weights: dict[str, Stored]

    def to(self, dtype: str | torch.dtype | None) -> Source:
        """The same with all weights in `dtype`; None keeps each as it is.

        Raises:
            UserError: for an unknown dtype.
        """
        if dtype is None:
            return self
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise UserError(f'unknown dtype "{dtype}": {nearest(dtype, DTYPES)}')
            dtype = DTYPES[dtype]
        return replace(self, weights={name: stored.to(dtype) for name, stored in self.weights.items()})

    def load(self) -> GPT:
        """The model in memory, on the CPU and in eval mode."""
        return build_model(self.config, {name: stored.read() for name, stored in self.weights.items()}, self.name)


def open_source(source: str, tokenizer: str | None = None, n_head: int | None = None) -> Source:
    """Recognise `source` and read everything but its weights. See `lit_gpt.convert.open_source`."""
    path = Path(source).expanduser()
    chosen = None if tokenizer is None else _chosen_tokenizer(tokenizer)
    if path.is_dir():
        return _open_folder(path, source, chosen)
    if path.is_file():
        return _open_file(path, chosen, n_head)
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors") or not _HUB_ID.fullmatch(source):
        raise UserError(
            f"{source} does not exist: give a file, a folder or a Hugging Face id such as openai-community/gpt2"
        )
    from lit_gpt.convert.hf import open_hf
    from lit_gpt.convert.hub import fetch_description, fetch_weights

    folder = fetch_description(source)
    return open_hf(folder, source, chosen, lambda: fetch_weights(source, folder))


def _open_folder(folder: Path, source: str, tokenizer: Tokenizer | None) -> Source:
    if (folder / "config.json").is_file():
        from lit_gpt.convert.hf import open_hf

        return open_hf(folder, source, tokenizer)
    inside = sorted(path.name for path in folder.iterdir() if path.suffix in (".ckpt", ".pt", ".pth"))
    if inside:
        raise UserError(f"{source} is a folder without config.json: did you mean {folder / inside[0]}?")
    raise UserError(f"{source} holds no checkpoint: a Hugging Face folder has config.json and *.safetensors")


def _open_file(path: Path, tokenizer: Tokenizer | None, n_head: int | None) -> Source:
    from lit_gpt.convert import nanogpt, textbooks

    if path.suffix == ".safetensors" or path.name == "config.json":
        raise UserError(f"{path} is part of a Hugging Face folder: give the folder, {path.parent}")
    checkpoint = load_torch(path)
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, no checkpoint: save model.state_dict()")
    if KEY in checkpoint:
        return _open_ours(path, tokenizer)
    if nanogpt.matches(checkpoint):
        return nanogpt.open_nanogpt(path, checkpoint, tokenizer)
    if textbooks.is_transformer_book(checkpoint):
        return textbooks.open_transformer_book(path, checkpoint, tokenizer)
    if textbooks.is_raschka(checkpoint):
        return textbooks.open_raschka(path, checkpoint, tokenizer, n_head)
    found = ", ".join(map(str, list(checkpoint)[:4])) or "nothing"
    raise UserError(
        f"{path} is no checkpoint that is known here (it holds {found} …): known are lit_gpt's, nanoGPT's, "
        '"LLMs from scratch" and the transformer book\'s, and Hugging Face folders'
    )


def _open_ours(path: Path, tokenizer: Tokenizer | None) -> Source:
    """A checkpoint of ours. Lightning's module calls the model `model`."""
    header = read_header(path)
    if tokenizer is None and header.tokenizer is not None:
        tokenizer = Tokenizer.from_dict(header.tokenizer)
    stored = {
        name.removeprefix("model."): tensor
        for name, tensor in stored_tensors(path, "state_dict").items()
        if name.startswith("model.")
    }
    plan = [Entry(name, (name,), (shape,), False) for name, shape in model_shapes(header.config).items()]
    weights = gather(header.config, plan, strip_prefix(stored, "_orig_mod."), str(path), tied_head="lm_head.weight")
    return Source(str(path), "lit_gpt", header.config, tokenizer, weights)


def _chosen_tokenizer(spec: str) -> Tokenizer:
    if spec.endswith(".pkl"):
        from lit_gpt.convert.nanogpt import character_tokenizer

        return character_tokenizer(Path(spec))
    return get_tokenizer(spec)


def named_tokenizer(name: str, vocab_size: int) -> Tokenizer | None:
    """tiktoken's `name` without the tokens past `vocab_size`; None, with a note, where it cannot be had."""
    try:
        whole = get_tokenizer(name)
    except UserError as error:
        note(f"without a tokenizer: {error}")
        return None
    if whole.n_vocab <= vocab_size:
        return whole
    ranks = {token: rank for token, rank in whole.ranks.items() if rank < vocab_size}
    specials = {text: number for text, number in whole.specials.items() if number < vocab_size}
    end = whole.end_of_text if whole.end_of_text in specials else None
    return Tokenizer.build(f"{name}:{vocab_size}", whole.pattern, ranks, specials, end_of_text=end)
