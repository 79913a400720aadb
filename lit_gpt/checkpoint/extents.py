"""The data of tensors in a file: where each one's lies, and reading it into memory of its own.

Files are not mapped: the pages of a mapped one count as this process's memory, change with the file, and end the
process when the file is cut short.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_gpt.errors import UserError


class Extent(NamedTuple):
    """Where a tensor's data lies in its file: of one file, tensors with equal extents are one.

    Attributes:
        start: the first byte.
        elements: how many, from the first to the last that the tensor has.
        dtype: of the tensor.
        size: of the tensor.
        strides: of the tensor, in elements.
    """

    start: int
    elements: int
    dtype: torch.dtype
    size: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor, start: int) -> Extent:
        """That of a tensor, which may be without data, whose first element is at byte `start`."""
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        return cls(start, 0 if tensor.numel() == 0 else last + 1, tensor.dtype, tensor.shape, tensor.stride())

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the end of the last."""
        return self.elements * self.dtype.itemsize


class ExtentReader:
    """Reads tensors from a file that stays as it is.

    Attributes:
        path: the file.
        nbytes: its size.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError if there is no such file."""
        self.path = path
        self._version = _version(os.stat(path))
        self.nbytes = self._version[1]

    def read(self, extent: Extent) -> Tensor:
        """The tensor.

        Raises:
            UserError: if the file has been replaced or written to since this object was made.
            OSError: if it is gone.
        """
        data = torch.empty(extent.nbytes, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(extent.start)
            if _read_into(file, data.numpy().data) < extent.nbytes:
                raise self._changed()
            self._compare(os.fstat(file.fileno()))
        return data.view(extent.dtype).as_strided(extent.size, extent.strides)

    def check_unchanged(self) -> None:
        """Raises UserError or OSError as `read`."""
        self._compare(os.stat(self.path))

    def _compare(self, stat: os.stat_result) -> None:
        if _version(stat) != self._version:
            raise self._changed()

    def _changed(self) -> UserError:
        return UserError(f"{self.path} changed while it was read: start again")


def _version(stat: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file is replaced or written to."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read_into(file: io.FileIO, memory: memoryview) -> int:
    """Bytes read into `memory`: all that it holds, unless the file ends before. One call reads 2 GiB at most."""
    count = 0
    while count < len(memory) and (more := file.readinto(memory[count:])):
        count += more
    return count
