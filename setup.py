"""The kernels' library, which setuptools builds into the package; pyproject.toml has everything else.

`pip install`, `python -m build` and `python setup.py build_ext --inplace` run this. The library has no Python in it and
ctypes loads it: one wheel of a platform serves every Python. Without a compiler the package is installed without it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a build backend has it not

from lit_gpt.inference.kernel_library import (  # noqa: E402
    LIBRARY,
    SOURCES,
    Unavailable,
    check_library,
    compile_commands,
    stamped,
)
from lit_gpt.inference.levels import LEVELS, LINK_FLAGS  # noqa: E402

MACHINE = platform.machine()


def build_library(target: Path, scratch: Path, force: bool = False) -> None:
    """Compile and link the kernels of this kind of machine, unless a library of the same sources is there already.

    Args:
        target: where it is written, whole or not at all.
        scratch: a folder for object files.
        force: compile them in any case.

    Raises:
        CompileError: if there is no compiler or it fails; no file is then left at `target`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    made = next((path for path in (target, LIBRARY) if not force and is_usable(path)), None)
    if made == target:
        return
    target.unlink(missing_ok=True)
    content = made.read_bytes() if made else stamped(compiled(scratch).read_bytes(), MACHINE)
    write_whole(target, content)


def is_usable(path: Path) -> bool:
    """Whether it is a library of these sources that can be loaded here: not one of a machine with a newer C library."""
    try:
        check_library(path, MACHINE)
        ctypes.CDLL(str(path))
    except (Unavailable, OSError):
        return False
    return True


def compiled(scratch: Path) -> Path:
    """The library as the linker makes it, in `scratch`. Raises CompileError."""
    compiler = find_compiler()
    scratch.mkdir(parents=True, exist_ok=True)
    commands = compile_commands(compiler, scratch, MACHINE)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run_compiler, commands.values()))
    path = scratch / LIBRARY.name
    run_compiler([*compiler, *map(str, commands), *LINK_FLAGS, "-o", str(path)])
    return path


def find_compiler() -> list[str]:
    """What `CXX` says, as a command and its arguments, else g++ or c++. Raises CompileError."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = next((path for name in named[:1] or ("g++", "c++") if (path := shutil.which(name))), None)
    if found is None:
        raise CompileError(f"{named[0]} was not found" if named else "neither g++ nor c++ was found (or set CXX)")
    return [found, *named[1:]]


def run_compiler(command: list[str]) -> None:
    """Run it. Raises CompileError with the first error that it prints."""
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CompileError(f"{command[0]}: {next((line for line in lines if 'error' in line), lines[0])}")


def write_whole(path: Path, content: bytes) -> None:
    """Replace the file at once: programs may have the old one mapped, and others may be starting."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.chmod(0o755)
    partial.replace(path)


class BuildKernels(build_ext):
    """Builds the extension as the kernels' library, under its own name."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the name of a Python: lit_gpt/inference/libkernels.so."""
        return os.path.join(*fullname.split(".")) + LIBRARY.suffix

    def build_extension(self, ext: Extension) -> None:
        """Raises CompileError, of which setuptools makes a warning: the extension is optional."""
        try:
            build_library(Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp), bool(self.force))
        except (CompileError, OSError) as error:
            raise CompileError(f"{error}. PyTorch will do the work of the kernels, slower") from error

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: into the package."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if built.exists():
                write_whole(LIBRARY, built.read_bytes())


class PlatformWheel(bdist_wheel):
    """Names the wheel after the platform alone: the library depends on no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """As `py3-none-linux_x86_64`."""
        python, abi, on = super().get_tag()
        return (python, abi, on) if self.root_is_pure else ("py3", "none", on)


def kernels() -> list[Extension]:
    """The extension, on systems that it is written for."""
    if platform.system() != "Linux" or MACHINE not in LEVELS:
        return []
    files = sorted(path.relative_to(ROOT).as_posix() for path in SOURCES.iterdir())
    sources = [name for name in files if name.endswith(".cpp")]
    headers = [name for name in files if name.endswith(".h")]
    return [Extension(f"lit_gpt.inference.{LIBRARY.stem}", sources, depends=headers, optional=True)]


if __name__ == "__main__":
    setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel})
