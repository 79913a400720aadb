"""Decoding in C++ (kernels.cpp), compiled for this very machine the first time it is needed.

PyTorch's products reach half of the memory's bandwidth with one row, and each of its operations costs as much as a
small product. Compiling takes a second, once; where there is no compiler or no AVX-512, PyTorch does the work.
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

_SOURCE = Path(__file__).parent / "csrc" / "kernels.cpp"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-exceptions", "-fno-rtti", "-fopenmp", "-fPIC")
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "linear_layer": [_POINTER] * 4 + [_LONG, _INT],
    "decode": [_POINTER] * 6 + [_LONG, _LONG, _INT],
}
_COMPILE_SECONDS = 60


class Linear(ctypes.Structure):
    """A linear layer, as kernels.cpp describes it; pointers are addresses, 0 for none."""

    _fields_ = [(name, _POINTER) for name in ("W", "scale", "offset", "bias")] + [("K", _LONG), ("N", _LONG)]


class Layer(ctypes.Structure):
    """A block."""

    _fields_ = [
        *[(name, _POINTER) for name in ("ln_1", "ln_1_bias", "ln_2", "ln_2_bias", "q_norm", "k_norm")],
        *[(name, Linear) for name in ("attn", "attn_proj", "fc", "gate", "mlp_proj")],
    ]


class Stack(ctypes.Structure):
    """All blocks."""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        ("rotation", _POINTER),
        *[(name, _LONG) for name in ("n_layer", "C", "H", "K", "D", "F", "activation", "rms")],
        ("eps", _FLOAT),
    ]


class Cache(ctypes.Structure):
    """Keys and values: their addresses, and strides in elements."""

    _fields_ = [
        ("keys", _POINTER),
        ("values", _POINTER),
        *[(name, _LONG) for name in ("layer", "row", "head", "bf16")],
    ]


class Unavailable(Exception):
    """There are no kernels here; the message says why."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled functions of kernels.cpp, or None where they cannot be had."""
    try:
        return _load()
    except Unavailable:
        return None


def status() -> str:
    """Whether there are kernels here, and if not, why, for people."""
    try:
        _load()
    except Unavailable as error:
        return f"no: {error}"
    return "yes"


def _load() -> ctypes.CDLL:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Unavailable("they are written for Linux on x86-64")
    if not torch.cpu._is_vnni_supported():
        raise Unavailable("this CPU has no AVX512-VNNI")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise Unavailable("no g++ was found (set CXX to one)")
    library = ctypes.CDLL(str(_compiled(compiler, _openmp())))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


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
    name = f"kernels-{hashlib.sha256(_SOURCE.read_bytes() + stamp).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_gpt"
    target = folder / name
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as building:
            part, made = Path(building) / "kernels.o", Path(building) / name
            _run([compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(part)])
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
