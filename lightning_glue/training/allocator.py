"""How this process asks the system for memory, and how it hears that there is none."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's names in malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX


def keep_freed_memory() -> None:
    """Reuse freed memory where glibc would give it back.

    Every activation on the CPU is allocated and freed again within a step. glibc returns blocks of their size to the
    system at once, which then clears each page when it is next touched: a fifth of a step. The peak stays as it was.
    Another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    import torch

    lacking = "can't allocate memory" in str(error) or "not enough memory" in str(error)  # torch's words on the CPU
    return lacking or isinstance(error, torch.OutOfMemoryError | MemoryError)
