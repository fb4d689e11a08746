"""What every benchmark prints: the machine, the versions and how busy it was."""

from __future__ import annotations

import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_glue.data.datamodule import TokenizedSplit
    from lightning_glue.data.tokenizer import Tokenizer

# As this process was started. This project tells its own processes how OpenMP's threads wait; another's program is
# measured as its users have it.
ENVIRONMENT = dict(os.environ)

BASE = {
    "encoder_layers": 12, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072, "encoder_attention_heads": 12,
    "max_positions": 512,
}  # fmt: skip
MINILM = BASE | {"encoder_layers": 6, "encoder_embed_dim": 384, "encoder_ffn_embed_dim": 1536}


def of_shape(shape: dict[str, int]) -> list[str]:
    """Overrides that give any model of ``conf/model`` this shape and random weights."""
    return ["model.source=random", *(f"++model.architecture.{key}={value}" for key, value in shape.items())]


def machine() -> dict[str, str | int | bool]:
    """Processor, cores this process may use, memory, versions."""
    import psutil
    import torch

    from lightning_glue.training.devices import cpu_has_bf16

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "bf16 products": cpu_has_bf16(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cores": len(os.sched_getaffinity(0)),
        "GiB": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "versions": versions("torch", "pytorch-lightning", "transformers", "ve-fairseq"),
    }


def describe_machine() -> str:
    """:func:`machine` and its load, for a person."""
    found = machine()
    bf16 = "with bf16 products" if found["bf16 products"] else "without bf16 products"
    return (
        f"{found['processor']} {bf16}, {found['cores']} cores, {found['GiB']} GiB; "
        f"Python {found['python']}; {found['versions']}; load {os.getloadavg()[0]:.1f} at the start"
    )


def versions(*packages: str) -> str:
    """``name version`` of those that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def matmul_rate(dtype: str, device: str = "cpu") -> float:
    """The machine's own FLOP/s: in the largest product of a roberta.base layer, or one that fills a GPU."""
    import torch

    rows, inner, columns = (1024, 768, 3072) if device == "cpu" else (8192, 8192, 8192)
    a = torch.randn(rows, inner, dtype=getattr(torch, dtype), device=device)
    b = torch.randn(inner, columns, dtype=getattr(torch, dtype), device=device)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / statistics.median(seconds)


def real_rows(task_name: str, folder: Path, tokenizer: Tokenizer) -> TokenizedSplit:
    """Training rows of a task from GLUE_DIR, else from the sample."""
    from lightning_glue.data import binarize, sources
    from lightning_glue.data.datamodule import load_split
    from lightning_glue.tasks import get_task

    task = get_task(task_name)
    source = "glue" if os.environ.get("GLUE_DIR") else "sample"
    root = sources.glue_directory(task, source, os.environ.get("GLUE_DIR"))
    return load_split(task, task.splits[0], binarize.prepare(task, root, tokenizer, folder, "stop").directory, 512)
