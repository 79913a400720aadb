"""The wheel and the source archive: built offline, they hold what the package needs, and the wheel runs by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from environment import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
NAME = f"lit_gpt-{VERSION}"
CONFIGS = "lit_gpt/configs"  # a link to configs/ in the checkout, files in what is built


class Built(NamedTuple):
    """The two files of a build."""

    wheel: Path
    sdist: Path


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    return [name for name in listed.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run this Python on `command` with nothing of the checkout on its path; what it prints."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"} | environment
    words = [sys.executable, "-P", *map(str, command)]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both, from a copy of the tracked files: a build leaves folders behind, and includes what it finds in old ones."""
    folder = tmp_path_factory.mktemp("built")
    for name in tracked_files():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "tree" / name, follow_symlinks=False)
    run("-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "tree", cwd=folder)
    return Built(folder / f"dist/{NAME}-py3-none-any.whl", folder / f"dist/{NAME}.tar.gz")


@pytest.mark.slow
def test_both_have_every_file_of_the_package(built: Built) -> None:
    tracked = set(tracked_files()) - {CONFIGS}
    configs = {f"{CONFIGS}/{Path(name).name}" for name in tracked if name.startswith("configs/")}
    package = {name for name in tracked if name.startswith("lit_gpt/")} | configs
    assert {"lit_gpt/py.typed", "lit_gpt/insight/trace.html", f"{CONFIGS}/quickstart.yaml"} <= package
    assert {"lit_gpt/inference/csrc/dispatch.cpp", "lit_gpt/serve/page/index.html"} <= package

    metadata = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    assert set(zipfile.ZipFile(built.wheel).namelist()) == package | {f"{NAME}.dist-info/{name}" for name in metadata}

    with tarfile.open(built.sdist) as archive:
        files = {member.name.removeprefix(f"{NAME}/") for member in archive if not member.isdir()}
        assert all(member.isdir() or member.isreg() for member in archive), "no links, which not every system has"
    made = {name for name in files if name.startswith("lit_gpt.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert files == tracked | configs | made


@pytest.mark.slow
def test_the_wheel_runs_without_the_checkout(built: Built, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    run("-m", "pip", "install", "--no-deps", "--quiet", "--target", target, built.wheel, cwd=tmp_path)
    where = "import lit_gpt.cli.shipped_configs as c; print(c.__file__, (c.SHIPPED / 'quickstart.yaml').is_file())"
    assert run("-c", where, cwd=tmp_path, PYTHONPATH=str(target)) == f"{target}/lit_gpt/cli/shipped_configs.py True\n"
    printed = run("-m", "lit_gpt", "info", "--preset", "gpt2", cwd=tmp_path, PYTHONPATH=str(target))
    assert "124,439,808" in printed
    assert run("-m", "lit_gpt", "--version", cwd=tmp_path, PYTHONPATH=str(target)) == f"lit_gpt {VERSION}\n"
