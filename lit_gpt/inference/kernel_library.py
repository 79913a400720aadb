"""The file of the kernels' library: what it is compiled from, and that it is whole and of these sources.

setup.py builds it when the package is installed. It ends with a stamp, which is read before the file is mapped: to map
a file that is cut off ends the process with SIGBUS. Standard library only: setup.py imports this.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from lit_gpt.inference.levels import LINK_FLAGS, object_arguments

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = Path(__file__).parent / "libkernels.so"

_MARK = b"\nlit_gpt kernels "
_HEX_DIGITS = 64
_STAMP_BYTES = len(_MARK) + 2 * _HEX_DIGITS + 2
"""The mark, the hash of the sources, a space, that of the content before the stamp, and a line end."""


class Unavailable(Exception):
    """There are no kernels here; the message says why."""


def source_hash(machine: str) -> str:
    """The SHA-256 of what the library of that kind of machine is compiled from: sources and flags.

    Raises:
        OSError: if the sources cannot be read.
    """
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    sources = b"".join(path.name.encode() + b"\0" + path.read_bytes() for path in files)
    return hashlib.sha256(sources + repr((object_arguments(machine), LINK_FLAGS)).encode()).hexdigest()


def compile_commands(compiler: list[str], folder: Path, machine: str) -> dict[Path, list[str]]:
    """For each object file of the library, in `folder`, the command that makes it."""
    return {
        folder / f"{name}.o": [*compiler, *flags, "-c", str(SOURCES / source), "-o", str(folder / f"{name}.o")]
        for name, (source, *flags) in object_arguments(machine).items()
    }


def stamped(content: bytes, machine: str) -> bytes:
    """What the linker made, with the stamp at its end, behind all that is mapped."""
    return content + _stamp(content, machine)


def check_library(path: Path, machine: str) -> None:
    """Whether the file is a library of these sources for that kind of machine, and whole.

    Raises:
        Unavailable: if it is not; the message says why, and what to do.
        OSError: if the sources cannot be read.
    """
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        reason = "their library was not built when lit_gpt was installed: install it again where there is a g++"
        raise Unavailable(reason) from None
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror or error}") from error
    content, stamp = whole[:-_STAMP_BYTES], whole[-_STAMP_BYTES:]
    if stamp == _stamp(content, machine):
        return
    is_whole = stamp.startswith(_MARK) and stamp[-_HEX_DIGITS - 1 :] == _stamp(content, machine)[-_HEX_DIGITS - 1 :]
    what = "was built from other sources" if is_whole else "is damaged, or of another program"
    raise Unavailable(f"{path} {what}: install lit_gpt again where there is a g++")


def _stamp(content: bytes, machine: str) -> bytes:
    return _MARK + f"{source_hash(machine)} {hashlib.sha256(content).hexdigest()}\n".encode()
