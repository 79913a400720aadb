"""The wheel and the source archive: built offline, they hold what the package needs, and the wheel runs by itself.

Its kernels are used where there is no compiler. That they are in the wheel is asserted: the extension is optional, so
that a build without a compiler succeeds.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from environment import FIXTURES, ROOT
from fork_server import ForkServer

from lit_gpt.inference.kernel_library import check_library
from lit_gpt.inference.levels import LEVELS

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
NAME = f"lit_gpt-{VERSION}"
CONFIGS = "lit_gpt/configs"  # a link to configs/ in the checkout, files in what is built
LIBRARY = "lit_gpt/inference/libkernels.so"
SUPPORTED = platform.system() == "Linux" and platform.machine() in LEVELS
BUILD = ("-m", "build", "--no-isolation", "--skip-dependency-check")  # the check starts a Python for each kind
HAS_COMPILER = shutil.which("g++") is not None

with_kernels = pytest.mark.skipif(
    not SUPPORTED or (not HAS_COMPILER and "CI" not in os.environ), reason="no kernels for this machine, or no g++"
)


class Built(NamedTuple):
    """What was built.

    Attributes:
        tree: the copy of the tracked files that it was built from.
        installed: the folder that the wheel was installed into.
    """

    tree: Path
    wheel: Path
    sdist: Path
    installed: Path


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    return [name for name in listed.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python on `command` with nothing of the checkout on its path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"} | environment
    words = [sys.executable, "-P", *map(str, command)]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both, from a copy of the tracked files: a build leaves folders behind, and includes what it finds in old ones.

    Compiling takes a while: what the checkout's installation has compiled of the same sources is used, and pytest's
    processes share what the first of them has built.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distribution"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            build(folder)
            (folder / "done").touch()
    (wheel,) = folder.glob("dist/*.whl")
    return Built(folder / "tree", wheel, folder / f"dist/{NAME}.tar.gz", folder / "installed")


def build(folder: Path) -> None:
    for name in tracked_files():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "tree" / name, follow_symlinks=False)
    if (ROOT / LIBRARY).exists():
        shutil.copy2(ROOT / LIBRARY, folder / "tree" / LIBRARY)
    run(*BUILD, "--sdist", "--wheel", "--outdir", folder / "dist", folder / "tree", cwd=folder)
    command = ("-m", "pip", "install", "--no-deps", "--quiet", "--target", folder / "installed")
    run(*command, next(folder.glob("dist/*.whl")), cwd=folder)


@pytest.mark.slow
def test_both_have_every_file_of_the_package(built: Built) -> None:
    tracked = set(tracked_files()) - {CONFIGS}
    configs = {f"{CONFIGS}/{Path(name).name}" for name in tracked if name.startswith("configs/")}
    package = {name for name in tracked if name.startswith("lit_gpt/")} | configs
    assert {"lit_gpt/py.typed", "lit_gpt/insight/trace.html", f"{CONFIGS}/quickstart.yaml"} <= package
    assert {"lit_gpt/inference/csrc/dispatch.cpp", "lit_gpt/serve/page/index.html"} <= package

    metadata = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    in_wheel = set(zipfile.ZipFile(built.wheel).namelist())
    assert in_wheel - {LIBRARY} == package | {f"{NAME}.dist-info/{name}" for name in metadata}

    with tarfile.open(built.sdist) as archive:
        files = {member.name.removeprefix(f"{NAME}/") for member in archive if not member.isdir()}
        assert all(member.isdir() or member.isreg() for member in archive), "no links, which not every system has"
    made = {name for name in files if name.startswith("lit_gpt.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert files == tracked | configs | made
    assert {"setup.py", "lit_gpt/inference/csrc/level.cpp", "lit_gpt/inference/csrc/abi.h"} <= files


LOAD = "import sys, lit_gpt; print(lit_gpt.__file__, lit_gpt.load(sys.argv[1]).generate('First', max_new_tokens=2))"


@pytest.mark.slow
def test_the_wheel_runs_without_the_checkout(built: Built, tmp_path: Path, fork_server: ForkServer) -> None:
    target = built.installed
    assert run("-m", "lit_gpt", "--version", cwd=tmp_path, PYTHONPATH=str(target)).stdout == f"lit_gpt {VERSION}\n"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = fork_server.run("-c", LOAD, FIXTURES / "modern.ckpt", cwd=tmp_path, env=environment)
    assert done.returncode == 0 and done.stdout.startswith(f"{target}/lit_gpt/__init__.py "), done.stderr


@pytest.mark.slow
@with_kernels
def test_the_wheel_has_the_kernels_of_all_levels(built: Built) -> None:
    assert built.wheel.name == f"{NAME}-py3-none-linux_{platform.machine()}.whl"  # of no Python's ABI
    path = built.installed / LIBRARY
    check_library(path, platform.machine())
    assert b"libgomp" not in path.read_bytes() and b"libstdc++" not in path.read_bytes()
    library, names = ctypes.CDLL(str(path)), []
    library.level_name.restype, library.level_name.argtypes = ctypes.c_char_p, [ctypes.c_long]
    while (name := library.level_name(len(names))) is not None:
        names.append(name.decode())
    assert names == list(LEVELS[platform.machine()])


PREDICT = """
import sys
import lit_gpt.cli.shipped_configs as configs
from lit_gpt.__main__ import main
print(configs.__file__, (configs.SHIPPED / "quickstart.yaml").is_file())
from lit_gpt.inference.decode_kernel import FusedDecode
original, calls = FusedDecode.__call__, []
FusedDecode.__call__ = lambda *arguments: calls.append(1) or original(*arguments)
status = main(["predict", "--ckpt_path", sys.argv[1], "--start", "First Citizen:", "--max_new_tokens", "9",
               "--temperature", "0"])
print(f"{status} {len(calls)} calls of the kernels", file=sys.stderr)
main(["info", "--hardware", "--format", "json"])
"""


def predict(installed: Path, folder: Path, server: ForkServer) -> tuple[str, list[str], str]:
    """What `predict` prints, its lines on stderr, and what `info --hardware` says of the kernels.

    Asserted is that it is the installed package which runs, with the settings that it has beside it.
    """
    environment = {**os.environ, "PYTHONPATH": str(installed), "PATH": str(folder), "HF_HUB_OFFLINE": "1"}
    environment |= {"CC": "/no/such/cc", "CXX": "/no/such/c++"}
    done = server.run("-c", PREDICT, FIXTURES / "modern.ckpt", cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    where, _, printed = done.stdout.partition("\n")
    assert where == f"{installed}/lit_gpt/cli/shipped_configs.py True"
    text, _, hardware = printed.partition("\n{")
    return text, done.stderr.splitlines(), json.loads("{" + hardware)["hardware"]["decoding kernels"]


@pytest.mark.slow
@with_kernels
def test_predict_uses_the_kernels_where_there_is_no_compiler(
    built: Built, tmp_path: Path, fork_server: ForkServer
) -> None:
    text, lines, kernels = predict(built.installed, tmp_path, fork_server)
    assert text.startswith("First Citizen:") and len(text.strip()) > len("First Citizen:")
    assert kernels.split(", ")[0] == "yes" and kernels.split(", ")[1] in LEVELS[platform.machine()]
    n_calls = 1 + 8  # the prompt, and the new tokens but the last
    assert lines[-1] == f"0 {n_calls} calls of the kernels" and not any("kernels, slower" in line for line in lines)
    assert list(tmp_path.iterdir()) == [], "nothing is compiled or kept"


@pytest.mark.slow
@pytest.mark.skipif(not SUPPORTED, reason="no kernels for this kind of machine")
def test_a_build_without_a_compiler_makes_a_package_that_falls_back(
    built: Built, tmp_path: Path, fork_server: ForkServer
) -> None:
    """It says so once, when it is installed, and then where somebody asks or waits longer."""
    shutil.copytree(built.tree, tmp_path / "tree", symlinks=True, ignore=shutil.ignore_patterns("build", "dist"))
    (tmp_path / "tree" / LIBRARY).write_bytes(b"what an older checkout has built in place")
    command = (*BUILD, "--wheel", "--outdir", tmp_path, tmp_path / "tree")
    log = run(*command, cwd=tmp_path, CC="/no/such/cc", CXX="/no/such/c++")
    warning = 'building extension "lit_gpt.inference.libkernels" failed: /no/such/c++ was not found.'
    assert (log.stdout + log.stderr).count(warning) == 1
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert LIBRARY not in archive.namelist()
        archive.extractall(tmp_path / "installed")  # as pip, which has installed the other one

    (tmp_path / "empty").mkdir()
    text, lines, kernels = predict(tmp_path / "installed", tmp_path / "empty", fork_server)
    reason = "their library was not built when lit_gpt was installed: install it again where there is a g++"
    assert kernels == f"no: {reason}"
    assert [line for line in lines if "kernels" in line] == [
        f"PyTorch does the work of the kernels, slower: {reason}",
        "0 0 calls of the kernels",
    ]
    assert text.startswith("First Citizen:") and len(text.strip()) > len("First Citizen:")
