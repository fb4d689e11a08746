"""Which devices, processes and precision a run uses."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Literal

import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from lightning_glue.config import Config, TrainerConfig
from lightning_glue.data.batching import evaluation_tokens
from lightning_glue.errors import ConfigError
from lightning_glue.utils.launch import ALONE, Launch, launch
from lightning_glue.utils.processor import cpu_has_bf16 as cpu_has_bf16

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]  # Lightning's names


@dataclass(frozen=True)
class Devices:
    """Lightning's names: accelerator ``cpu`` or ``cuda``, processes per node, nodes."""

    accelerator: str
    devices: int
    nodes: int = 1

    @property
    def world(self) -> int:
        return self.devices * self.nodes


def resolve_devices(config: TrainerConfig) -> Devices:
    """Read --gpus and --procs, or what torchrun or SLURM started.

    Raises:
        UserError: more GPUs than the machine has, --gpus together with --procs, or another number of processes than
            torchrun or SLURM started.
    """
    available, found = torch.cuda.device_count(), launch()
    gpus = min(available, 1) if config.gpus == "auto" else int(config.gpus)
    if gpus > available or (gpus and found.complete and found.local_world > available):
        if found.complete:
            raise ConfigError(_too_few(found, available))
        raise ConfigError(f"--gpus {gpus}: this machine shows {available} CUDA devices; use --gpus {available}")
    if gpus and config.procs > 1:
        raise ConfigError(f"--procs {config.procs} is for DDP on the CPU; with GPUs use --gpus alone, or --gpus 0")
    accelerator = "cuda" if gpus else "cpu"
    if found.complete:
        _check_agreement(config, found)
        return Devices(accelerator, found.local_world, found.nodes)
    return Devices(accelerator, gpus or config.procs)


def _too_few(found: Launch, available: int) -> str:
    return (
        f"{found.by} started {found.local_world} processes on this node, which see {available} CUDA devices each; "
        "give every process all GPUs of the node (SLURM: --gpus-per-node, not --gpus-per-task), or use --gpus 0"
    )


def _check_agreement(config: TrainerConfig, found: Launch) -> None:
    """Raise UserError where --gpus or --procs ask for another number of processes than there are."""
    asked = {"--gpus": 0 if config.gpus == "auto" else int(config.gpus), "--procs": config.procs}
    for option, number in asked.items():
        if number > (option == "--procs") and number != found.local_world:
            raise ConfigError(
                f"{found.by} started {found.local_world} processes on each of {found.nodes} nodes, but {option} asks "
                f"for {number}; leave {option} out, or start {number} on each node"
            )


def check_port(devices: Devices) -> None:
    """Raise UserError where processes that Lightning is to start cannot meet at the MASTER_PORT of the environment."""
    port = os.environ.get("MASTER_PORT", "")
    if not port or devices.world == 1 or launch().by != ALONE:
        return
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", int(port)))
    except (OSError, OverflowError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no port"
        raise ConfigError(f"MASTER_PORT={port} cannot be used ({why}); unset it, or choose another") from None


def resolve_strategy(devices: Devices, *, some_unused: bool = False) -> Strategy:
    """Plain DDP over several processes.

    The only buffers are version numbers, and evaluation gives processes different numbers of batches: broadcasting
    buffers in every forward would be waste and would hang.

    Args:
        some_unused: a step may leave parameters without a gradient. DDP then looks for them in every step, which takes
            time, and otherwise would wait for them.
    """
    if devices.world == 1:
        return SingleDeviceStrategy("cuda:0" if devices.accelerator == "cuda" else "cpu")
    backend = "nccl" if devices.accelerator == "cuda" else "gloo"
    return DDPStrategy(
        process_group_backend=backend,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=some_unused,
    )


def resolve_precision(config: TrainerConfig, accelerator: str) -> Precision:
    """``auto`` is bf16-mixed where the hardware multiplies bf16 matrices natively, else 32-true."""
    if config.precision != "auto":
        return config.precision
    native = torch.cuda.is_bf16_supported(including_emulation=False) if accelerator == "cuda" else cpu_has_bf16()
    return "bf16-mixed" if native else "32-true"


def resolve_eval_tokens(config: Config) -> int:
    """``data.eval_tokens``, or what suits the device where it is null."""
    return config.data.eval_tokens or evaluation_tokens(resolve_devices(config.trainer).accelerator)
