"""Processes that torchrun or SLURM started, each by itself: what process 0 decides before training, all must follow."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment

from lightning_glue.errors import UserError

Value = TypeVar("Value")


def cluster() -> ClusterEnvironment | None:
    """torchrun or SLURM, where it started several processes; None where Lightning starts them itself."""
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect() and (found := kind()).world_size() > 1:
            return found
    return None


def decided_by_leader(decide: Callable[[], Value]) -> Value:
    """What ``decide`` gives in process 0, in every process of the job.

    Raises:
        UserError: process 0 raised it; every process does.
    """
    environment = cluster()
    if environment is None:
        return decide()
    _connect(environment)
    answer: list[object] = [None, None]
    if environment.global_rank() == 0:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    if answer[1] is not None:
        raise UserError(str(answer[1]))
    return answer[0]  # type: ignore[return-value]


def _connect(environment: ClusterEnvironment) -> None:
    """Open the job's process group, which Lightning then uses instead of one of its own."""
    if dist.is_initialized():
        return
    os.environ |= {"MASTER_ADDR": environment.main_address, "MASTER_PORT": str(environment.main_port)}
    if torch.cuda.is_available():
        torch.cuda.set_device(environment.local_rank() % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=environment.global_rank(), world_size=environment.world_size())
    atexit.register(dist.destroy_process_group)
