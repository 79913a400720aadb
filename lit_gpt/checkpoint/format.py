"""Our checkpoint on disk ↔ model and tokenizer, safely and whole. Knows no Lightning, so that serving starts fast.

The file is what Lightning writes (`torch.save` of plain values and tensors) with one entry of ours, "lit_gpt", which
makes it complete: shape, tokenizer, precision. It is always read with `weights_only=True`: no code in it can run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.checkpoint.adapter import AdapterEntry
from lit_gpt.checkpoint.frozen import frozen_checkpoint
from lit_gpt.checkpoint.limits import check_fits, check_plain
from lit_gpt.checkpoint.torch_file import OpenTorchFile, check_tensors, load_torch_file
from lit_gpt.errors import UserError, brief
from lit_gpt.files.atomic import atomic_write
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.model.uninitialized import empty_gpt
from lit_gpt.tokenizer.tokenizer import Tokenizer

FORMAT_VERSION = 1
KEY = "lit_gpt"
_PREFIX = "model."
_COMPILED_PREFIX = "_orig_mod."
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHOWN_FAULTS = 20


@dataclass(frozen=True)
class Header:
    """Everything in a checkpoint but its weights.

    Attributes:
        path: the file.
        config: the model's shape.
        tokenizer: `Tokenizer.to_dict()`, or None for a model that was trained on bare ids.
        precision: the Trainer precision that it was trained with, if known.
        hyper_parameters: the LightningModule's, plain values.
        data: the DataModule's, plain values.
        step: optimizer steps taken.
        epoch: whole passes over the data, as Lightning counts them.
        adapter: the base that the weights belong to, where they are an adapter's; None for a whole model.
    """

    path: Path
    config: GPTConfig
    tokenizer: dict[str, Any] | None
    precision: str | None
    hyper_parameters: dict[str, Any]
    data: dict[str, Any]
    step: int
    epoch: int
    adapter: AdapterEntry | None = None


def header_entry(config: GPTConfig, tokenizer: Tokenizer | None, precision: str | None = None) -> dict[str, Any]:
    """The value of the checkpoint's "lit_gpt" entry."""
    return {
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "tokenizer": None if tokenizer is None else tokenizer.to_dict(),
        "precision": precision,
    }


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read everything but the weights, in milliseconds whatever the model's size.

    Raises:
        UserError: if the file is missing, damaged, not a checkpoint of ours, of a newer format, or describes a larger
            model than it holds.
    """
    return header_of(load_checkpoint(path, "meta"), path)


def header_of(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> Header:
    """The header of what `load_checkpoint` gave.

    Raises:
        UserError: if the config is wrong, or describes a larger model than the file holds.
    """
    entry = checkpoint[KEY]
    try:
        config = GPTConfig.from_dict(_with_old_default(entry["config"]))
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from None
    found = entry.get("adapter")
    adapter = None if found is None else AdapterEntry.from_dict(found, f"checkpoint {path}")
    if adapter is None:  # an adapter's config is compared with that of its base
        shapes = [tuple(tensor.shape) for tensor in _weights_of(checkpoint["state_dict"]).values()]
        check_fits(config, shapes, f"checkpoint {path}")
    return Header(
        path=Path(path),
        config=config,
        tokenizer=entry["tokenizer"],
        precision=entry.get("precision"),
        hyper_parameters=checkpoint.get("hyper_parameters") or {},
        data=checkpoint.get("datamodule_hyper_parameters") or {},
        step=checkpoint.get("global_step") or 0,
        epoch=checkpoint.get("epoch") or 0,
        adapter=adapter,
    )


def _with_old_default(values: Any) -> Any:
    """A config of before SwiGLU's default width was 8/3 · `n_embd` and was filled in: no width means 4 · `n_embd`."""
    if not isinstance(values, dict) or values.get("mlp") != "swiglu" or values.get("intermediate_size") is not None:
        return values
    width = values.get("n_embd", GPTConfig.n_embd)
    return {**values, "intermediate_size": 4 * width} if isinstance(width, int) else values


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The model's tensors by the names of `GPT.state_dict`, mapped from the file rather than copied."""
    return _weights_of(load_checkpoint(path)["state_dict"])


def _weights_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = ((name.removeprefix(_PREFIX), tensor) for name, tensor in state.items() if name.startswith(_PREFIX))
    return {name.removeprefix(_COMPILED_PREFIX): tensor for name, tensor in ours}


def load_model(path: str | os.PathLike[str]) -> tuple[GPT, Tokenizer | None]:
    """The model (on the CPU, in the dtype it was saved in, in eval mode) and its tokenizer.

    The weights are in memory of their own: what is written to the file later does not reach a model in use.

    Raises:
        UserError: as `read_header`, or if the weights do not fit the shape that the file itself states.
    """
    file, header = open_checkpoint(path)
    if header.adapter is not None:
        raise UserError(f"{path} is an adapter of {header.adapter.base}: `lit_gpt convert` makes one model of both")
    tokenizer = None if header.tokenizer is None else Tokenizer.from_dict(header.tokenizer, str(path))
    stored = _weights_of(file.tensors("state_dict"))
    if header.config.tie_embeddings and "wte.weight" in stored:
        stored.pop("lm_head.weight", None)  # which is the same
    weights = {name: file.read(tensor) for name, tensor in stored.items()}
    return build_model(header.config, weights, str(path)), tokenizer


def open_checkpoint(path: str | os.PathLike[str]) -> tuple[OpenTorchFile, Header]:
    """A checkpoint, unpickled once, none of its weights read yet.

    Raises:
        UserError: as `read_header`.
    """
    file = OpenTorchFile(_existing(path))
    check_ours(file.content, file.path)
    return file, header_of(file.content, path)


def build_model(config: GPTConfig, weights: dict[str, Tensor], source: str) -> GPT:
    """A GPT in eval mode that uses `weights` as they are, without a second copy in memory.

    Raises:
        UserError: listing what is missing, unexpected and misshapen of `source`.
    """
    model = empty_gpt(config)
    if config.tie_embeddings and "wte.weight" in weights:
        weights = {**weights, "lm_head.weight": weights["wte.weight"]}
    check_weights(model, weights, source)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()


def check_weights(model: GPT, weights: dict[str, Tensor], source: str) -> None:
    """Compare `weights` with the model's names and shapes, and with the types that a model can have.

    Raises:
        UserError: listing missing, unexpected and misshapen tensors.
    """
    wanted = model.state_dict()
    faults = [f"{name} is missing" for name in wanted if name not in weights]
    faults += [f"{name} is not part of this model" for name in weights if name not in wanted]
    faults += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    faults += [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not a float of 16 bits or more"
        for name, tensor in weights.items()
        if tensor.dtype not in _DTYPES
    ]
    if faults:
        raise UserError(f"the weights in {source} do not fit the model: {list_faults(faults)}")


def list_faults(faults: list[str]) -> str:
    """The first faults in one line, and how many more there are."""
    shown = "; ".join(faults[:_SHOWN_FAULTS])
    return f"{shown}; and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else shown


def save_model(path: str | os.PathLike[str], model: GPT, tokenizer: Tokenizer | None) -> None:
    """Write model and tokenizer as a checkpoint that every command takes, without training state."""
    save_checkpoint(path, model_checkpoint(model.config, tokenizer, model.state_dict()))


def model_checkpoint(config: GPTConfig, tokenizer: Tokenizer | None, state: dict[str, Tensor]) -> dict[str, Any]:
    """The checkpoint dict of a model without training state; `state` is by the names of `GPT.state_dict`."""
    return {
        "state_dict": {_PREFIX + name: tensor for name, tensor in state.items()},
        "hyper_parameters": {"config": config.to_dict()},
        "epoch": 0,
        "global_step": 0,
        # Lightning refuses to read a checkpoint that does not say which Lightning wrote it.
        "pytorch-lightning_version": version("lightning"),
        KEY: header_entry(config, tokenizer),
    }


def save_checkpoint(path: str | os.PathLike[str], checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint dict whole: to a file beside `path`, flushed, then renamed."""
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path: str | os.PathLike[str], device: str = "cpu") -> dict[str, Any]:
    """The checkpoint's dict, tensors mapped from the file (or without data, on the meta device).

    Raises:
        UserError: if the file is missing, damaged, not a checkpoint of ours or of a newer format.
    """
    path = _existing(path)
    checkpoint = load_torch_file(path, device)
    check_ours(checkpoint, path)
    return checkpoint


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        where = "is a folder, not a checkpoint" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {where}: give the path of a .ckpt file, or `last` for the newest run")
    return path


def check_ours(checkpoint: object, path: Path) -> None:
    """Check what a file holds, which is then read as a checkpoint of ours.

    Raises:
        UserError: if it is none, or damaged, or of a newer format.
    """
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        raise UserError(f"{path} is not a lit_gpt checkpoint: `lit_gpt convert` reads those of other projects")
    _check_entries(checkpoint, path)
    checkpoint[KEY].setdefault("tokenizer", None)


_ENTRIES: dict[str, tuple[type, ...]] = {
    "hyper_parameters": (dict, type(None)),
    "datamodule_hyper_parameters": (dict, type(None)),
    "global_step": (int, type(None)),
}
_OUR_ENTRIES: dict[str, tuple[type, ...]] = {
    "config": (dict,),
    "tokenizer": (dict, type(None)),
    "precision": (str, type(None)),
    "validation": (dict, type(None)),
    "adapter": (dict, type(None)),
    "sample_prompts": (list, type(None)),
}


def _check_entries(checkpoint: dict[str, Any], path: Path) -> None:
    """Check the types of all entries that are read here, and that the tensors are no more than the file.

    Raises:
        UserError: naming the entry.
    """
    ours = checkpoint[KEY]
    found = ours.get("format_version") if isinstance(ours, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {path} has format version {brief(found)}, this lit_gpt reads {FORMAT_VERSION}: upgrade it"
        )
    for entries, wanted in ((ours, _OUR_ENTRIES), (checkpoint, _ENTRIES)):
        for name, types in wanted.items():
            value = entries.get(name)
            if not isinstance(value, types):
                kind = "missing" if value is None else f"a {type(value).__name__}"
                raise UserError(f"checkpoint {path}: its {name} is {kind}: use another, or write it again")
            check_plain(value, f"checkpoint {path}: its {name}")
    check_tensors(checkpoint.get("state_dict"), path.stat().st_size, f"checkpoint {path}: its state_dict")


def resolve_ckpt_path(ckpt_path: str, root: str | os.PathLike[str] = ".") -> Path:
    """`last` and `best` → the newest such checkpoint under `root`/lightning_logs; `frozen:NAME`; else a path.

    Raises:
        UserError: if there is none.
    """
    if ckpt_path not in ("last", "best"):
        return frozen_checkpoint(ckpt_path) or Path(ckpt_path)
    logs = Path(root) / "lightning_logs"
    found = [path for path in logs.rglob(f"{ckpt_path}*.ckpt") if path.exists()]
    if not found:
        raise UserError(f"ckpt_path={ckpt_path}: no run under {logs} has written a checkpoint yet; give a path")
    return max(found, key=lambda path: path.stat().st_mtime_ns)
