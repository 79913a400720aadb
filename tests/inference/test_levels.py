"""All levels compute the same bits, whatever the machine: those of this CPU, and those for Arm in an emulator.

This says nothing about speed. `level_hashes.cpp` has the cases. The levels of this CPU are those of the package's
library; those that are compiled here are not optimised, which takes the most time and changes no bit.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lit_gpt.inference.kernel_library import LIBRARY, SOURCES, compile_commands
from lit_gpt.inference.levels import LEVELS

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ for the program that prints the hashes"),
]

ARM = {"compiler": "aarch64-linux-gnu-g++", "emulator": "qemu-aarch64"}
Hashes = dict[str, dict[str, str]]
"""Level → case → hash."""

_ROUNDED = "avx512_bf16"
"""The level whose products in bf16 are of rounded inputs: these are other numbers."""


def run_all(commands: Iterable[list[str]]) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))


def main_command(compiler: str, program: Path) -> list[str]:
    """The compiler's command for the program, without the kernels."""
    source = Path(__file__).parent / "level_hashes.cpp"
    return [compiler, "-O1", "-std=c++17", f"-I{SOURCES}", str(source), "-o", str(program)]


UNOPTIMISED = {"-O3": ["-O0", "-Dalways_inline=unused"]}
"""What replaces a word of the command. Inlined everywhere, the functions would be ten times the code to compile."""


def unoptimised(commands: dict[Path, list[str]]) -> dict[Path, list[str]]:
    return {
        path: [new for word in command for new in UNOPTIMISED.get(word, [word])] for path, command in commands.items()
    }


def hashes(*command: str | Path) -> Hashes:
    """What the program prints."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # there may be more threads than cores
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: Hashes = {}
    for line in done.stdout.splitlines():
        kind, _, rest = line.rpartition(" ")
        if kind == "level":
            latest = found[rest] = {}
        else:
            latest[kind] = rest
    return found


def check_same(levels: Hashes, expected: dict[str, str]) -> None:
    for name, cases in levels.items():
        assert len(cases) == len(expected) > 80
        different = [case for case in cases if cases[case] != expected[case]]
        assert [case for case in different if not (name == _ROUNDED and "bf16" in case)] == [], name


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with the package's library."""
    path = tmp_path_factory.mktemp("here") / "hashes"
    run_all([[*main_command("g++", path), "-fopenmp", str(LIBRARY), f"-Wl,-rpath,{LIBRARY.parent}"]])
    return path


@pytest.fixture(scope="module")
def here(program: Path) -> Hashes:
    return hashes(program, "1")


def test_all_levels_of_this_cpu(here: Hashes) -> None:
    check_same(here, next(iter(here.values())))


def test_any_number_of_threads(program: Path, here: Hashes) -> None:
    for threads in ("2", "3"):
        assert hashes(program, threads) == here


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the expected bits are those of x86")
def test_avx2_vnni_by_the_same_instructions_of_avx512(here: Hashes, tmp_path: Path) -> None:
    """Where the CPU has no AVX-VNNI: the level's source with the other encoding of the instructions, named avx2."""
    if "avx2_vnni" in here:
        pytest.skip("the level itself has been tested")
    if "avx512_vnni" not in here:
        pytest.skip("this CPU has no AVX512-VNNI")
    commands = unoptimised(compile_commands(["g++"], tmp_path, "x86_64"))
    level = commands[tmp_path / "avx2_vnni.o"]
    level[level.index("-mavxvnni")] = "-mavx512vnni"
    level[level.index("-DLEVEL=level_avx2_vnni")] = "-DLEVEL=level_avx2"
    absent = [f"-Wl,--defsym=level_{name}=level_avx2" for name in LEVELS["x86_64"] if name != "avx2"]
    objects = [str(tmp_path / name) for name in ("dispatch.o", "avx2_vnni.o")]
    run_all([[*level, "-mavx512vl"], commands[tmp_path / "dispatch.o"]])
    run_all([[*main_command("g++", tmp_path / "hashes"), *objects, *absent]])
    check_same({"avx2": hashes(tmp_path / "hashes", "1", "avx2")["avx2"]}, here["avx2"])


def test_the_levels_for_arm_in_an_emulator(here: Hashes, tmp_path: Path) -> None:
    missing = [tool for tool in ARM.values() if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    commands = unoptimised(compile_commands([ARM["compiler"]], tmp_path, "aarch64"))
    run_all(commands.values())
    run_all([[*main_command(ARM["compiler"], tmp_path / "hashes"), "-static", *map(str, commands)]])
    emulated = hashes(ARM["emulator"], "-cpu", "max", tmp_path / "hashes", "1")
    assert list(emulated) == list(LEVELS["aarch64"])
    check_same(emulated, next(iter(here.values())))
