"""The C library's heap in training."""

from __future__ import annotations

import subprocess
import sys

import pytest
from environment import ROOT

CHILD = """
import ctypes, sys
import torch
from lit_gpt.train.heap import return_freed_memory

def resident():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])

torch.zeros(30 << 20, dtype=torch.uint8)  # freed: from now on glibc has tensors of that size in its heap
if len(sys.argv) > 1:
    return_freed_memory(int(sys.argv[1]), sys.argv[2])
before = resident()
tensors = [torch.zeros(8 << 20, dtype=torch.uint8) for _ in range(10)]
last = tensors.pop()
del tensors
print((resident() - before) >> 20)  # the tensor that is left is the last of the heap
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_tensors_are_no_longer_in_memory() -> None:
    held = []
    for words in ([], ["768", "32-true"], ["256", "32-true"], ["768", "bf16-mixed"]):
        command = [sys.executable, "-c", CHILD, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
        held.append(int(done.stdout))
    assert held[1] < 12
    assert [held[0], held[2], held[3]] == [pytest.approx(80, abs=4)] * 3
