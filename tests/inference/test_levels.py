"""All levels compute the same bits, whatever the machine: those of this CPU, and those for Arm in an emulator.

This says nothing about speed. `level_hashes.cpp` has the cases.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lit_gpt.inference import kernel_library
from lit_gpt.inference.levels import LEVELS

pytestmark = [pytest.mark.kernels, pytest.mark.slow]

HERE = Path(__file__).parent
ARM = {"compiler": "aarch64-linux-gnu-g++", "emulator": "qemu-aarch64"}
_ROUNDED = "avx512_bf16"
"""The level whose products in bf16 are of rounded inputs: these are other numbers."""


def build(
    folder: Path, compiler: str, machine: str, replaced: dict[str, list[str]] | None = None, made: Path | None = None
) -> Path:
    """The program that prints the hashes, with `replaced` for arguments of the compiler.

    Object files whose commands are the same as for the program `made` are taken from beside that.
    """
    commands = kernel_library.compile_commands(compiler, folder, machine)
    words = {"-O3": ["-O1"], "-fopenmp": ["-Wno-unknown-pragmas"], **(replaced or {})}
    changed = dict(commands)
    if made is not None:
        changed = {path: command for path, command in commands.items() if set(command) & set(replaced or {})}
        for path in commands.keys() - changed.keys():
            shutil.copy(made.with_name(path.name), path)
    changed = {path: [word for old in command for word in words.get(old, [old])] for path, command in changed.items()}
    program = folder / "hashes"
    arguments = ["-O1", "-std=c++17", "-static", f"-I{kernel_library.SOURCES}", str(HERE / "level_hashes.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), changed.values()))
    subprocess.run([compiler, *arguments, *map(str, commands), "-o", str(program)], check=True)
    return program


def hashes(*command: str) -> dict[str, dict[str, str]]:
    """Level → case → hash, as the program prints them."""
    found: dict[str, dict[str, str]] = {}
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        kind, _, rest = line.rpartition(" ")
        if kind == "level":
            latest = found[rest] = {}
        else:
            latest[kind] = rest
    return found


def check_same(levels: dict[str, dict[str, str]], expected: dict[str, str]) -> None:
    for name, cases in levels.items():
        assert len(cases) == len(expected) > 80
        different = [case for case in cases if cases[case] != expected[case]]
        assert [case for case in different if not (name == _ROUNDED and "bf16" in case)] == [], name


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("here"), shutil.which("g++") or "c++", platform.machine())


@pytest.fixture(scope="module")
def here(program: Path) -> dict[str, dict[str, str]]:
    return hashes(str(program))


def test_all_levels_of_this_cpu(here: dict[str, dict[str, str]]) -> None:
    check_same(here, next(iter(here.values())))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the expected bits are those of x86")
def test_avx2_vnni_by_the_same_instructions_of_avx512(
    program: Path, here: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """The level itself where the CPU has AVX-VNNI; here its source with the other encoding of the instructions."""
    if "avx512_vnni" not in here:
        pytest.skip("this CPU has no AVX512-VNNI")
    swapped = {"-DLEVEL=level_avx2": ["-DLEVEL=level_avx2_vnni"], "-DLEVEL=level_avx2_vnni": ["-DLEVEL=level_avx2"]}
    flags = {"-mavxvnni": ["-mavx512vnni", "-mavx512vl"]}
    other = build(tmp_path, shutil.which("g++") or "c++", "x86_64", {**swapped, **flags}, made=program)
    check_same({"avx2": hashes(str(other))["avx2"]}, here["avx2"])


def test_the_levels_for_arm_in_an_emulator(here: dict[str, dict[str, str]], tmp_path: Path) -> None:
    missing = [tool for tool in ARM.values() if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    emulated = hashes(ARM["emulator"], "-cpu", "max", str(build(tmp_path, ARM["compiler"], "aarch64")))
    assert list(emulated) == list(LEVELS["aarch64"])
    check_same(emulated, next(iter(here.values())))
