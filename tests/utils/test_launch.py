"""Who started a process, how many there are and who leads: every launcher's variables, as real jobs had them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.project import ROOT
from helpers.zygote import FORKED

from lightning_glue.config import compose
from lightning_glue.errors import UserError
from lightning_glue.training.devices import Devices, check_port, resolve_devices
from lightning_glue.utils import launch as launching
from lightning_glue.utils.launch import ALONE, LIGHTNING, SLURM, TORCHRUN, Launch, read_launch, without_launcher

BATCH = {  # the batch script of a job
    "SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "n1", "SLURM_NNODES": "1",
    "SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip
SALLOC = {  # the shell of salloc
    "SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "interactive", "SLURM_NODELIST": "n[1-2]", "SLURM_NNODES": "2",
    "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip


def srun(tasks: int, nodes: int, rank: int, layout: str = "", **more: str) -> dict[str, str]:
    """Variables of a task; ``--ntasks-per-node`` is not among them unless the user gave it."""
    each = tasks // nodes
    return {
        **BATCH, "SLURM_NTASKS": str(tasks), "SLURM_NNODES": str(nodes), "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % each), "SLURM_NODEID": str(rank // each), "SLURM_STEP_ID": "0", "SLURM_STEPID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_TASKS_PER_NODE": layout or (f"{each}(x{nodes})" if nodes > 1 else str(each)), **more,
    }  # fmt: skip


def torchrun(world: int, nodes: int, rank: int) -> dict[str, str]:
    local = world // nodes
    return {
        "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(local), "RANK": str(rank),
        "LOCAL_RANK": str(rank % local), "GROUP_RANK": str(rank // local), "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
    }  # fmt: skip


CHILD = {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4242"}
ON_ITS_OWN = Launch(ALONE, 1, 1, 0, 0)
CASES = {
    "plain": ({}, ON_ITS_OWN),
    "a rank left over": ({"RANK": "1", "LOCAL_RANK": "1"}, ON_ITS_OWN),
    "a world left over": ({"WORLD_SIZE": "8", "NODE_RANK": "1"}, ON_ITS_OWN),
    "--procs 2, the second": (CHILD, Launch(LIGHTNING, 2, 1, 1, 1)),
    "torchrun": (torchrun(4, 2, 3), Launch(TORCHRUN, 4, 2, 3, 1)),
    "torchrun in a batch script with one task": ({**BATCH, **torchrun(2, 1, 1)}, Launch(TORCHRUN, 2, 1, 1, 1)),
    "srun torchrun, node 1 first": ({**srun(2, 2, 1), **torchrun(4, 2, 0)}, Launch(TORCHRUN, 4, 2, 0, 0)),
    "srun torchrun, node 0 second": ({**srun(2, 2, 0), **torchrun(4, 2, 2)}, Launch(TORCHRUN, 4, 2, 2, 0)),
    "batch script": (BATCH, ON_ITS_OWN),
    "batch script, two tasks": ({**BATCH, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, ON_ITS_OWN),
    "batch script as newer SLURM has it": ({**srun(2, 1, 0), "SLURM_STEP_ID": str(0xFFFFFFFB)}, ON_ITS_OWN),
    "--procs 2 in a batch script": ({**BATCH, **CHILD}, Launch(LIGHTNING, 2, 1, 1, 1)),
    "salloc": (SALLOC, ON_ITS_OWN),
    "salloc's shell on the node": ({**SALLOC, **srun(4, 2, 0, SLURM_STEP_ID=str(0xFFFFFFFA))}, ON_ITS_OWN),
    "srun in salloc": (srun(2, 1, 1, SLURM_JOB_NAME="interactive"), Launch(SLURM, 2, 1, 1, 1)),
    "srun, one task": (srun(1, 1, 0), ON_ITS_OWN),
    "srun, one task, --procs 2": ({**srun(1, 1, 0), **CHILD}, Launch(LIGHTNING, 2, 1, 1, 1)),
    "srun": (srun(4, 2, 2), Launch(SLURM, 4, 2, 2, 0)),
    "srun after a rank left over": ({"LOCAL_RANK": "0", "WORLD_SIZE": "1", **srun(4, 2, 3)}, Launch(SLURM, 4, 2, 3, 1)),
    "srun with fewer tasks than the job": ({**srun(2, 1, 1), "SLURM_JOB_NUM_NODES": "2"}, Launch(SLURM, 2, 1, 1, 1)),
}


@pytest.mark.parametrize(("environment", "expected"), CASES.values(), ids=CASES)
def test_one_answer(environment: dict[str, str], expected: Launch) -> None:
    found = read_launch(environment)
    assert found == expected
    assert found.leader == (expected.rank == 0)


def test_a_shell_in_a_step_is_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """``srun -n 4 --pty bash``, as Lightning's documentation advises; the shell has a terminal, tasks have none."""
    monkeypatch.setattr(launching, "_has_terminal", lambda: True)
    assert read_launch(srun(4, 1, 0, SLURM_JOB_NAME="bash")) == ON_ITS_OWN
    assert read_launch(srun(4, 1, 0)).by == SLURM


def test_nodes_with_different_numbers_of_tasks_are_one_line() -> None:
    with pytest.raises(UserError, match=r"srun started 4 tasks on 2 nodes \(3,1\).*--ntasks-per-node"):
        read_launch(srun(4, 2, 0, layout="3,1"))


def use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    found = read_launch(environment)
    monkeypatch.setattr("lightning_glue.training.devices.launch", lambda: found)


def devices(procs: int = 1, gpus: str = "0") -> Devices:
    return resolve_devices(compose([f"trainer.procs={procs}", f"trainer.gpus={gpus}"]).trainer)


def test_processes_that_are_there_are_counted_and_others_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for environment in ({}, BATCH, SALLOC, srun(1, 1, 0), {**BATCH, "SLURM_NTASKS": "2"}):
        use(monkeypatch, environment)
        assert (devices(1), devices(2)) == (Devices("cpu", 1), Devices("cpu", 2))
    for environment in (srun(4, 2, 3), torchrun(4, 2, 3), {**srun(2, 2, 1), **torchrun(4, 2, 0)}):
        use(monkeypatch, environment)
        assert devices(1) == devices(2) == Devices("cpu", 2, 2)


@pytest.mark.parametrize(("environment", "by"), [(srun(4, 2, 3), "srun"), (torchrun(4, 2, 3), "torchrun")])
def test_another_number_than_asked_for_is_one_line(
    environment: dict[str, str], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, environment)
    with pytest.raises(UserError, match=f"{by} started 2 processes on each of 2 nodes, but --procs asks for 4; leave"):
        devices(4)
    with pytest.raises(UserError, match=f"{by} started 2 processes on this node, which see 0 CUDA devices each"):
        devices(gpus="4")


def test_workers_of_a_search_know_nothing_of_what_started_the_controller() -> None:
    kept = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "MLFLOW_TRACKING_URI": "http://x", "ROLES": "mine"}
    for _, (environment, _) in CASES.items():
        environment = without_launcher({**environment, **kept, "TORCHELASTIC_USE_AGENT_STORE": "True"})
        assert environment == kept
        assert read_launch(environment) == ON_ITS_OWN
        assert read_launch({**environment, **torchrun(2, 1, 1)}) == Launch(TORCHRUN, 2, 1, 1, 1)


ASKED = """
import os
from lightning_glue.training.distributed import cluster_environment, prepare
from pytorch_lightning.utilities import rank_zero_only
prepare()
found = cluster_environment()
print(type(found).__name__, rank_zero_only.rank, found.creates_processes_externally, found.node_rank())
if found.creates_processes_externally:
    print(found.world_size(), found.global_rank(), found.local_rank(), found.main_address, found.main_port)
"""


def asked(environment: dict[str, str]) -> list[str]:
    """What Lightning gets to know in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", FORKED + ASKED],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "srun" not in result.stderr
    return result.stdout.splitlines()


@pytest.mark.torture
def test_lightning_is_told_the_same() -> None:
    nodes = {"SLURM_STEP_NODELIST": "n[3-4]"}
    assert asked({**srun(4, 2, 3), **nodes}) == ["Srun 3 True 1", f"4 3 1 n3 {15000 + 16 * 4242 % 15000}"]
    assert asked({**srun(2, 2, 1), **torchrun(4, 2, 0)}) == ["TorchElasticEnvironment 0 True 0", "4 0 0 n1 29500"]
    assert asked({**BATCH, "RANK": "1", "LOCAL_RANK": "1"}) == ["LightningEnvironment 0 False 0"]


def test_a_port_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    use(monkeypatch, {})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        check_port(Devices("cpu", 1))
        with pytest.raises(UserError, match=rf"MASTER_PORT={port} cannot be used \(Address already in use\); unset it"):
            check_port(Devices("cpu", 2))
    check_port(Devices("cpu", 2))
    monkeypatch.setenv("MASTER_PORT", "many")
    with pytest.raises(UserError, match=r"MASTER_PORT=many cannot be used \(no port\)"):
        check_port(Devices("cpu", 2))
