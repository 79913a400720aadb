"""C++ kernels for decoding (csrc/): compiled for this machine on first use, checked and loaded.

PyTorch's products reach half of the memory's bandwidth with one row, and each of its operations costs as much as a
small product. Compiling takes a second or two, once; where there is no compiler or no AVX-512, PyTorch does the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

ABI_VERSION = 1
"""Of the exported functions and the meaning of the structs' fields, as in csrc/abi.h: both are raised together."""

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-exceptions", "-fno-rtti", "-fopenmp", "-fPIC")
_POINTER, _LONG, _INT, _FLOAT, _TEXT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float, ctypes.c_char_p
_SIGNATURES = {  # name → arguments, result
    "abi_version": ([], _INT),
    "layout_bytes": ([_TEXT], _LONG),
    "activation_index": ([_TEXT], _LONG),
    "linear_scratch_bytes": ([_POINTER, _LONG], _LONG),
    "decode_scratch_bytes": ([_POINTER, _POINTER, _LONG, _INT], _LONG),
    "linear_forward": ([_POINTER] * 4 + [_LONG, _INT], None),
    "decode": ([_POINTER] * 6 + [_LONG, _INT], None),
}
_COMPILE_SECONDS = 60


class Linear(ctypes.Structure):
    """A linear layer, as csrc/abi.h describes it; pointers are addresses, None for null."""

    _fields_ = [*[(name, _POINTER) for name in ("weight", "scale", "offset", "bias")], ("I", _LONG), ("O", _LONG)]


class Block(ctypes.Structure):
    """A block."""

    _fields_ = [
        *[(name, _POINTER) for name in ("ln_1", "ln_1_bias", "ln_2", "ln_2_bias", "q_norm", "k_norm")],
        *[(name, Linear) for name in ("c_attn", "attn_c_proj", "c_fc", "c_gate", "mlp_c_proj")],
    ]


class Stack(ctypes.Structure):
    """All blocks."""

    _fields_ = [
        ("blocks", ctypes.POINTER(Block)),
        ("rotation", _POINTER),
        *[(name, _LONG) for name in ("n_layer", "C", "H", "K", "D", "F", "activation", "rmsnorm")],
        ("eps", _FLOAT),
    ]


class KVCache(ctypes.Structure):
    """Keys and values: their addresses, and strides in elements."""

    _fields_ = [
        *[(name, _POINTER) for name in ("keys", "values")],
        *[(name, _LONG) for name in ("layer_stride", "slot_stride", "head_stride", "bf16")],
    ]


class Unavailable(Exception):
    """There are no kernels here; the message says why."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled functions of csrc/, or None where they cannot be had."""
    try:
        return _load()
    except Unavailable:
        return None


def require() -> ctypes.CDLL:
    """The compiled functions of csrc/. Raises Unavailable where they cannot be had."""
    library = load()
    if library is None:
        raise Unavailable(status())
    return library


def status() -> str:
    """Whether there are kernels here, and if not, why: `yes` or `no: …`."""
    try:
        _load()
    except Unavailable as error:
        return f"no: {error}"
    return "yes"


def address(tensor: Tensor | None) -> int | None:
    """What a pointer to the tensor's data is for ctypes; None for null."""
    return None if tensor is None else tensor.data_ptr()


def _load() -> ctypes.CDLL:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Unavailable("they are written for Linux on x86-64")
    if not torch.cpu._is_vnni_supported():
        raise Unavailable("this CPU has no AVX512-VNNI")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise Unavailable("no g++ was found (set CXX to one)")
    path = _compiled(compiler, _openmp())
    try:
        library = ctypes.CDLL(str(path))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{path} cannot be used: {error}") from error
    _check_abi(library)
    return library


def _check_abi(library: ctypes.CDLL) -> None:
    """Compare the library's version and the layout of its structs with those here: a wrong offset is a wild pointer.

    Raises:
        Unavailable: naming the first difference.
    """
    if (version := library.abi_version()) != ABI_VERSION:
        raise Unavailable(f"the compiled library has ABI {version}, and {ABI_VERSION} is expected")
    for struct in (Linear, Block, Stack, KVCache):
        offsets = {f"{struct.__name__}.{name}": getattr(struct, name).offset for name, *_ in struct._fields_}
        for name, here in {**offsets, struct.__name__: ctypes.sizeof(struct)}.items():
            if (there := library.layout_bytes(name.encode())) != here:
                kind = "offset" if "." in name else "size"
                raise Unavailable(f"the compiled library has {name} at another {kind}: {there} bytes, not {here}")


def _openmp() -> str:
    """PyTorch's own OpenMP, to be linked to: a second pool of threads would wait for the first one's cores."""
    mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    found = sorted((path for path in mapped if "libgomp" in path), key=lambda path: "torch" not in path)
    if not found or any("libiomp" in path for path in mapped):
        raise Unavailable("PyTorch's threads are not GNU OpenMP's")
    return found[0]


def _compiled(compiler: str, openmp: str) -> Path:
    """The shared library, compiled unless it is there already; its name says from what, with what and for what CPU."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    stamp = f"{compiler} {os.stat(compiler).st_mtime_ns} {openmp} {_FLAGS} {cpu}".encode()
    files = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    sources = b"".join(path.name.encode() + path.read_bytes() for path in files)
    name = f"kernels-{hashlib.sha256(sources + stamp).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_gpt"
    target = folder / name
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as building:
            part, made = Path(building) / "kernels.o", Path(building) / name
            _run([compiler, *_FLAGS, "-c", str(_SOURCES / "kernels.cpp"), "-o", str(part)])
            _run([compiler, "-shared", str(part), openmp, "-o", str(made)])
            made.replace(target)  # whole, whoever else is compiling the same
    except OSError as error:
        raise Unavailable(f"{folder} cannot be written: {error.strerror}") from error
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        raise Unavailable(f"{compiler} failed: {said[0] if said else error}") from error
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=_COMPILE_SECONDS)
