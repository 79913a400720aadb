"""Frozen models: folders that do not change any more, each known by its name, with a manifest of all that is in it.

`frozen:NAME` is the folder NAME under `frozen`, or under what LIT_GPT_FROZEN names. The prefix keeps such a name apart
from files, runs and ids of the hub. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError, brief, nearest
from lit_gpt.files.atomic import atomic_write

PREFIX = "frozen:"
VARIABLE = "LIT_GPT_FROZEN"
MANIFEST = "manifest.json"
_FORMAT, _VERSION = "lit_gpt.frozen", 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TIME = re.compile(r"[0-9T:Z+.-]{10,40}")
_MAX_MANIFEST = 1 << 20  # bytes


@dataclass(frozen=True)
class Manifest:
    """What a frozen folder holds.

    Attributes:
        name: of the model.
        frozen_at: the time, in UTC.
        files: name → size in bytes and SHA-256, of every file but the manifest itself.
        sha256: of the manifest; who knows it knows every byte of the folder.
    """

    name: str
    frozen_at: str
    files: dict[str, tuple[int, str]]
    sha256: str


def frozen_root() -> Path:
    """The folder of all frozen models."""
    return Path(os.environ.get(VARIABLE) or "frozen").expanduser()


def check_name(name: str) -> str:
    """The name, which can be that of a folder everywhere.

    Raises:
        UserError: if it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{brief(name)} is no name of a frozen model: letters, digits, '.', '_' and '-', at most 64")
    return name


def frozen_folder(name: str) -> Path:
    """The folder of the frozen model `name`, which is there; the prefix may be written or left out.

    Raises:
        UserError: if there is none, with the nearest name.
    """
    root, name = frozen_root(), check_name(name.removeprefix(PREFIX))
    folder = root / name
    if (folder / MANIFEST).is_file():
        return folder
    known = sorted(path.parent.name for path in root.glob(f"*/{MANIFEST}") if _NAME.fullmatch(path.parent.name))
    remedy = nearest(name, known) if known else f"set {VARIABLE} to their folder, or make one with lit_gpt freeze"
    raise UserError(f'no frozen model "{name}" in {root}: {remedy}')


def frozen_checkpoint(source: str) -> Path | None:
    """The checkpoint that `frozen:NAME` stands for; None for a source of another kind.

    Raises:
        UserError: if there is no such frozen model, or its checkpoint is gone.
    """
    if not source.startswith(PREFIX):
        return None
    folder = frozen_folder(source)
    checkpoint = folder / checkpoint_name(folder.name)
    if not checkpoint.is_file():
        raise UserError(f"{source}: {checkpoint} is gone; lit_gpt freeze --verify {folder.name} says what else is")
    return checkpoint


def checkpoint_name(name: str) -> str:
    """The checkpoint's file in the folder of a frozen model: named after it, since commands show that name."""
    return f"{name}.ckpt"


def write_manifest(folder: Path, name: str, frozen_at: str) -> Manifest:
    """Write the manifest of all files of `folder`, which is still being made."""
    files = {path.name: (path.stat().st_size, _sha256(path)) for path in sorted(folder.iterdir())}
    values = {
        "format": _FORMAT,
        "version": _VERSION,
        "name": name,
        "frozen_at": frozen_at,
        "files": {file: {"bytes": size, "sha256": digest} for file, (size, digest) in files.items()},
    }
    with atomic_write(folder / MANIFEST, "w") as file:
        file.write(json.dumps(values, indent=1) + "\n")
    return Manifest(name, frozen_at, files, _sha256(folder / MANIFEST))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a frozen folder.

    Raises:
        UserError: if it cannot be read, or is damaged.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST:
            raise UserError(f"{path} is damaged: it is larger than any manifest; {_REMEDY}")
        data = path.read_bytes()
        values = json.loads(data)
        return Manifest(values["name"], values["frozen_at"], _files(values), hashlib.sha256(data).hexdigest())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {_REMEDY}") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): {_REMEDY}") from error


_REMEDY = "restore the folder from a copy, or freeze the run again under another name"


def _files(values: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """The manifest's list, checked; what is wrong raises ValueError, KeyError, TypeError or AttributeError."""
    is_ours = values["format"] == _FORMAT and values["version"] == _VERSION
    if not is_ours or not _NAME.fullmatch(values["name"]) or not _TIME.fullmatch(values["frozen_at"]):
        raise ValueError("another format")
    files = {name: (item["bytes"], item["sha256"]) for name, item in values["files"].items()}
    for name, (size, digest) in files.items():
        if not _FILE.fullmatch(name) or type(size) is not int or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(name)
    return files


def verify(folder: Path) -> Manifest:
    """Read every byte of a frozen folder and compare it with its manifest.

    Raises:
        UserError: naming the files that were changed, are gone, or were added.
    """
    manifest = read_manifest(folder)
    faults = list(_faults(folder, manifest))
    if faults:
        raise UserError(f"{folder} is not as it was frozen: {'; '.join(faults)}: {_REMEDY}")
    return manifest


def _faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    if manifest.name != folder.name:
        yield f"it was frozen as {manifest.name}"
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        try:
            if path.is_symlink() or not path.is_file():
                yield f"{name} is gone"
            elif path.stat().st_size != size or _sha256(path) != digest:
                yield f"{name} was changed"
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror or error})"
    for path in sorted(folder.iterdir()):
        if path.name not in manifest.files and path.name != MANIFEST:
            yield f"{brief(path.name)} was added"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
