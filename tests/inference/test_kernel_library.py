"""The kernels' library in the package: a missing, damaged, foreign or old one leaves the work to PyTorch, in a line."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import sys
from pathlib import Path

import pytest
import torch

from lit_gpt.inference import kernel_library, native, prepare
from lit_gpt.inference.kernel_library import LIBRARY, Unavailable, check_library, source_hash, stamped
from lit_gpt.inference.kernel_linear import KernelLinear
from lit_gpt.inference.levels import LEVELS
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT

supported = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in LEVELS, reason="no kernels for this kind of machine"
)

CONTENT = b"what the linker made" * 1000
MACHINE = "x86_64"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`native.load` as on its first call, of a library elsewhere: a copy of this machine's."""
    monkeypatch.setattr(native, "_attempt", native._attempt.__wrapped__)
    monkeypatch.setattr(kernel_library, "LIBRARY", tmp_path / "libkernels.so")
    monkeypatch.setattr(prepare, "_tell_once", prepare._tell_once.__wrapped__)
    if LIBRARY.exists():
        shutil.copy(LIBRARY, tmp_path / "libkernels.so")
    return tmp_path / "libkernels.so"


def check_falls_back(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """PyTorch computes what it computes anyway, and one line on stderr says why."""
    assert native.status() == f"no: {reason}"
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=8, n_layer=1, n_head=2, n_embd=16)).eval()
    idx = torch.tensor([[3, 1, 4]])
    expected = model(idx).logits
    fast = prepare.prepare_for_inference(model, "fp32")
    assert fast.decode_kernel is None and not isinstance(fast.lm_head, KernelLinear)
    torch.testing.assert_close(fast(idx).logits, expected, rtol=1e-4, atol=1e-5)
    assert capsys.readouterr().err == f"PyTorch does the work of the kernels, slower: {reason}\n"


def test_this_checkout_has_its_library() -> None:
    """Else every test of the kernels would skip, quietly: after a change of the sources, and in CI."""
    if not LIBRARY.exists() and "CI" not in os.environ:
        pytest.skip(native.status())
    assert native.fault() is None, "pip install -e . builds it"


@pytest.mark.kernels
def test_the_copy_is_used(fresh: Path) -> None:
    assert native.fault() is None and native.levels()


@supported
def test_a_missing_library(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fresh.unlink(missing_ok=True)
    reason = "their library was not built when lit_gpt was installed: install it again where there is a g++"
    check_falls_back(reason, capsys)


@pytest.mark.kernels
@pytest.mark.parametrize("damage", ["empty", "torn", "one byte less", "one byte more", "one bit", "text", "program"])
def test_a_damaged_library_is_not_even_mapped(
    fresh: Path, damage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To map a torn file ends the process with SIGBUS, and one bit may be anywhere in its code."""
    whole = fresh.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "empty": b"",
        "torn": whole[:middle],
        "one byte less": whole[:-1],
        "one byte more": whole + b"\n",
        "one bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "text": b"not a library",
        "program": Path(sys.executable).read_bytes(),
    }
    fresh.write_bytes(damaged[damage])
    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments: pytest.fail("it was mapped"))
    reason = f"{fresh} is damaged, or of another program: install lit_gpt again where there is a g++"
    check_falls_back(reason, capsys)


@pytest.mark.kernels
def test_a_library_of_other_sources(
    fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a checkout that has moved on since it was installed."""
    shutil.copytree(kernel_library.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(kernel_library, "SOURCES", tmp_path / "csrc")
    for path in (tmp_path / "csrc").iterdir():
        os.utime(path, (0, 0))  # what counts is the content: a checkout gives its files any time
    assert native.fault() is None
    with (tmp_path / "csrc/abi.h").open("a") as header:
        header.write("// changed\n")
    reason = f"{fresh} was built from other sources: install lit_gpt again where there is a g++"
    check_falls_back(reason, capsys)


@pytest.mark.kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="made for another machine than x86-64")
def test_a_library_for_another_machine(fresh: Path) -> None:
    """Whole, and of the same sources."""
    fresh.write_bytes(stamped(b"\x7fELF for Arm", "aarch64"))
    assert native.status() == f"no: {fresh} was built from other sources: install lit_gpt again where there is a g++"
    fresh.write_bytes(stamped(b"\x7fELF that lies", platform.machine()))
    assert native.status().startswith(f"no: {fresh} cannot be used: ")


@pytest.mark.kernels
def test_a_file_system_without_permission_to_execute(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot_map(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", cannot_map)
    assert native.status() == f"no: {fresh} cannot be used: failed to map segment from shared object"
    assert native.fault()


@pytest.mark.kernels
def test_a_file_that_cannot_be_read(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fresh.unlink()
    fresh.mkdir()
    check_falls_back(f"{fresh} cannot be read: Is a directory", capsys)


@pytest.mark.kernels
def test_sources_that_cannot_be_read(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_library, "SOURCES", tmp_path / "gone")
    assert native.status().endswith("No such file or directory: '" + str(tmp_path / "gone") + "'") and native.fault()


@supported
def test_the_line_is_printed_once(
    fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.unlink(missing_ok=True)
    monkeypatch.setattr(prepare, "_tell_once", functools.cache(prepare._tell_once))
    for _ in range(3):
        prepare.prepare_for_inference(GPT(GPTConfig(vocab_size=50, block_size=8, n_layer=1, n_head=2, n_embd=16)))
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_other_machines_have_no_fault(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to be done about it, so no line is printed."""
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert native.status() == "no: they are written for Linux on x86-64 and on 64-bit Arm"
    assert native.fault() is None and native.load() is None


def test_the_stamp_holds_sources_flags_and_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "libkernels.so"
    path.write_bytes(stamped(CONTENT, MACHINE))
    assert path.read_bytes().startswith(CONTENT)
    check_library(path, MACHINE)
    with pytest.raises(Unavailable, match="other sources"):
        check_library(path, "aarch64")
    before = source_hash(MACHINE)
    level = LEVELS[MACHINE]["avx2"]
    monkeypatch.setitem(LEVELS[MACHINE], "avx2", level._replace(flags=(*level.flags, "-mavx512f")))
    assert source_hash(MACHINE) != before
    with pytest.raises(Unavailable, match="other sources"):
        check_library(path, MACHINE)
