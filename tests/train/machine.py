"""Machines that the tests of `precision: auto` and `compile: auto` pretend to run on."""

from __future__ import annotations

import pytest
import torch

from lit_gpt.train import hardware, precision


def pretend_machine(
    monkeypatch: pytest.MonkeyPatch, cuda: bool = False, native: bool = False, cpu_bf16: bool = False
) -> None:
    """Make PyTorch answer as on a machine with a GPU, one that computes bf16 natively, or a CPU that does."""

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation  # as PyTorch answers on a V100

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla X")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for module in (precision, hardware):
        monkeypatch.setattr(module, "cpu_has_bf16", lambda: cpu_bf16)
