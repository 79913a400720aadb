"""The table of hardware facts that `lit_gpt info --hardware` prints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from machine import pretend_machine

from lit_gpt.train.hardware import hardware_table


def test_hardware_table_says_what_auto_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_machine(monkeypatch, cpu_bf16=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "timed" in dict(hardware_table())["training auto"]
    pretend_machine(monkeypatch, cuda=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device = SimpleNamespace(name="Tesla X", total_memory=16 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    table = dict(hardware_table())
    assert table["cuda:0"] == "Tesla X, 16 GiB"
    assert table["native bf16"] == "no"
    assert "16-mixed" in table["training auto"]


@pytest.mark.parametrize(
    ("onednn", "mkl", "expected"), [(True, True, "oneDNN"), (False, True, "MKL"), (False, False, "PyTorch's BLAS")]
)
def test_the_library_of_products_in_fp32(
    onednn: bool, mkl: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_gpt.train.hardware.prefers_onednn", lambda: onednn)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert dict(hardware_table())["products in fp32"] == expected
