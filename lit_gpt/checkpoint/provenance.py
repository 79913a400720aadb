"""The code and the environment that a run has, for those who want to repeat it. Imports no torch."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "lightning", "tiktoken", "tokenizers", "numpy")
"""Those that a run's numbers depend on."""
_SOURCES = (".py", ".cpp", ".h")


@functools.cache
def code_version() -> dict[str, str | None]:
    """The version of this package, SHA-256 of its source files, and the commit of the checkout that it is part of.

    Of a checkout that was changed since its commit the hash tells which files it had; an installed package has none.
    """
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in _SOURCES):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(package).as_posix()} {content}\n".encode())
    return {"version": _version("lit_gpt"), "sha256": digest.hexdigest(), "commit": commit_of(package.parent)}


def environment() -> dict[str, Any]:
    """Python, packages, system and processor; nothing that names the machine or its user."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def commit_of(checkout: Path) -> str | None:
    """The commit that a git checkout is at, read from its files; None for a folder that is none."""
    git = checkout / ".git"
    try:
        if git.is_file():  # of a worktree, or a submodule: "gitdir: PATH"
            git = checkout / git.read_text("utf-8").partition(":")[2].strip()
        head = (git / "HEAD").read_text("utf-8").strip()
        found = _commit_of_branch(git, head.removeprefix("ref: ")) if head.startswith("ref: ") else head
    except (OSError, UnicodeDecodeError):
        return None
    return found if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", found) else None


def _commit_of_branch(git: Path, branch: str) -> str:
    shared = git / "commondir"
    common = git / shared.read_text("utf-8").strip() if shared.is_file() else git
    for folder in (git, common):
        if (folder / branch).is_file():
            return (folder / branch).read_text("utf-8").strip()
    lines = (common / "packed-refs").read_text("utf-8").splitlines()
    return next((line.split(" ")[0] for line in lines if line.endswith(f" {branch}")), "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor's name; of what architecture it is where the system does not say."""
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        except OSError:
            lines = []
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine()
