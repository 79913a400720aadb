"""The levels of the kernels: one for each instruction set that they are compiled for, and the flags for it.

All levels of a kind of CPU are in one library, and the CPU says which can be used: see csrc/dispatch.cpp. This module
imports the standard library only: setup.py reads it.
"""

from __future__ import annotations

from typing import NamedTuple

ISA_VARIABLE = "LIT_GPT_ISA"
"""The environment variable with the name of the level to use: at most what the CPU has."""

FLAGS = ("-O3", "-ffp-contract=off", "-std=c++17", "-fno-exceptions", "-fno-rtti", "-fPIC", "-fvisibility=hidden")
"""Of g++, for all files."""
LINK_FLAGS = ("-shared", "-s", "-Wl,--as-needed", "-static-libgcc")

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")


class LevelSource(NamedTuple):
    """How a level is compiled.

    Attributes:
        primitives: its header in csrc/.
        flags: the instructions that the compiler may use.
    """

    primitives: str
    flags: tuple[str, ...]


LEVELS: dict[str, dict[str, LevelSource]] = {  # by `platform.machine()`; the least first
    "x86_64": {
        "avx2": LevelSource("primitives_avx2.h", _AVX2),
        "avx2_vnni": LevelSource("primitives_avx2.h", (*_AVX2, "-mavxvnni")),
        "avx512": LevelSource("primitives_avx512.h", _AVX512),
        "avx512_vnni": LevelSource("primitives_avx512.h", (*_AVX512, "-mavx512vnni")),
        "avx512_bf16": LevelSource("primitives_avx512.h", (*_AVX512, "-mavx512vnni", "-mavx512bf16")),
    },
    "aarch64": {
        "neon": LevelSource("primitives_neon.h", ("-march=armv8-a",)),
        "neon_dotprod": LevelSource("primitives_neon.h", ("-march=armv8.2-a+dotprod",)),
        "neon_i8mm": LevelSource("primitives_neon.h", ("-march=armv8.2-a+dotprod+i8mm",)),
    },
}


def object_arguments(machine: str) -> dict[str, list[str]]:
    """For each object file of that kind of machine's library its source in csrc/ and the compiler's arguments."""
    arguments = {"dispatch": ["dispatch.cpp", *FLAGS]}
    for name, source in LEVELS[machine].items():
        defined = [f"-DLEVEL=level_{name}", f'-DPRIMITIVES="{source.primitives}"']
        arguments[name] = ["level.cpp", *FLAGS, *source.flags, *defined]
    return arguments
