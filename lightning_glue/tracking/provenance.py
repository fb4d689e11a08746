"""What a run ran on: code, versions, hardware and command."""

from __future__ import annotations

import getpass
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata

from lightning_glue.config.paths import CHECKOUT
from lightning_glue.utils.redact import hide_secrets

_PACKAGES = ("torch", "pytorch-lightning", "torchmetrics", "mlflow", "optuna", "tokenizers", "numpy")
_FAIRSEQ = ("ve-fairseq", "fairseq-fixed", "fairseq")  # distributions that carry the package fairseq


def _git(*arguments: str) -> str:
    if CHECKOUT is None:  # the folder around may be another project's
        return ""
    try:
        result = subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""


def git_commit() -> str:
    """Commit of the project's checkout; empty outside one."""
    return _git("rev-parse", "HEAD").strip()


def git_diff() -> str:
    """Uncommitted changes to tracked files, and the names of untracked ones."""
    untracked = _git("ls-files", "--others", "--exclude-standard")
    return _git("diff", "HEAD") + "".join(f"untracked: {name}\n" for name in untracked.splitlines())


def command_line() -> str:
    """How this process was started, without passwords."""
    return shlex.join(["python", *map(hide_secrets, sys.orig_argv[1:])])


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def versions() -> dict[str, str]:
    """Installed versions of the packages a result depends on."""
    import torch

    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for name in (*_PACKAGES, *_FAIRSEQ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hardware() -> dict[str, str]:
    """Processor, cores, memory and GPUs of this machine."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "memory_gib": f"{psutil.virtual_memory().total / 2**30:.0f}",
        "gpus": ", ".join(gpus) or "none",
    }
