"""C++ kernels for inference (csrc/): loaded, their level chosen, and what they are given checked.

PyTorch's products reach half of the memory's bandwidth with one row, and each of its operations costs as much as a
small product. The library has one level for each instruction set; the best that this CPU has is used. It is a part of
the package; where it is missing or cannot be used, or the CPU has none of the levels, PyTorch does the work.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform

import torch
from torch import Tensor

from lit_gpt.errors import UserError, nearest
from lit_gpt.inference import kernel_library
from lit_gpt.inference.kernel_library import Unavailable
from lit_gpt.inference.levels import ISA_VARIABLE, LEVELS
from lit_gpt.inference.openmp import OpenMP, openmp_functions

ABI_VERSION = 5
"""Of the exported functions and the meaning of the structs' fields, as in csrc/abi.h: both are raised together."""

_POINTER, _LONG, _INT, _FLOAT, _TEXT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float, ctypes.c_char_p
_SIGNATURES = {  # name → arguments, result
    "abi_version": ([], _INT),
    "layout_bytes": ([_TEXT], _LONG),
    "level_name": ([_LONG], _TEXT),
    "level_is_here": ([_LONG], _INT),
    "use_level": ([_LONG], None),
    "used_level": ([], _LONG),
    "use_openmp": ([_POINTER], None),
    "activation_index": ([_TEXT], _LONG),
    "format_index": ([_TEXT], _LONG),
    "linear_scratch_bytes": ([_POINTER, _LONG], _LONG),
    "decode_scratch_bytes": ([_POINTER, _POINTER, _LONG, _LONG, _INT], _LONG),
    "linear_forward": ([_POINTER] * 4 + [_LONG, _INT], None),
    "decode": ([_POINTER] * 6 + [_LONG, _LONG, _INT], None),
}


class Linear(ctypes.Structure):
    """A linear layer, as csrc/abi.h describes it; pointers are addresses, None for null."""

    _fields_ = [
        *[(name, _POINTER) for name in ("weight", "scale", "offset", "bias")],
        *[(name, _LONG) for name in ("I", "O", "format")],
    ]


class BlockLayout(ctypes.Structure):
    """A block."""

    _fields_ = [
        *[(name, _POINTER) for name in ("ln_1", "ln_1_bias", "ln_2", "ln_2_bias", "q_norm", "k_norm")],
        *[(name, Linear) for name in ("c_attn", "attn_c_proj", "c_fc", "c_gate", "mlp_c_proj")],
    ]


class Stack(ctypes.Structure):
    """All blocks.

    Attributes:
        held: the tensors that it points to.
    """

    held: list[Tensor]
    _fields_ = [
        ("blocks", ctypes.POINTER(BlockLayout)),
        ("rotation", _POINTER),
        *[(name, _LONG) for name in ("n_layer", "C", "H", "K", "D", "F", "activation", "rmsnorm")],
        ("eps", _FLOAT),
    ]


class CacheLayout(ctypes.Structure):
    """Keys and values: their addresses, and strides in elements."""

    _fields_ = [
        *[(name, _POINTER) for name in ("keys", "values")],
        *[(name, _LONG) for name in ("layer_stride", "slot_stride", "head_stride", "bf16")],
    ]


class Unsupported(Unavailable):
    """There are no kernels for this kind of machine."""


def load() -> ctypes.CDLL | None:
    """The compiled functions of csrc/, or None where they cannot be had."""
    library = _attempt()
    return None if isinstance(library, Unavailable) else library


def require() -> ctypes.CDLL:
    """The compiled functions of csrc/. Raises Unavailable where they cannot be had."""
    library = load()
    if library is None:
        raise Unavailable(status())
    return library


def status() -> str:
    """Whether there are kernels here, for which instructions, and if not, why: `yes, avx2` or `no: …`."""
    library = _attempt()
    if isinstance(library, Unavailable):
        return f"no: {library}"
    threads = "" if openmp_functions() else ", on one thread: PyTorch has no OpenMP that they could share"
    return f"yes, {_used_level(library)}{threads}"


def fault() -> str | None:
    """Why the library that this machine should have cannot be used; None where it can, or there is none for it."""
    library = _attempt()
    return str(library) if isinstance(library, Unavailable) and not isinstance(library, Unsupported) else None


def levels() -> list[str]:
    """The levels that this CPU has, the least first; none where there are no kernels."""
    library = load()
    return [] if library is None else list(_levels_here(library))


def used_level() -> str:
    """The level that the kernels compute with. Raises Unavailable where there are none."""
    return _used_level(require())


def use_level(name: str) -> None:
    """Compute with this one of `levels` from now on. Weights that are prepared stay valid: they are the same at all."""
    library = require()
    library.use_level(_levels_here(library)[name])


def pointer(tensor: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """The address of a tensor's data. The kernels take memory for what they expect, so that is compared first.

    Raises:
        ValueError: with its name, if it is not contiguous memory of this shape and dtype on the CPU.
    """
    fits = tensor.is_cpu and tensor.dtype == dtype and tuple(tensor.shape) == shape and tensor.is_contiguous()
    if not (fits and is_stored(tensor)):
        found = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        memory = f"{tensor.untyped_storage().nbytes()} bytes"
        raise ValueError(f"the kernels need {name} as contiguous {dtype} {shape}, not {found} in {memory}")
    return tensor.data_ptr()


def is_stored(tensor: Tensor) -> bool:
    """Whether the storage of a contiguous tensor has all of it: a storage can be resized under its tensors."""
    missing = tensor.nbytes - tensor.untyped_storage().nbytes()
    offset = tensor.storage_offset()
    return missing <= 0 if offset == 0 else missing + offset * tensor.itemsize <= 0


@functools.cache
def _attempt() -> ctypes.CDLL | Unavailable:
    """The library or why there is none, found out once."""
    try:
        return _load()
    except Unavailable as error:
        return error
    except OSError as error:  # of sources that cannot be read
        return Unavailable(str(error))


def _load() -> ctypes.CDLL:
    wanted, machine = _wanted_level(), platform.machine()
    if platform.system() != "Linux" or machine not in LEVELS:
        raise Unsupported("they are written for Linux on x86-64 and on 64-bit Arm")
    path = kernel_library.LIBRARY
    kernel_library.check_library(path, machine)
    try:
        library = ctypes.CDLL(str(path))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:  # OSError: as on a file system without permission to execute
        reason = str(error).removeprefix(f"{path}: ")  # the linker begins with it
        raise Unavailable(f"{path} cannot be used: {reason}") from error
    _check_abi(library)
    _choose_level(library, wanted)
    if functions := openmp_functions():
        library.use_openmp(ctypes.byref(functions))
    return library


def _wanted_level() -> str | None:
    """The level that the environment asks for. Raises UserError for one that there is not."""
    wanted = os.environ.get(ISA_VARIABLE)
    known = [name for names in LEVELS.values() for name in names]
    if wanted and wanted not in known:
        raise UserError(f'unknown {ISA_VARIABLE} "{wanted}": {nearest(wanted, known)}')
    return wanted or None


def _levels_here(library: ctypes.CDLL) -> dict[str, int]:
    """The index of each level that this CPU has, the least first."""
    here, index = {}, 0
    while (name := library.level_name(index)) is not None:
        if library.level_is_here(index):
            here[name.decode()] = index
        index += 1
    return here


def _choose_level(library: ctypes.CDLL, wanted: str | None) -> None:
    """Use the level that is wanted, or the best.

    Raises:
        Unsupported: if this CPU has none.
        UserError: if it has not the one that is wanted.
    """
    here = _levels_here(library)
    if wanted is not None and wanted not in here:
        raise UserError(f'{ISA_VARIABLE} is "{wanted}", which this CPU lacks: use {" or ".join(here) or "none"}')
    if not here:
        raise Unsupported("this CPU has no AVX2 with FMA and F16C")
    library.use_level(here[wanted or list(here)[-1]])


def _used_level(library: ctypes.CDLL) -> str:
    return next(name for name, index in _levels_here(library).items() if index == library.used_level())


def _check_abi(library: ctypes.CDLL) -> None:
    """Compare the library's version and the layout of its structs with those here: a wrong offset is a wild pointer.

    Raises:
        Unavailable: naming the first difference.
    """
    if (version := library.abi_version()) != ABI_VERSION:
        raise Unavailable(f"the compiled library has ABI {version}, and {ABI_VERSION} is expected")
    for struct in (Linear, BlockLayout, Stack, CacheLayout, OpenMP):
        offsets = {f"{struct.__name__}.{name}": getattr(struct, name).offset for name, *_ in struct._fields_}
        for name, here in {**offsets, struct.__name__: ctypes.sizeof(struct)}.items():
            if (there := library.layout_bytes(name.encode())) != here:
                kind = "offset" if "." in name else "size"
                raise Unavailable(f"the compiled library has {name} at another {kind}: {there} bytes, not {here}")
