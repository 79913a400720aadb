"""The C library's heap in training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from environment import ROOT
from fork_server import ForkServer

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_tensors_are_no_longer_in_memory(tmp_path: Path, fork_server: ForkServer) -> None:
    child, held = tmp_path / "child.py", []
    child.write_text(CHILD)
    for words in ([], ["768", "32-true"], ["256", "32-true"], ["768", "bf16-mixed"]):
        done = fork_server.run(child, *words, env={"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        held.append(int(done.stdout))
    assert held[1] < 12
    assert [held[0], held[2], held[3]] == [pytest.approx(80, abs=4)] * 3
