"""How processes that train together vote, and part."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.project import ROOT, torture
from helpers.servers import free_port

VOTING = """
import os, sys
import torch, torch.distributed as dist
from lightning_glue.training import distributed
from lightning_glue.utils.launch import launch

def threads():  # gloo's own
    names = [open(f"/proc/self/task/{number}/comm").read() for number in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)

def act():
    distributed.prepare()
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    before = threads()
    model(torch.ones(1, 2)).sum().backward()
    vote = distributed.Vote(2)
    wishes = [15 * (step == 2 and launch().rank == 1) for step in range(5)]
    print([vote.cast(wish, False)[0] == 15 for wish in wishes], threads() > before > 0)
    {end}

act()
distributed.leave()
print(threads(), flush=True)
"""
ENDS = {
    "in order": "vote.close()",
    "with a vote under way that nobody waits for": "del vote",
    "with an error": "sys.excepthook = lambda *_: vote.close()\n    globals()['act'] = 1 / 0",
}


def act(rank: int, port: int, end: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", VOTING.replace("{end}", end)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={
            **os.environ, "TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        },
    )  # fmt: skip


@pytest.mark.torture
@pytest.mark.parametrize("name", [next(iter(ENDS)), *map(torture, list(ENDS)[1:])])
def test_a_wish_of_one_reaches_all_at_the_same_step_and_no_thread_outlives_the_group(name: str) -> None:
    port, end = free_port(), ENDS[name]
    processes = [act(rank, port, end) for rank in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=200)
        said = output.splitlines()
        assert said[0] == "[False, False, False, True, False] True", errors
        assert "terminate called" not in errors
        assert (process.returncode, said[1:]) == ((1, []) if "1 / 0" in end else (0, ["0"])), errors
