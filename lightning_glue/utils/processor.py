"""What this machine's processor can do."""

from __future__ import annotations


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices itself, with AMX or AVX-512; elsewhere float32 is faster."""
    import torch

    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
