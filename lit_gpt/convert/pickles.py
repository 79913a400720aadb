"""Files that `torch.save` or `pickle` wrote, read without running anything that is in them."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lit_gpt.convert.weights import StoredTensor
from lit_gpt.errors import UserError


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote to `path`: plain values, and tensors mapped from the file rather than copied.

    Raises:
        UserError: if the file wants to run code, naming what; or is damaged or something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of a file that is refused in a moment
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        wanted = named.group(1) if named else _wanted(path)
        if wanted is None:
            raise UserError(f"{path} is no checkpoint, or a damaged one: get it again") from None
        raise UserError(
            f"{path} is refused: to read it would run {wanted}; "
            "save its plain tensors (a state_dict) with torch.save and convert that"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        raise UserError(f"{path} is no checkpoint, or a damaged one: get it again") from None


class _Placeholder(dict[Any, Any]):
    """Stands for whatever a pickle makes."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


class _FirstCallUnpickler(pickle.Unpickler):
    """Makes nothing; stops at the first thing that is not torch's and is to be called."""

    def find_class(self, module: str, name: str) -> type:
        if module.partition(".")[0] in ("torch", "collections"):
            return _Placeholder
        raise UserError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> None: ...


def _wanted(path: Path) -> str | None:
    """What a plain pickle, which torch's message does not describe, would call; None if it is no pickle at all."""
    try:
        with open(path, "rb") as file:
            _FirstCallUnpickler(file).load()
    except UserError as error:
        return str(error)
    except Exception:  # a damaged pickle can raise nearly anything
        pass
    return None


def stored_tensors(path: Path, *keys: str) -> dict[str, StoredTensor]:
    """The tensors of the state dict that lies under `keys` in the file at `path`; what is no tensor is left out."""

    def descend() -> dict[str, Any]:
        values = load_torch(path)
        for key in keys:
            values = values[key]
        return values

    def reader(name: str) -> Any:
        # Mapped anew for each tensor: what is done with leaves memory with it.
        return lambda: descend()[name]

    return {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, reader(name))
        for name, tensor in descend().items()
        if isinstance(tensor, Tensor)
    }


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings and numbers; whatever else a pickle asks for is refused by its name."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise UserError(f"to read it would run {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise UserError("it refers to data outside itself")


def load_plain_pickle(path: Path) -> Any:
    """Read a pickle of plain values, such as nanoGPT's `meta.pkl`.

    Raises:
        UserError: if it wants to run anything, naming what, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file).load()
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except Exception:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is no pickle of plain values: write it again") from None


def strip_prefix(stored: dict[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """Names without `prefix`, where they have it."""
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
