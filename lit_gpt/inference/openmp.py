"""The functions of the OpenMP that PyTorch has loaded, for the kernels.

With an OpenMP of their own there would be a second pool of threads, which waits for the first one's cores.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator

import torch

_NAMES = {  # field of OpenMP in csrc/abi.h → exported name. libgomp's; LLVM's and Intel's OpenMP have them too.
    "parallel": "GOMP_parallel",
    "barrier": "GOMP_barrier",
    "thread_num": "omp_get_thread_num",
    "num_threads": "omp_get_num_threads",
}


class OpenMP(ctypes.Structure):
    """Addresses of the functions, as csrc/abi.h describes them."""

    _fields_ = [(name, ctypes.c_void_p) for name in _NAMES]


@functools.cache
def openmp_functions() -> OpenMP | None:
    """PyTorch's, or None where it has no OpenMP with these functions."""
    if not torch.backends.openmp.is_available():
        return None
    for library in _searched_libraries():
        try:
            functions = [getattr(library, name) for name in _NAMES.values()]
        except AttributeError:
            continue
        return OpenMP(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))
    return None


def _searched_libraries() -> Iterator[ctypes.CDLL]:
    """Where the linker looked for PyTorch's own calls, in this order; nothing is loaded that is not yet."""
    yield ctypes.CDLL(None)  # what all see, with a preloaded OpenMP first
    try:
        yield ctypes.CDLL(torch._C.__file__, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)  # and all that PyTorch depends on
    except OSError:  # a PyTorch that is linked into the program
        return
