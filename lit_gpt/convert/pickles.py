"""Files that `torch.save` or `pickle` wrote, read without running anything that is in them."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lit_gpt.convert.weights import Stored
from lit_gpt.errors import UserError


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote to `path`: plain values, and tensors mapped from the file rather than copied.

    Raises:
        UserError: if the file wants to run code, naming what; or is damaged or something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise UserError(f"{path} is no checkpoint, or a damaged one: get it again") from None
        raise UserError(
            f"{path} is refused: to read it would run {wanted.group(1)}; "
            "save its plain tensors (a state_dict) with torch.save and convert that"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        raise UserError(f"{path} is no checkpoint, or a damaged one: get it again") from None


def stored_tensors(path: Path, *keys: str) -> dict[str, Stored]:
    """The tensors of the state dict that lies under `keys` in the file at `path`; what is no tensor is left out."""

    def descend() -> dict[str, Any]:
        values = load_torch(path)
        for key in keys:
            values = values[key]
        return values

    def reader(name: str) -> Any:
        # The file is mapped anew for each tensor: a mapping that stays would count all of it as our memory.
        return lambda: descend()[name].clone()

    return {
        name: Stored(tuple(tensor.shape), tensor.dtype, reader(name))
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


def strip_prefix(stored: dict[str, Stored], prefix: str) -> dict[str, Stored]:
    """Names without `prefix`, where they have it."""
    return dict(_stripped(stored, prefix))


def _stripped(stored: dict[str, Stored], prefix: str) -> Iterator[tuple[str, Stored]]:
    for name, tensor in stored.items():
        yield name.removeprefix(prefix), tensor
