"""Files of `torch.save`, checked before torch reads them: nothing in them can run, or take more than the file holds.

torch's own reader with `weights_only=True` runs no code, but believes what a file claims: it inflates compressed
records, makes a `bytearray` of any size, and maps weights from wherever a damaged record header points.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lit_gpt.checkpoint.extents import Extent, ExtentReader
from lit_gpt.errors import UserError, brief

MAX_PICKLE_BYTES = 64 << 20
"""Of everything but the tensors' data; a tokenizer of 200,000 ids is 4 MB."""
MAX_OPERATIONS = 1 << 19
"""Of a pickle; a tensor takes about 40."""
_MAX_RECORDS = 1 << 16
_ALLOWED = re.compile(
    r"collections\.OrderedDict"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch\.(\w+Storage|storage\.(Untyped|Typed)Storage|Size|device|bfloat16|bool|float\w+|u?int\d+|complex\d+)"
)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, …, length of the name, length of the padding
_LONGEST_TRAILER = 64  # bytes after a record's data: sizes and checksum
_LONGEST_NAME = 500  # of a tensor
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object, keys of its tensors


def load_torch_file(path: Path, device: str = "cpu") -> Any:
    """What `torch.save` wrote to `path`: plain values, and tensors mapped from the file (without data on `meta`).

    Raises:
        UserError: if the file is missing, damaged, no such file, claims more than it holds, or wants to run code, which
            is then named.
    """
    _checked_records(path)
    return load_checked_file(path, device)


def _checked_records(path: Path) -> dict[int, int]:
    """First byte → size of every record of a zip file, {} for an older one. Raises UserError as `load_torch_file`."""
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            names, records = _read_zip(file) if is_zip else (list(_names_of_legacy(file)), {})
    except OSError as error:
        raise _unreadable(path, error) from None
    except Exception:  # damaged in any way, which zipfile and pickletools answer with nearly anything
        raise _damaged(path) from None
    refused = [name for name in names if not _ALLOWED.fullmatch(name)]
    if refused:
        # What is not torch's own says more about why.
        wanted = next((name for name in refused if not name.startswith("torch.")), refused[0])
        raise UserError(
            f"{path} is refused: it wants to run {wanted[:80]}; save its plain tensors (a state_dict) with torch.save"
        )
    return records


def load_checked_file(path: Path, device: str = "cpu") -> Any:
    """As `load_torch_file`, for a file that it has read before. Raises UserError if torch cannot read it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of a file that is refused in a moment
            return torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:  # torch's reader answers a damaged file with nearly anything
        raise _damaged(path) from None


class OpenTorchFile:
    """A file of `torch.save`, unpickled once, whose tensors are read when they are needed.

    Attributes:
        path: the file.
        nbytes: its size.
        content: what it holds. Its tensors have no data, unless the file is older than the zip format: such a file
            torch reads whole, and so it is kept.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError as `load_torch_file`."""
        self.path = path
        try:
            self._reader = ExtentReader(path)
        except OSError as error:
            raise _unreadable(path, error) from None
        self.nbytes = self._reader.nbytes
        self._records = _checked_records(path)
        self.content = self._without_data() if self._records else load_checked_file(path)

    def _without_data(self) -> Any:
        try:
            return load_checked_file(self.path, "meta")
        except UserError:  # torch expects its own order of records
            return load_checked_file(self.path)

    def tensors(self, *keys: str) -> dict[str, Tensor]:
        """The tensors in the dict that lies under `keys`; what else is there is left out.

        Raises:
            UserError: if there is no dict.
        """
        found = self._tensors(keys)
        if not all(map(self._is_located, found.values())):
            # Not torch itself has written the archive, and where it expects each record is not where it is.
            self.content = load_checked_file(self.path)
            found = self._tensors(keys)
        return found

    def _tensors(self, keys: tuple[str, ...]) -> dict[str, Tensor]:
        values = self.content
        for key in keys:
            values = values.get(key) if isinstance(values, dict) else None
        if not isinstance(values, dict):
            raise UserError(f"{self.path} has no dict of tensors under {'/'.join(keys)}: get it again")
        return {name: tensor for name, tensor in values.items() if isinstance(tensor, Tensor)}

    def _is_located(self, tensor: Tensor) -> bool:
        """Whether it has data, or torch says where, and there is a record of that size.

        Of a tensor that is spread over much more than its size, reading the whole extent would take too long.
        """
        extent = self.extent(tensor)
        if extent is None:
            return True
        storage = tensor.untyped_storage()
        is_inside = extent.nbytes + tensor.storage_offset() * tensor.itemsize <= storage.nbytes()
        is_dense = extent.elements <= 2 * tensor.numel()
        return is_inside and is_dense and self._records.get(storage._checkpoint_offset or 0) == storage.nbytes()

    def extent(self, tensor: Tensor) -> Extent | None:
        """Where the data of one of the content's tensors lies; None if it is mapped or in memory."""
        if not tensor.is_meta:
            return None
        record = tensor.untyped_storage()._checkpoint_offset or 0
        return Extent.of(tensor, record + int(tensor.storage_offset()) * tensor.itemsize)

    def read(self, tensor: Tensor) -> Tensor:
        """One of `tensors`, with its data, in memory of its own.

        Raises:
            UserError: if the file has been replaced or written to since it was opened.
            OSError: if it is gone.
        """
        extent = self.extent(tensor)
        if extent is not None:
            return self._reader.read(extent)
        self._reader.check_unchanged()
        return tensor.detach().clone()


def check_tensors(state: object, file_bytes: int, where: str) -> None:
    """Refuse weights that are no tensors by name, or that claim more than their file holds.

    A tensor whose strides are 0 has as many elements as it likes, and a hundred tensors can be one in the file. A tied
    head is there twice, hence twice the file.

    Args:
        state: what should be a dict of name → tensor.
        file_bytes: the file's size.
        where: how errors name the weights.

    Raises:
        UserError: as above.
    """
    if not isinstance(state, dict):
        raise UserError(f"{where} is no dict of tensors but {type(state).__name__}: get or write it again")
    claimed = 0
    for name, tensor in state.items():
        is_named = isinstance(name, str) and len(name) <= _LONGEST_NAME
        if not is_named or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise UserError(f"{where} holds something else than tensors by name ({brief(name)}): get or write it again")
        size = tensor.numel() * tensor.itemsize
        claimed += size
        if size > tensor.untyped_storage().nbytes() or claimed > 2 * file_bytes:
            raise UserError(f"{where} claims more than the file holds ({brief(name)}): get or write it again")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror or error}): give the path of a checkpoint")


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is truncated, damaged or no checkpoint: use another, or get or write it again")


def _read_zip(file: IO[bytes]) -> tuple[list[str], dict[int, int]]:
    """What the pickle of a zip archive would call, and first byte → size of its records.

    Raises:
        ValueError: and others if the archive is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        starts = _check_layout(file, records, archive.start_dir)
        (described,) = (record for record in records if record.filename.count("/") == 1 and _is_pickle(record))
        if described.file_size > MAX_PICKLE_BYTES:
            raise ValueError("its description is too long")
        content = archive.read(described)  # compares its checksum
    return list(called_names(io.BytesIO(content))), starts


def _is_pickle(record: zipfile.ZipInfo) -> bool:
    return record.filename.endswith("/data.pkl")


def _check_layout(file: IO[bytes], records: list[zipfile.ZipInfo], end: int) -> dict[int, int]:
    """Check that each record is stored as it is, where the directory says, and ends where the next one begins.

    Returns:
        The first byte of each record → its size.
    """
    sizes = {}
    if not 0 < len(records) <= _MAX_RECORDS or len({record.filename for record in records}) != len(records):
        raise ValueError("no records, too many, or two of one name")
    ends = [record.header_offset for record in records[1:]] + [end]
    for record, after in zip(records, ends):
        file.seek(record.header_offset)
        signature, name_length, padding = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        name = file.read(name_length)
        start = record.header_offset + _LOCAL_HEADER.size + name_length + padding
        trailer = after - start - record.file_size
        is_stored = record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
        if signature != b"PK\x03\x04" or name != record.filename.encode() or not is_stored:
            raise ValueError(f"{record.filename} is not what the directory says")
        if not 0 <= trailer < _LONGEST_TRAILER:
            raise ValueError(f"{record.filename} does not end where the next record begins")
        sizes[start] = record.file_size
    return sizes


def _names_of_legacy(file: IO[bytes]) -> Iterator[str]:
    """What the pickles of a file from before the zip format, or of a bare pickle, would call."""
    for number in range(_LEGACY_PICKLES):
        try:
            yield from called_names(file)
        except ValueError:
            if number == 0:
                raise
            return  # a bare pickle; torch answers for the rest


def called_names(file: IO[bytes]) -> Iterator[str]:
    """The `module.name` of everything that one pickle would look up, without doing any of it.

    Raises:
        ValueError: if it is damaged or takes more steps or memory than any checkpoint.
    """
    recent: list[str] = []
    memo: dict[int, str] = {}
    for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if number >= MAX_OPERATIONS:
            raise ValueError("too many operations")
        if operation.name == "GLOBAL" or operation.name == "INST":
            yield str(argument).replace(" ", ".", 1)
        elif operation.name == "STACK_GLOBAL":
            yield ".".join(recent[-2:])
        elif operation.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(memo) if argument is None else argument
            if not 0 <= index < MAX_OPERATIONS:  # pickle makes a table of that size
                raise ValueError("a memo of that size")
            memo[index] = recent[-1] if recent else ""
        elif operation.name in ("GET", "BINGET", "LONG_BINGET"):
            recent.append(memo.get(argument or 0, ""))
        elif isinstance(argument, str):
            recent.append(argument)
        del recent[:-2]
