"""Processes that torchrun or SLURM started, each by itself: what process 0 decides before training, all must follow.

And how a group of processes parts.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from lightning_glue.errors import UserError
from lightning_glue.training.lightning_internals import speak_as
from lightning_glue.utils.launch import SLURM, TORCHRUN, forget_leftovers, launch
from lightning_glue.utils.processes import PARENT

Value = TypeVar("Value")
_PATIENCE = timedelta(seconds=10)  # for the other processes to take part in the last vote


class Srun(SLURMEnvironment):
    """srun's tasks as :mod:`lightning_glue.utils.launch` counts them; Lightning counts those of the whole job."""

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)  # SLURM requeues by itself: sbatch --requeue

    @staticmethod
    def _validate_srun_variables() -> None:
        """Lightning refuses ``srun -n 2``, which is as good as any."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """They come from the launch."""

    def world_size(self) -> int:
        return launch().world

    @property
    def main_address(self) -> str:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
        return os.environ.setdefault("MASTER_ADDR", self.resolve_root_node_address(nodes))

    @property
    def main_port(self) -> int:
        """The same in every task, and another one for each step of a job and for the next job."""
        job, step = (int(os.environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        return int(os.environ.setdefault("MASTER_PORT", str(15000 + (16 * job + step) % 15000)))


def cluster_environment() -> ClusterEnvironment:
    """Lightning's plugin for what :func:`launch` says, given always: left alone, Lightning would look for itself."""
    if launch().by == TORCHRUN:
        return TorchElasticEnvironment()
    if launch().by == SLURM:
        return Srun()
    forget_leftovers()
    return LightningEnvironment()


def prepare() -> None:
    """Tell Lightning which process speaks, and see to an orderly end of the group."""
    speak_as(launch().rank)
    atexit.register(leave)


@contextmanager
def children_end_with_us() -> Iterator[None]:
    """What is started within this run dies with this process, however that ends."""
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(PARENT, None)


def decided_by_leader(decide: Callable[[], Value]) -> Value:
    """What ``decide`` gives in process 0, in every process of the job.

    Raises:
        UserError: process 0 raised it; every process does.
    """
    found = launch()
    if not found.complete or found.world == 1:
        return decide()
    _connect(cluster_environment())
    answer: list[object] = [None, None]
    mistake: UserError | None = None
    if found.leader:
        try:
            answer[0] = decide()
        except UserError as error:
            mistake, answer[1] = error, str(error)
    dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    if answer[1] is not None:
        raise mistake or UserError(str(answer[1]))
    return answer[0]  # type: ignore[return-value]


def highest(value: int) -> int:
    """The highest ``value`` of all processes of the job, in each of them; every one has to call this."""
    found = launch()
    if not found.complete or found.world == 1:
        return value
    _connect(cluster_environment())
    values: list[int] = [value] * found.world
    dist.all_gather_object(values, value)
    return max(values)


def _connect(environment: ClusterEnvironment) -> None:
    """Open the job's process group, which Lightning then uses instead of one of its own."""
    if dist.is_initialized():
        return
    os.environ |= {"MASTER_ADDR": environment.main_address, "MASTER_PORT": str(environment.main_port)}
    if torch.cuda.is_available():
        torch.cuda.set_device(launch().local_rank % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=launch().rank, world_size=launch().world)
    atexit.register(leave)


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


def leave() -> None:
    """End the process group and its threads while Python can still run them; without one, nothing."""
    if not dist.is_initialized():
        return
    sys.last_traceback = sys.last_value = None
    gc.unfreeze()
    gc.collect()  # the training's objects refer to the group, and to each other
    dist.destroy_process_group()
