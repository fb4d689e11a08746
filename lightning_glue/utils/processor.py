"""What this machine's processors can do."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec


def usable_cores() -> int:
    """Of the CPU, those that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices itself, with AMX or AVX-512; elsewhere float32 is faster."""
    import torch

    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


@cache
def has_triton() -> bool:
    """Whether Triton is there for NVIDIA's GPUs; torch's builds for them bring it along on Linux."""
    import torch

    return torch.version.hip is None and find_spec("triton") is not None
