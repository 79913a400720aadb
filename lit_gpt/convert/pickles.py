"""Files that `torch.save` or `pickle` wrote, read without running anything that is in them."""

from __future__ import annotations

import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lit_gpt.checkpoint.torch_file import MAX_PICKLE_BYTES, OpenTorchFile, called_names, check_tensors
from lit_gpt.convert.weights import StoredTensor
from lit_gpt.errors import UserError


def stored_tensors(file: OpenTorchFile, *keys: str) -> dict[str, StoredTensor]:
    """The tensors of the state dict that lies under `keys` in `file`; what is no tensor is left out.

    Raises:
        UserError: if there is no state dict, or its tensors claim more than the file holds.
    """
    tensors = file.tensors(*keys)
    check_tensors(tensors, file.nbytes, str(file.path))
    return {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, partial(file.read, tensor), file.extent(tensor))
        for name, tensor in tensors.items()
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
