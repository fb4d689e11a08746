"""Processes that torchrun or SLURM started, each by itself: what process 0 decides before training, all must follow."""

from __future__ import annotations

import atexit
import ctypes
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment

from lightning_glue.errors import UserError

Value = TypeVar("Value")
_PATIENCE = timedelta(seconds=10)  # for the other processes to take part in the last vote


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


class Vote:
    """What ``world`` processes wish, asked at every step and answered at the next: nobody waits for the others.

    gloo's thread may be the last one to hold the tensor of a reduction and then frees it, for which it needs Python's
    lock; where Python is ending meanwhile, that is the end of the process ("terminate called without an active
    exception"). So there is one tensor, and the group is ended, with its threads, before the process.
    """

    def __init__(self, world: int) -> None:
        self.group: Any = dist.new_group(backend="gloo") if world > 1 else None
        self.flags = torch.zeros(2)
        self.work: Any = None

    def cast(self, stop: int, save: bool) -> tuple[int, bool]:
        """What came of the vote one step ago, the highest of each; where there is one process, what it wishes.

        Args:
            stop: number of the signal to stop for; 0: none.
            save: whether a checkpoint is due.
        """
        if self.group is None:
            return stop, save
        agreed = (0, False)
        if self.work:
            self.work.wait()
            agreed = (int(self.flags[0]), bool(self.flags[1]))
        self.flags[0], self.flags[1] = stop, save
        self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed

    def close(self) -> None:
        """Take part in the last vote to its end, and end the group."""
        group, self.group = self.group, None
        if group is None:
            return
        try:
            if self.work:
                self.work.wait(_PATIENCE)
        except RuntimeError:  # another process is gone or stuck: gloo's thread cannot be ended in order
            for kept in (group, self.flags):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
            return
        self.work = None
        if dist.is_initialized():
            dist.destroy_process_group(group)
