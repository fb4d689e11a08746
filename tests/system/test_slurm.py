"""Trainings and searches under a real SLURM of two nodes, each started in one of the ways that people start them."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from helpers import slurm
from helpers.project import ROOT
from helpers.servers import free_port

if why := slurm.missing():
    pytest.skip(f"no SLURM here: {why}", allow_module_level=True)

pytestmark = pytest.mark.torture
FLAGS = "--task WNLI --data sample --model tiny --gpus 0 tracking.system_metrics_seconds=null data.batch_size=32"
TORCHRUN = f"{sys.executable} -m torch.distributed.run --nproc-per-node"
TRAIN = f"hooked.py {FLAGS}"  # each process tells its place before the first step
HOOKED = """
import os, time
from lightning_glue import train
from lightning_glue.training import module
from lightning_glue.utils.console import run_main
def tell(self):
    node = os.environ.get("SLURMD_NODENAME")
    line = f"rank {self.trainer.global_rank} of {self.trainer.world_size} on {node} from {self.trainer.global_step}\\n"
    with open("ranks", "a") as file:
        file.write(line)
def hold(self, *_):
    if os.path.exists("held"):  # the training lasts until a test has done what it does to it, on any machine
        time.sleep(0.5)
module.GlueModule.on_train_start = tell
module.GlueModule.on_train_batch_start = hold
run_main(train.main)
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[slurm.Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = slurm.Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture
def cluster(
    nodes: slurm.Slurm, bpe_dir: Path, cache: Path, new_store: Callable[[Path], None], tmp_path: Path
) -> slurm.Slurm:
    nodes.environment |= {
        "PYTHONPATH": str(ROOT), "ROBERTA_BPE_DIR": str(bpe_dir), "LIGHTNING_GLUE_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    (tmp_path / "hooked.py").write_text(HOOKED)
    new_store(tmp_path)
    return nodes


def documented(job_name: str, fitting: dict[str, str]) -> str:
    """A job of docs/cluster.md as one that fits here: ``fitting`` replaces GPUs, numbers and the user's own places."""
    text = (ROOT / "docs" / "cluster.md").read_text()
    (script,) = (
        block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if f"--job-name={job_name} " in block
    )
    script = re.sub(r"^(export MLFLOW|source |cd ).*\n", "", script, flags=re.MULTILINE)
    for there, here in fitting.items():
        assert there in script, (there, script)
        script = script.replace(there, here)
    return script


def documented_script(epochs: int) -> str:
    return documented("mnli", {
        "--ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8": "--ntasks-per-node=1",
        ".venv/bin/python -m lightning_glue.train": f"{sys.executable} hooked.py",
        "--task MNLI --model roberta.large --gpus 4": f"{FLAGS} trainer.max_epochs={epochs}",
    })  # fmt: skip


def trials_of(folder: Path) -> list[str]:
    """Numbers of the trials whose runs are finished."""
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("glue-wnli-sample").experiment_id])
    complete = [one for one in found if one.data.tags.get("optuna.state") == "COMPLETE"]
    assert {one.info.status for one in found} == {"FINISHED"}
    return sorted(one.data.tags["optuna.trial"] for one in complete)


def test_torchrun_as_it_is_documented(cluster: slurm.Slurm, tmp_path: Path) -> None:
    script = documented("mnli-torchrun", {
        " --gpus-per-node=4 --cpus-per-task=32": "",
        ".venv/bin/torchrun": f"{sys.executable} -m torch.distributed.run",
        "--nproc-per-node 4": "--nproc-per-node 1",
        "$head:29500": f"127.0.0.1:{free_port()}",  # names of nodes mean nothing here
        "-m lightning_glue.train --task MNLI --model roberta.large --gpus 4": f"{TRAIN} trainer.max_steps=2",
    })  # fmt: skip
    batch(cluster, tmp_path, script)
    assert len(finished_runs(tmp_path)) == 1
    found = ranks(tmp_path)
    assert [line.split(" from ")[0][:-1] for line in found] == ["rank 0 of 2 on n", "rank 1 of 2 on n"]
    assert {line.split()[5] for line in found} == {"n1", "n2"}


def test_an_array_of_searches_as_it_is_documented(cluster: slurm.Slurm, tmp_path: Path) -> None:
    script = documented("tune-rte", {
        "--array=1-8 --gpus-per-node=4 --cpus-per-task=16": "--array=1-2",
        ".venv/bin/python": sys.executable,
        "--task RTE --model roberta.base --gpus 4 --trials 200": f"{FLAGS} trainer.max_steps=2 --trials 4",
    })  # fmt: skip
    job = submit(cluster, tmp_path, script)
    wait_for(lambda: len(states := array_states(cluster, job)) == 2 and set(states) <= ENDED)
    assert array_states(cluster, job) == ["COMPLETED"] * 2, (tmp_path / "out").read_text()
    assert trials_of(tmp_path) == ["0", "1", "2", "3"]


def array_states(cluster: slurm.Slurm, job: str) -> list[str]:
    return re.findall(r"\bJobState=(\S+)", cluster.command("scontrol", "show", "job", job).stdout)


def test_a_search_over_ray_as_it_is_documented(cluster: slurm.Slurm, tmp_path: Path) -> None:
    binaries = Path(sys.executable).parent
    script = documented("tune-ray", {
        "--nodes=4 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=32": "--nodes=2 --ntasks-per-node=1",
        ".venv/bin/": f"{binaries}/",
        "--disable-usage-stats": "--disable-usage-stats --num-cpus=1",
        "--task RTE --model roberta.base --trials 200": f"{FLAGS} trainer.max_steps=2 --trials 4",
    })  # fmt: skip
    said = batch(cluster, tmp_path, script)
    assert "parameters, 2 at a time" in said
    assert trials_of(tmp_path) == ["0", "1", "2", "3"]


def test_the_benchmark_as_an_array_that_shares_one_ledger(cluster: slurm.Slurm, tmp_path: Path) -> None:
    assert FLAGS.startswith("--task WNLI ")
    shortened = f"--tasks WNLI --seeds 2 {FLAGS.removeprefix('--task WNLI ')} trainer.max_steps=2"
    script = documented("glue", {
        "--array=1-4 --gpus-per-node=4 --cpus-per-task=32": "--array=1-2",
        ".venv/bin/python": sys.executable,
        "--model roberta.base --seeds 5 --gpus 4": shortened,
    })  # fmt: skip
    job = submit(cluster, tmp_path, script)
    wait_for(lambda: len(states := array_states(cluster, job)) == 2 and set(states) <= ENDED, 800)
    assert array_states(cluster, job) == ["COMPLETED"] * 2, (tmp_path / "out").read_text()
    (ledger,) = (tmp_path / "mlruns" / ".glue").glob("*/ledger.jsonl")
    events = [json.loads(line) for line in ledger.read_text().splitlines()]
    done = [event["job"] for event in events if event["state"] == "done"]
    trained = [job for job in done if job.endswith("/train")]
    assert sorted(trained) == ["WNLI/seed-1/train", "WNLI/seed-2/train"]
    assert len(done) == len(set(done)) and not [event for event in events if event["state"] in ("failed", "died")]


def submit(cluster: slurm.Slurm, folder: Path, script: str, *options: str) -> str:
    """Queue a batch script that writes to ``out``; the job's number."""
    (folder / "job.sh").write_text(script if script.startswith("#!") else f"#!/bin/bash\n{script}\n")
    usual = ["--parsable", "--output=out", "--open-mode=append"]
    queued = cluster.command("sbatch", *usual, *options, "job.sh", folder=folder)
    assert queued.returncode == 0, queued.stderr
    return queued.stdout.strip()


def batch(cluster: slurm.Slurm, folder: Path, script: str, *options: str) -> str:
    """Run a batch script to its end; what it printed."""
    job = submit(cluster, folder, script, *options)
    end = wait_for(lambda: state(cluster, job) not in ("PENDING", "RUNNING", "COMPLETING") and state(cluster, job))
    said = (folder / "out").read_text()
    assert end == "COMPLETED", said
    return said


def state(cluster: slurm.Slurm, job: str) -> str:
    return field(cluster, job, "JobState")


def field(cluster: slurm.Slurm, job: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", cluster.command("scontrol", "show", "job", job).stdout)
    assert found
    return found[1]


def wait_for(ready: Callable[[], object], seconds: float = 400):
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    return found


def ranks(folder: Path) -> list[str]:
    return sorted((folder / "ranks").read_text().splitlines())


def finished_runs(folder: Path, experiment: str = "glue-wnli-sample") -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert {one.info.status for one in found} == {"FINISHED"}, (folder / "out").read_text()
    return found


ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
WAYS = {
    "srun on two nodes": (
        f"srun {sys.executable} {TRAIN} trainer.max_steps=2", TWO_NODES,
        ["rank 0 of 2 on n1 from 0", "rank 1 of 2 on n2 from 0"],
    ),
    "srun -n 2, without --ntasks-per-node": (
        f"srun -n 2 {sys.executable} {TRAIN} trainer.max_steps=2", ("--nodes=1", "--ntasks=2"),
        ["rank 0 of 2 on n1 from 0", "rank 1 of 2 on n1 from 0"],
    ),
    "srun torchrun on two nodes": (
        f"srun {TORCHRUN} 1 --nnodes 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:$PORT {TRAIN} trainer.max_steps=2",
        TWO_NODES, [r"rank 0 of 2 on n. from 0", r"rank 1 of 2 on n. from 0"],
    ),
    "torchrun in a script with one task": (
        f"{TORCHRUN} 2 --standalone {TRAIN} trainer.max_steps=2", ("--ntasks=1",),
        ["rank 0 of 2 on n1 from 0", "rank 1 of 2 on n1 from 0"],
    ),
    "no srun, --procs 2": (
        f"{sys.executable} {TRAIN} --procs 2 trainer.max_steps=2", ("--ntasks=1",),
        ["rank 0 of 2 on n1 from 0", "rank 1 of 2 on n1 from 0"],
    ),
    "no srun, two tasks": (
        f"{sys.executable} {TRAIN} trainer.max_steps=2", ("--nodes=1", "--ntasks-per-node=2"),
        ["rank 0 of 1 on n1 from 0"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("script", "options", "expected"), WAYS.values(), ids=WAYS)
def test_all_processes_train_together(
    script: str, options: tuple[str, ...], expected: list[str], cluster: slurm.Slurm, tmp_path: Path
) -> None:
    said = batch(cluster, tmp_path, f"export PORT={free_port()}\n{script}", *options)
    assert "Traceback" not in said and "HINT" not in said
    assert said.count("best evaluation") == 1
    assert len(finished_runs(tmp_path)) == 1
    found = ranks(tmp_path)
    assert len(found) == len(expected)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, found)), found


def test_in_salloc_the_command_is_alone(cluster: slurm.Slurm, tmp_path: Path) -> None:
    command = [sys.executable, *TRAIN.split(), "trainer.max_steps=2"]
    done = cluster.command("salloc", "-n", "4", *command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ranks(tmp_path) == ["rank 0 of 1 on None from 0"]
    assert len(finished_runs(tmp_path)) == 1


def test_another_number_of_processes_than_srun_started_is_one_line_each(cluster: slurm.Slurm, tmp_path: Path) -> None:
    done = cluster.command("srun", "-n", "2", sys.executable, *TRAIN.split(), "--procs", "4", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error: srun started 2 processes on each of 1 nodes, but --procs asks for 4; leave") == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ranks").exists()


def test_every_task_of_a_search_is_a_controller_whose_trials_train_by_themselves(
    cluster: slurm.Slurm, tmp_path: Path
) -> None:
    command = f"{sys.executable} -m lightning_glue.tune {FLAGS} --trials 2 trainer.max_steps=2"
    said = batch(cluster, tmp_path, f"srun {command}", *TWO_NODES)
    assert "2 complete" in said
    trials = [one for one in finished_runs(tmp_path) if "optuna.trial" in one.data.tags]
    assert sorted(one.data.tags["optuna.trial"] for one in trials) == ["0", "1"]


@pytest.mark.parametrize("number", ["TERM", "USR1", "time"])
def test_a_job_that_is_warned_saves_and_goes_on_as_the_same_run_when_it_is_requeued(
    number: str, cluster: slurm.Slurm, tmp_path: Path
) -> None:
    """``time``: by SLURM, before the job's time is up; else by scancel, to the same processes: the steps of the job."""
    epochs = 60 if number == "time" else 25  # SLURM looks twice a minute
    (tmp_path / "held").touch()
    job = submit(cluster, tmp_path, documented_script(epochs))
    wait_for(lambda: (tmp_path / "ranks").exists() and len(ranks(tmp_path)) == 2)
    wait_for(lambda: "epoch 2/" in (tmp_path / "out").read_text())
    if number == "time":  # the notice of the script is two minutes: less is left
        hours, minutes, _ = map(int, field(cluster, job, "RunTime").split(":"))
        limit = f"timelimit={60 * hours + minutes + 2}"
        assert cluster.command("scontrol", "update", f"jobid={job}", limit).returncode == 0
    else:
        assert cluster.command("scancel", f"--signal={number}", job).returncode == 0
    wait_for(lambda: "goes on" in (tmp_path / "out").read_text())
    wait_for(lambda: state(cluster, job) not in ("RUNNING", "COMPLETING"))
    (tmp_path / "held").unlink()
    assert cluster.command("scontrol", "requeue", job).returncode == 0
    assert cluster.command("scontrol", "update", f"jobid={job}", "timelimit=20").returncode == 0
    wait_for(lambda: field(cluster, job, "Restarts") == "1" and state(cluster, job) == "COMPLETED")
    said = (tmp_path / "out").read_text()
    (run,) = finished_runs(tmp_path)
    assert "resuming run" in said
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "dev/accuracy")]
    assert steps == sorted(set(steps)) and len(steps) == epochs
    assert len(ranks(tmp_path)) == 4 and not any(line.endswith("from 0") for line in ranks(tmp_path)[1::2])
