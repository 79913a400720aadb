"""Table of the hardware facts behind `precision: auto` and `compile: auto`, for `lit_gpt info --hardware`."""

from __future__ import annotations

import os

import torch

from lit_gpt.inference import native
from lit_gpt.model.linear import prefers_onednn
from lit_gpt.train.compile import has_cpu_compiler
from lit_gpt.train.precision import cpu_has_bf16, cuda_decision, device_type, muon_arithmetic


def hardware_table() -> list[tuple[str, str]]:
    """What `auto` checks, as human-readable (name, value) pairs."""
    rows = [
        ("CPU", f"{os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()} threads"),
        ("AMX tiles", _yes(torch.cpu._is_amx_tile_supported())),
        ("AVX512-BF16", _yes(torch.cpu._is_avx512_bf16_supported())),
        ("AVX512-VNNI", _yes(torch.cpu._is_vnni_supported())),
        ("decoding kernels", native.status()),
        ("torch.compile on the CPU", _yes(has_cpu_compiler())),
        ("MPS", _yes(torch.backends.mps.is_available())),
        ("CUDA", f"{torch.cuda.device_count()} devices" if torch.cuda.is_available() else "no"),
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"))
    if torch.cuda.is_available():
        rows.append(("native bf16", _yes(torch.cuda.is_bf16_supported(including_emulation=False))))
    rows.append(("training auto", _auto_precision()))
    blas = "MKL" if torch.backends.mkl.is_available() else "PyTorch's BLAS"
    rows.append(("products in fp32", "oneDNN" if prefers_onednn() else blas))
    rows.append(("products of Muon", "bf16" if muon_arithmetic(device_type()) == torch.bfloat16 else "fp32"))
    return rows


def _auto_precision() -> str:
    device = device_type()
    if device == "cuda":
        return str(cuda_decision())
    if device == "cpu" and cpu_has_bf16():
        return "32-true or bf16-mixed: one real step of the model is timed in both"
    return "32-true"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
