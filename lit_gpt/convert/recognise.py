"""The kind of a checkpoint, recognised by what it holds and not by its name.

What only Hugging Face's models and GGUF files need (`huggingface_hub`, `tokenizers`, `gguf`) is imported when one is
opened.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lit_gpt.checkpoint.format import KEY, Header, check_ours, header_of, resolve_ckpt_path
from lit_gpt.checkpoint.frozen import Manifest, frozen_checkpoint, read_manifest
from lit_gpt.checkpoint.torch_file import OpenTorchFile
from lit_gpt.checkpoint.training_record import training_record
from lit_gpt.convert import nanogpt, textbooks
from lit_gpt.convert.adapters import Adapter, merged, read_adapter
from lit_gpt.convert.endpoint import check_endpoint
from lit_gpt.convert.peft_config import CONFIG as ADAPTER_CONFIG
from lit_gpt.convert.pickles import stored_tensors, strip_prefix
from lit_gpt.convert.source import SourceCheckpoint
from lit_gpt.convert.weights import TensorEntry, model_shapes, to_our_names
from lit_gpt.errors import UserError, brief
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer

if TYPE_CHECKING:
    import torch

    from lit_gpt.model.gpt import GPT

OURS = "lit_gpt"
N_HEAD_KEYWORD = "n_head=N"
CONVERTED = "the .ckpt that lit_gpt convert --n_head N makes of it"
"""How to give the heads of a checkpoint, such as a draft, for which a command has no flag of its own."""
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}")


def open_source(
    source: str, tokenizer: str | None = None, n_head: int | None = None, n_head_option: str = N_HEAD_KEYWORD
) -> SourceCheckpoint:
    """Recognise a checkpoint of any kind and read everything but its weights.

    Args:
        source: a Hugging Face folder or id, a GGUF file, nanoGPT's `ckpt.pt` or the folder that has it, a `.pth` of
            "LLMs from scratch", the transformer book's `model.ckpt`, a checkpoint of ours, or `frozen:NAME`. An id that
            is not in the cache is downloaded.
        tokenizer: to use instead of the source's: what `get_tokenizer` takes, or the path of nanoGPT's `meta.pkl`.
        n_head: number of heads, where the source does not say.
        n_head_option: how the user gives `n_head`: a keyword, or a flag of the command that runs. For errors.

    Returns:
        An object with `config`, `tokenizer` (None where there is none), `weights` (read when needed) and `load()`.

    Raises:
        UserError: if it is none of these, cannot be had, is damaged, wants to run code, describes a model that this
            project does not express (naming the field), or has another number of heads.
    """
    chosen = None if tokenizer is None else _chosen_tokenizer(tokenizer)
    opened = _open(source, chosen, n_head, n_head_option)
    if opened.is_adapter and chosen is not None:
        opened = replace(opened, tokenizer=chosen)
    if n_head not in (None, opened.config.n_head):
        raise UserError(f"n_head={n_head}, but {source} has {opened.config.n_head} heads and says so: leave it out")
    return opened


def open_base(header: Header, named: str | None = None) -> SourceCheckpoint:
    """The base of an adapter's checkpoint, not compared with it yet.

    Args:
        header: of the adapter.
        named: where the user says that the base is; None for where it was in training.

    Raises:
        UserError: if it cannot be opened there, or is an adapter itself.
    """
    assert header.adapter is not None
    return _base(named or header.adapter.base, str(header.path))


def _base(address: str, adapter: str) -> SourceCheckpoint:
    try:
        return _open(address, None, None, CONVERTED, adapters=False)
    except UserError as error:
        raise UserError(
            f"the base of the adapter {adapter}: {error}. If it is elsewhere now: --ckpt_path {adapter} "
            f"--init_from BASE, or lit_gpt convert BASE {adapter} OUTPUT"
        ) from None


def open_adapter(path: str, base: SourceCheckpoint) -> Adapter:
    """An adapter of ours, or a folder of PEFT's, over a base.

    Raises:
        UserError: if it is none, is damaged, or belongs to another base.
    """
    found = resolve_ckpt_path(path).expanduser()
    if found.is_dir():
        from lit_gpt.convert.peft import is_peft, read_peft

        if not is_peft(found):
            raise UserError(f"{path} has no adapter_config.json: give an adapter's .ckpt, or a folder of PEFT's")
        return read_peft(found, base, path)
    if not found.is_file():
        raise UserError(f"the adapter {path} does not exist: give an adapter's .ckpt, or a folder of PEFT's")
    file = OpenTorchFile(found)
    check_ours(file.content, found)
    header = header_of(file.content, found)
    if header.adapter is None:
        raise UserError(f"{path} is a whole model, no adapter: give it by --ckpt_path, or merge nothing into it")
    return read_adapter(file, header, base, path)


def open_adapter_and_base(path: str) -> tuple[Adapter, SourceCheckpoint]:
    """An adapter over the base that it names itself.

    Raises:
        UserError: as `open_adapter`, or if the base is not where it was.
    """
    found = resolve_ckpt_path(path).expanduser()
    if found.is_dir() and (found / ADAPTER_CONFIG).is_file():
        from lit_gpt.convert.peft import base_address

        base = _base(base_address(found), path)
    else:
        file = OpenTorchFile(found)
        check_ours(file.content, found)
        header = header_of(file.content, found)
        if header.adapter is None:
            raise UserError(f"{path} is a whole model, no adapter: leave --to peft out")
        base = open_base(header)
    return open_adapter(path, base), base


def _open(
    source: str, chosen: Tokenizer | None, n_head: int | None, n_head_option: str, adapters: bool = True
) -> SourceCheckpoint:
    """`open_source`, in which an adapter is merged with its base, unless `adapters` are refused."""
    path = frozen_checkpoint(source) or Path(source).expanduser()
    if path.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            return _open_peft(path, source, adapters)
        if (path / nanogpt.CHECKPOINT).is_file() and not (path / "config.json").is_file():
            return _open_file(path / nanogpt.CHECKPOINT, chosen, n_head, n_head_option)
        return _open_folder(path, source, chosen)
    if path.is_file():
        return _open_file(path, chosen, n_head, n_head_option, adapters)
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".gguf") or not _HUB_ID.fullmatch(source):
        raise UserError(
            f"{source} does not exist: give a file, a folder or a Hugging Face id such as openai-community/gpt2"
        )
    check_endpoint()
    from lit_gpt.convert.hf import open_hf
    from lit_gpt.convert.hub import fetch_description, fetch_weights

    folder = fetch_description(source)
    return open_hf(folder, source, chosen, lambda: fetch_weights(source, folder))


def load_source(
    source: str,
    dtype: str | torch.dtype | None = None,
    n_head: int | None = None,
    n_head_option: str = N_HEAD_KEYWORD,
) -> tuple[GPT, Tokenizer | None]:
    """The model (on the CPU, in eval mode) and tokenizer of a checkpoint of any kind; what `--init_from` takes.

    Args:
        source: as for `open_source`.
        dtype: of the weights; None keeps the source's.
        n_head: as for `open_source`.
        n_head_option: likewise.

    Raises:
        UserError: as `open_source`, or for an unknown dtype.
    """
    opened = open_source(source, None, n_head, n_head_option)
    return opened.to(dtype).load(), opened.tokenizer


def frozen_manifest(source: str) -> Manifest | None:
    """The manifest of the frozen model that `frozen:NAME` names; None for a source of another kind.

    Raises:
        UserError: if there is none of that name, or its manifest is damaged.
    """
    checkpoint = frozen_checkpoint(source)
    return None if checkpoint is None else read_manifest(checkpoint.parent)


def files_of_source(source: str) -> list[Path]:
    """The files here that `source` of `open_source` is made of, in the order of their names; none of what is not here.

    A Hugging Face id is the folder of its commit in the cache.
    """
    path = frozen_checkpoint(source) or Path(source).expanduser()
    if not path.exists() and _HUB_ID.fullmatch(source):
        from lit_gpt.convert.hub import cached_folder

        path = cached_folder(source) or path
    if path.is_dir():
        return sorted(item for item in path.iterdir() if item.is_file())
    return [path] if path.is_file() else []


def _open_folder(folder: Path, source: str, tokenizer: Tokenizer | None) -> SourceCheckpoint:
    if (folder / "config.json").is_file():
        from lit_gpt.convert.hf import open_hf

        return open_hf(folder, source, tokenizer)
    inside = sorted(path.name for path in folder.iterdir() if path.suffix in (".ckpt", ".pt", ".pth", ".gguf"))
    if inside:
        raise UserError(f"{source} is a folder without config.json: did you mean {folder / inside[0]}?")
    raise UserError(
        f"{source} holds no checkpoint: a Hugging Face folder has config.json and *.safetensors, one of nanoGPT "
        f"{nanogpt.CHECKPOINT}"
    )


def _open_peft(folder: Path, source: str, adapters: bool) -> SourceCheckpoint:
    from lit_gpt.convert.peft import base_address, read_peft

    _refuse_adapter(source, adapters)
    base = _base(base_address(folder), source)
    return merged(base, read_peft(folder, base, source))


def _refuse_adapter(source: str, adapters: bool) -> None:
    if not adapters:
        raise UserError(f"{source} is an adapter itself: make one model of it and its base by lit_gpt convert")


def _open_file(
    path: Path, tokenizer: Tokenizer | None, n_head: int | None, n_head_option: str, adapters: bool = True
) -> SourceCheckpoint:
    if path.suffix == ".safetensors" or path.name == "config.json":
        raise UserError(f"{path} is part of a Hugging Face folder: give the folder, {path.parent}")
    if path.suffix == ".gguf" or begins_as_gguf(path):
        from lit_gpt.convert.gguf_read import open_gguf

        return open_gguf(path, tokenizer)
    file = OpenTorchFile(path)
    checkpoint = file.content
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, no checkpoint: save model.state_dict()")
    if KEY in checkpoint:
        return _open_ours(file, tokenizer, adapters)
    if nanogpt.is_nanogpt(checkpoint):
        return nanogpt.open_nanogpt(file, tokenizer)
    if textbooks.is_transformer_book(checkpoint):
        return textbooks.open_transformer_book(file, tokenizer)
    if textbooks.is_raschka(checkpoint):
        return textbooks.open_raschka(file, tokenizer, n_head, n_head_option)
    found = ", ".join(
        name if isinstance(name, str) and len(name) < 80 else brief(name) for name in list(checkpoint)[:4]
    )
    raise UserError(
        f"{path} is no checkpoint that is known here (it holds {found or 'nothing'}): known are lit_gpt's, nanoGPT's, "
        '"LLMs from scratch" and the transformer book\'s, and Hugging Face folders'
    )


def begins_as_gguf(path: Path) -> bool:
    """Whether a file has GGUF's first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False  # what is wrong with it is said by what reads it


def _open_ours(file: OpenTorchFile, tokenizer: Tokenizer | None, adapters: bool) -> SourceCheckpoint:
    """A checkpoint of ours. Lightning's module calls the model `model`."""
    path = file.path
    check_ours(file.content, path)
    header = header_of(file.content, path)
    if header.adapter is not None:
        _refuse_adapter(str(path), adapters)
        base = open_base(header)
        return merged(base, read_adapter(file, header, base, str(path)))
    if tokenizer is None and header.tokenizer is not None:
        tokenizer = Tokenizer.from_dict(header.tokenizer, str(path))
    stored = {
        name.removeprefix("model."): tensor
        for name, tensor in stored_tensors(file, "state_dict").items()
        if name.startswith("model.")
    }
    plan = [TensorEntry(name, (name,), (shape,), False) for name, shape in model_shapes(header.config).items()]
    weights = to_our_names(
        header.config, plan, strip_prefix(stored, "_orig_mod."), str(path), tied_head="lm_head.weight"
    )
    return SourceCheckpoint(str(path), OURS, header.config, tokenizer, weights, plan, training_record(file, header))


def _chosen_tokenizer(spec: str) -> Tokenizer:
    if spec.endswith(".pkl"):
        return nanogpt.character_tokenizer(Path(spec))
    return get_tokenizer(spec)
