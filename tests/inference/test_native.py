"""The kernels' library: its ABI against the structs here, its levels, threads, scratch sizes and activations."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import torch
from fork_server import ForkServer
from torch import nn

from lit_gpt.errors import UserError
from lit_gpt.inference import native
from lit_gpt.inference.decode_kernel import FusedDecode
from lit_gpt.inference.kernel_library import compile_commands
from lit_gpt.inference.kernel_linear import KernelInt8Linear, KernelLinear
from lit_gpt.inference.levels import LEVELS
from lit_gpt.inference.openmp import OpenMP, openmp_functions
from lit_gpt.inference.prepare import prepare_for_inference
from lit_gpt.model.config import GPTConfig, MLPKind
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache

IN_KERNELS = tuple(kind for kind in get_args(MLPKind) if kind != "geglu_tanh")

CONFIG = GPTConfig(vocab_size=50, block_size=32, n_layer=2, n_head=4, n_embd=32)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """`native.load` as on its first call."""
    monkeypatch.setattr(native, "_attempt", native._attempt.__wrapped__)


def library() -> ctypes.CDLL:
    return native.require()


def check_unusable(reason: str) -> None:
    """The library is as if it were not there, and `status` says why."""
    assert re.fullmatch(f"no: {reason}", native.status()), native.status()
    assert native.load() is None
    model = prepare_for_inference(GPT(CONFIG), "fp32")
    assert model.decode_kernel is None and not isinstance(model.lm_head, KernelLinear)
    with pytest.raises(native.Unavailable, match=reason):
        native.require()


@pytest.mark.kernels
def test_another_abi_version_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    version = native.ABI_VERSION
    monkeypatch.setattr(native, "ABI_VERSION", version + 1)
    check_unusable(f"the compiled library has ABI {version}, and {version + 1} is expected")


@pytest.mark.kernels
def test_a_struct_with_a_field_more_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = type("Stack", (native.Stack,), {"_fields_": [("more", ctypes.c_long)]})
    monkeypatch.setattr(native, "Stack", longer)
    check_unusable(r"the compiled library has Stack.more at another offset: -1 bytes, not \d+")


@pytest.mark.kernels
def test_a_struct_in_another_order_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [native.CacheLayout._fields_[i] for i in (1, 0, 2, 3, 4, 5)]
    monkeypatch.setattr(native, "CacheLayout", type("CacheLayout", (ctypes.Structure,), {"_fields_": fields}))
    check_unusable("the compiled library has CacheLayout.values at another offset: 8 bytes, not 0")


@pytest.mark.kernels
def test_a_struct_with_a_field_less_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = native.Linear._fields_[:-1]
    monkeypatch.setattr(native, "Linear", type("Linear", (ctypes.Structure,), {"_fields_": fields}))
    check_unusable("the compiled library has Linear at another size: 56 bytes, not 48")


@pytest.mark.kernels
def test_a_library_that_lacks_a_function_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native._SIGNATURES, "no_such_function", ([], None))
    check_unusable(".*libkernels.so cannot be used: .*undefined symbol: no_such_function")


@pytest.mark.kernels
def test_each_activation_has_an_index_in_the_kernels() -> None:
    known = [library().activation_index(name.encode()) for name in IN_KERNELS]
    assert sorted(known) == list(range(len(known)))
    for name in (b"silly", b"geglu_tanh"):
        assert library().activation_index(name) == -1


@pytest.mark.kernels
@pytest.mark.parametrize("kind", IN_KERNELS)
def test_each_activation_is_the_one_of_its_name(kind: MLPKind) -> None:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=50, block_size=32, n_layer=1, n_head=4, n_embd=32, mlp=kind, init_std=0.5)
    model = GPT(config).eval()
    idx = torch.randint(50, (1, 1))
    expected = model(idx).logits
    fast = prepare_for_inference(model, "fp32")
    assert isinstance(fast.decode_kernel, FusedDecode)
    got = fast(idx, cache=KVCache(config, 1, 32).step([0], 1)).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.kernels
def test_an_activation_that_the_kernels_lack_leaves_the_blocks_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_gpt.inference.decode_kernel._activation_index", lambda library, config: -1)
    model = prepare_for_inference(GPT(CONFIG), "fp32")
    assert model.decode_kernel is None and isinstance(model.lm_head, KernelLinear)


@pytest.mark.kernels
def test_scratch_of_a_linear_layer_is_what_the_library_says() -> None:
    fp32, int8 = KernelLinear(nn.Linear(70, 48)), KernelInt8Linear(nn.Linear(70, 48))
    assert library().linear_scratch_bytes(ctypes.byref(fp32.layout), 9) == 0
    assert library().linear_scratch_bytes(ctypes.byref(int8.layout), 9) >= 9 * 70


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in LEVELS or shutil.which("g++") is None, reason="no g++ for these sources")
@pytest.mark.parametrize("part", ["dispatch", *LEVELS.get(platform.machine(), {})])
def test_the_source_compiles_without_a_warning(part: str, tmp_path: Path) -> None:
    command = compile_commands(["g++"], tmp_path, platform.machine())[tmp_path / f"{part}.o"]
    run = subprocess.run([*command, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_the_number_of_threads_changes_no_bit(precision: str) -> None:
    """Of layers and of steps; and with no OpenMP there is one thread."""
    config = GPTConfig(vocab_size=50, block_size=64, n_layer=2, n_head=6, n_kv_head=3, n_embd=96, init_std=0.5)
    torch.manual_seed(0)
    model = prepare_for_inference(GPT(config), precision)
    assert isinstance(model.lm_head, KernelLinear) and model.decode_kernel is not None
    x, idx, before = torch.randn(70, 96), torch.randint(50, (3, 1)), torch.get_num_threads()

    def bits(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        cache = KVCache(config, 3, 64, dtype=model.decode_kernel.cache_dtype)
        found = [model.lm_head(x)]
        for _ in range(3):
            found.append(model(idx, cache=cache.step([2, 0, 1], 1)).logits)
            cache.extend([2, 0, 1], 1)
        return found

    try:
        expected = bits(1)
        found = [bits(threads) for threads in (2, 3, 5)]
        library().use_openmp(ctypes.byref(OpenMP()))
        found.append(bits(3))
    finally:
        torch.set_num_threads(before)
        if functions := openmp_functions():
            library().use_openmp(ctypes.byref(functions))
    assert all(torch.equal(a, b) for other in found for a, b in zip(expected, other, strict=True))


@pytest.mark.kernels
def test_without_an_openmp_of_pytorchs_there_is_one_thread(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "openmp_functions", lambda: None)
    expected = f"yes, {native.levels()[-1]}, on one thread: PyTorch has no OpenMP that they could share"
    assert native.status() == expected


@pytest.mark.slow
@pytest.mark.kernels
def test_the_threads_are_pytorchs(fork_server: ForkServer, tmp_path: Path) -> None:
    """One pool: what the kernels start serves PyTorch's operations, and the other way round."""
    script = tmp_path / "threads.py"
    script.write_text("""
import os, re, torch
from lit_gpt.inference.kernel_linear import KernelLinear
torch.set_num_threads(3)
count = lambda: len(os.listdir("/proc/self/task"))
layer, x = KernelLinear(torch.nn.Linear(512, 512)), torch.randn(64, 512)
counts = [count()]
layer(x)
counts.append(count())
torch.randn(1 << 20).exp_()
counts.append(count())
layer(x)
counts.append(count())
lines = open("/proc/self/maps").read().splitlines()
print(*counts, *{line.split()[-1] for line in lines if re.match("lib[gi]?omp", line.rsplit("/", 1)[-1])})
""")
    done = fork_server.run(script)
    assert done.returncode == 0, done.stderr
    first, *later = map(int, done.stdout.split()[:4])
    assert later == [first + 2] * 3
    assert len(done.stdout.split()[4:]) == 1, done.stdout


@pytest.mark.kernels
def test_the_environment_masks_the_level(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in native.levels():
        monkeypatch.setenv("LIT_GPT_ISA", name)
        assert native.status() == f"yes, {name}"


@pytest.mark.kernels
def test_a_level_that_the_cpu_lacks_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = next(name for names in LEVELS.values() for name in names if name not in native.levels())
    here = " or ".join(native.levels())
    monkeypatch.setenv("LIT_GPT_ISA", foreign)
    with pytest.raises(UserError, match=f'^LIT_GPT_ISA is "{foreign}", which this CPU lacks: use {here}$'):
        native.load()


@pytest.mark.parametrize("wrong", ["avx3", "AVX2", " "])
def test_an_unknown_level_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("LIT_GPT_ISA", wrong)
    with pytest.raises(UserError, match=f'^unknown LIT_GPT_ISA "{wrong}": '):
        native.load()
