"""Who started this process, how many there are, and which of them leads: asked once, answered here for everyone.

The order is Lightning's own: torchrun first, because it also works inside SLURM; then SLURM, but only where srun
started the process; then Lightning, which starts the others itself. In the batch script of a job and in the shell of
``salloc`` SLURM's variables describe what srun would start: there they count for nothing.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from lightning_glue.errors import UserError
from lightning_glue.utils.processes import end_with

TORCHRUN, SLURM, LIGHTNING, ALONE = "torchrun", "srun", "Lightning", "nobody"
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE")
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # SLURM's numbers for the batch script, the shell of salloc and the like


@dataclass(frozen=True)
class Launch:
    """What started this process, and its place among those started with it.

    Attributes:
        by: ``TORCHRUN``, ``SLURM`` (srun), ``LIGHTNING`` (a process other than the first) or ``ALONE``, where Lightning
            starts the others, if --gpus or --procs ask for some.
        local_world: processes on each node.
        rank, local_rank: among all, and among those of the node.
    """

    by: str = ALONE
    world: int = 1
    nodes: int = 1
    rank: int = 0
    local_rank: int = 0

    @property
    def local_world(self) -> int:
        return self.world // self.nodes

    @property
    def leader(self) -> bool:
        return self.rank == 0

    @property
    def complete(self) -> bool:
        """Whether all processes are there already, so that Lightning starts none."""
        return self.by in (TORCHRUN, SLURM)


@cache
def launch() -> Launch:
    """How this process was started; remembered, because Lightning changes the environment later."""
    return read_launch(os.environ)


def read_launch(environ: Mapping[str, str]) -> Launch:
    """What the variables that launchers set say.

    Raises:
        UserError: the nodes have different numbers of processes.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        rank, local_rank, world, local_world = (int(environ[name]) for name in _RANKS[:4])
        if world % local_world:
            raise UserError(
                f"torchrun started {world} processes, {local_world} of them here; expected as many on each node"
            )
        return Launch(TORCHRUN, world, world // local_world, rank, local_rank)
    if _srun_started_several(environ):
        return _read_srun(environ)
    if "LOCAL_RANK" in environ and "WORLD_SIZE" in environ:
        local_rank = int(environ["LOCAL_RANK"])
        return Launch(LIGHTNING, int(environ["WORLD_SIZE"]), 1, local_rank, local_rank)
    return Launch()


def _srun_started_several(environ: Mapping[str, str]) -> bool:
    """Whether this is one of several tasks of a step of SLURM; a single one may as well be nobody's."""
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    if not step.isdecimal() or int(step) >= _FIRST_SPECIAL_STEP or _tasks(environ) < 2:
        return False
    # Lightning's names for a shell in a step (srun --pty bash): the tasks beside it do nothing.
    return not (environ.get("SLURM_JOB_NAME") in ("bash", "interactive") and _has_terminal())


def _tasks(environ: Mapping[str, str]) -> int:
    return int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1")


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def _read_srun(environ: Mapping[str, str]) -> Launch:
    world = _tasks(environ)
    nodes = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or "1")
    layout = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if world % nodes or len(set(re.sub(r"\(x\d+\)", "", layout).split(","))) > 1:
        raise UserError(
            f"srun started {world} tasks on {nodes} nodes ({layout or 'not evenly'}); expected as many on each: "
            "use --ntasks-per-node"
        )
    return Launch(SLURM, world, nodes, int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"]))


def is_distributed_child() -> bool:
    """Whether this is a process of a training other than the first, whoever started it."""
    return not launch().leader


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for processes that are to be on their own, or among others than this one's."""
    return {
        name: value
        for name, value in environ.items()
        if name not in (*_RANKS, "MASTER_ADDR", "MASTER_PORT")
        and not (name.startswith(("SLURM_", "TORCHELASTIC_", "ROLE_")) and name != "SLURM_CONF")
    }


def forget_leftovers() -> None:
    """Remove what a shell had left of an earlier launcher: Lightning would believe it."""
    if launch().by == ALONE:
        for name in _RANKS:
            os.environ.pop(name, None)


def end_with_launcher() -> None:
    """Stop in order when torchrun is killed, which then tells nobody; SLURM and Lightning see to their own."""
    if launch().by == TORCHRUN:
        end_with(os.getppid(), signal.SIGTERM)
