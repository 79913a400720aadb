"""Which kind of checkpoint something is: told by what it holds, not by its name."""

from __future__ import annotations

import re
from pathlib import Path

from lit_gpt.checkpoint import KEY, read_header
from lit_gpt.convert import nanogpt, textbooks
from lit_gpt.convert.hf import open_hf
from lit_gpt.convert.hub import fetch_description, fetch_weights
from lit_gpt.convert.pickles import load_torch, stored_tensors, strip_prefix
from lit_gpt.convert.source import Source
from lit_gpt.convert.weights import Entry, gather, model_shapes
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Tokenizer, get_tokenizer

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}")


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
    folder = fetch_description(source)
    return open_hf(folder, source, chosen, lambda: fetch_weights(source, folder))


def _open_folder(folder: Path, source: str, tokenizer: Tokenizer | None) -> Source:
    if (folder / "config.json").is_file():
        return open_hf(folder, source, tokenizer)
    inside = sorted(path.name for path in folder.iterdir() if path.suffix in (".ckpt", ".pt", ".pth"))
    if inside:
        raise UserError(f"{source} is a folder without config.json: did you mean {folder / inside[0]}?")
    raise UserError(f"{source} holds no checkpoint: a Hugging Face folder has config.json and *.safetensors")


def _open_file(path: Path, tokenizer: Tokenizer | None, n_head: int | None) -> Source:
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
        return nanogpt.character_tokenizer(Path(spec))
    return get_tokenizer(spec)
