"""Files that `torch.save` or `pickle` wrote, read without running anything that is in them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from lit_gpt.checkpoint.torch_file import (
    MAX_PICKLE_BYTES,
    called_names,
    check_tensors,
    load_checked_file,
    load_torch_file,
)
from lit_gpt.convert.weights import StoredTensor
from lit_gpt.errors import UserError


def stored_tensors(path: Path, *keys: str) -> dict[str, StoredTensor]:
    """The tensors of the state dict that lies under `keys` in the file at `path`; what is no tensor is left out.

    Raises:
        UserError: if the file is refused, or there is no state dict, or its tensors claim more than the file holds.
    """
    version = _version(path)

    def descend(values: Any) -> dict[str, Any]:
        for key in keys:
            values = values.get(key) if isinstance(values, dict) else None
        if not isinstance(values, dict):
            raise UserError(f"{path} has no dict of tensors under {'/'.join(keys)}: get it again")
        return values

    def reader(name: str) -> Any:
        # Mapped anew for each tensor: what is done with leaves memory with it.
        def read() -> Tensor:
            if _version(path) != version:
                raise UserError(f"{path} changed while it was read: start again")
            return descend(load_checked_file(path))[name]

        return read

    tensors = {n: tensor for n, tensor in descend(load_torch_file(path)).items() if isinstance(tensor, Tensor)}
    check_tensors(tensors, version[1], str(path))
    return {name: StoredTensor(tuple(tensor.shape), tensor.dtype, reader(name)) for name, tensor in tensors.items()}


def _version(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced or written to."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


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
        content = path.read_bytes() if path.stat().st_size <= MAX_PICKLE_BYTES else b""
        list(called_names(io.BytesIO(content)))  # raises for what would take more memory than the file
        return _PlainUnpickler(io.BytesIO(content)).load()
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except Exception:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is no pickle of plain values: write it again") from None


def strip_prefix(stored: dict[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """Names without `prefix`, where they have it."""
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
