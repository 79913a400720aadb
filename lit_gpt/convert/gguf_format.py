"""The header of a GGUF file, written and read; whatever it claims is compared with the file before it is used.

The format is described at github.com/ggml-org/ggml/blob/master/docs/gguf.md. `gguf.GGUFReader` is not used: it maps the
file, allocates what its counts ask for, and ends in errors of numpy where they are wrong.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from lit_gpt.errors import UserError, brief

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
"""Bytes: where a tensor's data begins is a multiple, unless `general.alignment` says otherwise."""
READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
"""Types of tensors that are read, and written."""
_MAX_HEADER = 64 << 20  # bytes; a vocabulary of 260,000 ids with its merges has some 10 MB
_MAX_KEYS, _MAX_TENSORS, _MAX_STRINGS = 10_000, 100_000, 1 << 21
_MAX_NAME = 65_535  # bytes
_MAX_DIMENSIONS = 4
_NUMBERS = {
    GGUFValueType.UINT8: "u1",
    GGUFValueType.INT8: "i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class GgufTensor:
    """What a header says of one tensor.

    Attributes:
        name: its name.
        shape: with the rows first, as in PyTorch; GGUF has the other order.
        kind: its type.
        start: where its data begins: in the file, or, in a header to be written, after the header.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // block * size


@dataclass(frozen=True, eq=False)
class Numbers:
    """An array of numbers of the metadata; no number is equal to it."""

    values: np.ndarray


@dataclass(frozen=True)
class GgufHeader:
    """The header of a file.

    Attributes:
        path: the file.
        metadata: key → text, number, switch, list of texts, or `Numbers`. A number of 32 bits is the shortest decimal
            that has its value: 1e-05, not 9.999999747378752e-06.
        tensors: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file, of which all that it claims has been compared with the file.

    Raises:
        UserError: if it is no GGUF of version 2 or 3, is cut off or damaged, is one of several parts, or has tensors of
            a type that is not read (naming it).
    """
    try:
        with path.open("rb") as file:
            return _Parser(path, file).read()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


class _Parser:
    """Reads values from the start of a file, and never more than the file, or any header, holds."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self._nbytes = os.fstat(file.fileno()).st_size
        self._at = 0
        self._strings = 0

    def read(self) -> GgufHeader:
        if self._take(len(MAGIC)) != MAGIC:
            raise UserError(f"{self._path} is no GGUF file: it does not begin with {MAGIC.decode()}")
        version = self._number(GGUFValueType.UINT32)
        if version and version % 65536 == 0:
            raise UserError(f"{self._path} is a big-endian GGUF file: get the little-endian one")
        if version not in (2, VERSION):
            raise UserError(f"{self._path} is GGUF of version {version}: this lit_gpt reads 2 and {VERSION}")
        n_tensors = self._count("tensors", _MAX_TENSORS)
        n_keys = self._count("keys", _MAX_KEYS)
        metadata = self._metadata(n_keys)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            self._damaged(f"its general.alignment is {brief(alignment)}")
        parts = metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise UserError(f"{self._path} is one of {parts} parts: join them with llama-gguf-split --merge")
        infos = [self._tensor_info() for _ in range(n_tensors)]
        return GgufHeader(self._path, metadata, self._located(infos, alignment))

    def _damaged(self, why: str) -> NoReturn:
        raise UserError(f"{self._path} is damaged ({why}): get it again")

    def _take(self, count: int) -> bytes:
        if self._at + count > self._nbytes:
            self._damaged(f"its header needs more than its {self._nbytes} bytes")
        if self._at + count > _MAX_HEADER:
            self._damaged(f"its header has more than {_MAX_HEADER >> 20} MiB")
        self._at += count
        data = self._file.read(count)
        if len(data) < count:
            self._damaged("it became shorter while it was read")
        return data

    def _number(self, kind: GGUFValueType) -> Any:
        value = np.frombuffer(self._take(np.dtype(_NUMBERS[kind]).itemsize), _NUMBERS[kind])[0]
        if kind is GGUFValueType.BOOL:
            return bool(value)
        return shortest_decimal(value) if kind is GGUFValueType.FLOAT32 else value.item()

    def _count(self, what: str, most: int) -> int:
        count = self._number(GGUFValueType.UINT64)
        if count > most:
            self._damaged(f"it claims {count} {what}")
        return count

    def _string(self, longest: int = _MAX_HEADER) -> str:
        data = self._take(self._count("bytes of a text", longest))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self._damaged(f"the text {brief(data)} is no UTF-8")

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._string(_MAX_NAME)
            if key in metadata:
                self._damaged(f"the key {brief(key)} is there twice")
            metadata[key] = self._value(self._kind(key), key)
        return metadata

    def _kind(self, key: str) -> GGUFValueType:
        number = self._number(GGUFValueType.UINT32)
        try:
            return GGUFValueType(number)
        except ValueError:
            self._damaged(f"{brief(key)} is of the type {number}, which GGUF does not have")

    def _value(self, kind: GGUFValueType, key: str) -> Any:
        if kind is GGUFValueType.STRING:
            return self._string()
        if kind is not GGUFValueType.ARRAY:
            return self._number(kind)
        items = self._kind(key)
        if items is GGUFValueType.ARRAY:
            self._damaged(f"{brief(key)} is an array of arrays")
        if items is not GGUFValueType.STRING:
            dtype = np.dtype(_NUMBERS[items])
            return Numbers(np.frombuffer(self._take(dtype.itemsize * self._count("numbers", _MAX_HEADER)), dtype))
        length = self._count("texts", _MAX_STRINGS - self._strings)
        self._strings += length
        return [self._string() for _ in range(length)]

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape with the rows first, number of the type, and offset of the data."""
        name = self._string(_MAX_NAME)
        dimensions = self._number(GGUFValueType.UINT32)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            self._damaged(f"{brief(name)} has {dimensions} dimensions")
        sizes = [self._number(GGUFValueType.UINT64) for _ in range(dimensions)]
        kind, offset = self._number(GGUFValueType.UINT32), self._number(GGUFValueType.UINT64)
        return name, tuple(reversed(sizes)), kind, offset

    def _located(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, GgufTensor]:
        """The tensors by name; each lies in the file, and none over another."""
        data_start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, number, offset in infos:
            if name in tensors:
                self._damaged(f"the tensor {brief(name)} is there twice")
            if offset % alignment:
                self._damaged(f"{brief(name)} begins at the offset {offset}, which is no multiple of {alignment}")
            tensors[name] = GgufTensor(name, shape, self._tensor_kind(name, number), data_start + offset)
            self._check_size(tensors[name])
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.start)
        for first, second in pairwise(ordered):
            if first.start + first.nbytes > second.start:
                self._damaged(f"{brief(first.name)} and {brief(second.name)} share bytes")
        return tensors

    def _tensor_kind(self, name: str, number: int) -> GGMLQuantizationType:
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise UserError(
                f"{self._path}: {brief(name)} is quantised as type {number}, which is not known: "
                f"get one in {', '.join(READABLE)}"
            ) from None
        if kind.name not in READABLE:
            raise UserError(
                f"{self._path}: {brief(name)} is quantised as {kind.name}, which is not read here: "
                f"get one in {', '.join(READABLE)}"
            )
        return kind

    def _check_size(self, tensor: GgufTensor) -> None:
        block, _ = GGML_QUANT_SIZES[tensor.kind]
        if min(tensor.shape) < 1 or tensor.shape[-1] % block:
            self._damaged(f"{brief(tensor.name)} has the shape {brief(tensor.shape)} as {tensor.kind.name}")
        end = tensor.start + tensor.nbytes
        if end > self._nbytes:
            self._damaged(f"{brief(tensor.name)} ends at byte {brief(end)}, the file at {self._nbytes}")


def shortest_decimal(value: float | np.floating) -> float:
    """The number with the fewest digits that is `value` when rounded to 32 bits.

    >>> shortest_decimal(9.999999747378752e-06)
    1e-05
    """
    return float(str(np.float32(value)))


def pack_header(metadata: Mapping[str, Any], tensors: Iterable[GgufTensor]) -> bytes:
    """A header with its padding; where a tensor's data begins is counted from the header's end.

    A Python `int` becomes an unsigned number of 32 bits, `float` one of 32 bits, a list of `int` an array of signed
    numbers of 32 bits. (`gguf.GGUFWriter` has no empty arrays, which is what the merges of single bytes are.)
    """
    infos = list(tensors)
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(infos), len(metadata)))
    for key, value in metadata.items():
        header += _pack_string(key) + _pack_value(value)
    for tensor in infos:
        sizes = tensor.shape[::-1]
        header += _pack_string(tensor.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        header += struct.pack("<IQ", tensor.kind, tensor.start)
    return bytes(header) + padding(len(header))


def padding(nbytes: int) -> bytes:
    """The zeros after `nbytes` bytes, up to a multiple of the alignment."""
    return bytes(-nbytes % ALIGNMENT)


def _pack_string(text: str) -> bytes:
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{brief(text)} has half a character, which GGUF cannot hold: remove it") from None
    return struct.pack("<Q", len(encoded)) + encoded


def _pack_value(value: str | bool | int | float | list[str] | list[int]) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", GGUFValueType.STRING) + _pack_string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", GGUFValueType.BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", GGUFValueType.UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", GGUFValueType.FLOAT32, value)
    if value and isinstance(value[0], int):
        return struct.pack(f"<IIQ{len(value)}i", GGUFValueType.ARRAY, GGUFValueType.INT32, len(value), *value)
    head = struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(value))
    return head + b"".join(_pack_string(str(item)) for item in value)
