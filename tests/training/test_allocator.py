"""What reaches the system of a process that allocates and frees the same activation again and again."""

from __future__ import annotations

import subprocess
import sys

import pytest

_BYTES, _TIMES = 1 << 26, 10
_FAULTS = f"""
import resource, sys
import torch
from lightning_glue.training.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(40):  # until the heap has found its size
    torch.ones({_BYTES} // 4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({_TIMES}):
    torch.ones({_BYTES} // 4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(allocator: str) -> int:
    """Pages the system had to clear."""
    return int(subprocess.run([sys.executable, "-c", _FAULTS, allocator], capture_output=True, text=True).stdout)


@pytest.mark.torture
@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has mallopt")
def test_pages_are_cleared_once() -> None:
    pages = _TIMES * _BYTES // 4096
    assert faults("glibc's") > pages / 2
    assert faults("kept") < pages / 50
