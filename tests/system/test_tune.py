"""The search as a user runs it: real trainings in real processes, looked at through MLflow and Optuna."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlflow
import optuna
import psutil
import pytest
from helpers.control import Silent
from helpers.project import ROOT, run, torture
from mlflow.entities import Run
from optuna.trial import TrialState

from lightning_glue.config import compose, flatten
from lightning_glue.execution.job import Job
from lightning_glue.execution.local import groups
from lightning_glue.execution.place import Division, places
from lightning_glue.tuning.controller import Controller
from lightning_glue.tuning.search import OBJECTIVE
from lightning_glue.tuning.space import make_space
from lightning_glue.tuning.storage import open_storage
from lightning_glue.tuning.strategy import make_sampler
from lightning_glue.tuning.study import SharedStudy

COMMAND = ["--task", "WNLI", "--model", "tiny", "--data", "sample", "--gpus", "0", "--study", "wnli"]
SHORT = ["trainer.max_epochs=2", "data.batch_size=32", "tracking.system_metrics_seconds=null"]


@pytest.fixture(scope="session")
def bpe_dir(small_bpe: Path) -> Path:
    return small_bpe


@pytest.fixture
def project(
    tmp_path: Path, cache: Path, bpe_dir: Path, new_store: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of the project: a search writes to its experiments/."""
    for name in ("conf", "experiments", "lightning_glue"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    new_store(tmp_path)
    monkeypatch.setenv("ROBERTA_BPE_DIR", str(bpe_dir))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return tmp_path


def tune(project: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "lightning_glue.tune", *COMMAND, *arguments],
        cwd=project, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def start(project: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_glue.tune", *COMMAND, *arguments],
        cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def trials(project: Path) -> list[optuna.trial.FrozenTrial]:
    try:
        return optuna.load_study(study_name="wnli", storage=open_storage(f"sqlite:///{project / 'optuna.db'}")).trials
    except KeyError:
        return []


def runs(project: Path) -> tuple[Run, list[Run]]:
    """The study's run and the trainings below it."""
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("glue-wnli-sample").experiment_id])
    (parent,) = [one for one in found if "mlflow.parentRunId" not in one.data.tags]
    nested = [one for one in found if one.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(nested) == len(found) - 1
    return parent, nested


def wait_for(condition, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def scratch_checkpoint(project: Path) -> list[Path]:
    """The last checkpoint of trial 0, once there is one."""
    return list((project / "mlruns" / ".tune").glob("wnli-*/trial-0-seed-0/last.ckpt"))


def trial_processes(controller: subprocess.Popen[str]) -> list[psutil.Process]:
    below = psutil.Process(controller.pid).children(recursive=True)
    return [process for process in below if "lightning_glue.execution.worker" in " ".join(process.cmdline())]


def test_a_search_is_tracked_drawn_and_leaves_a_recipe(project: Path) -> None:
    result = tune(project, "--trials", "3", "--workers", "2", *SHORT)
    assert [trial.number for trial in trials(project)] == [0, 1, 2]
    assert trials(project)[0].params["optimizer.lr"] == pytest.approx(1e-3)  # the recipe comes first
    parent, nested = runs(project)
    assert parent.info.status == "FINISHED"
    assert len(nested) == 3
    complete = [trial for trial in trials(project) if trial.state == TrialState.COMPLETE]
    winner = max(complete, key=lambda trial: trial.value)  # the first of equals
    best = winner.value
    assert parent.data.metrics["best/dev/accuracy"] == best
    for one in nested:
        trial = trials(project)[int(one.data.tags["optuna.trial"])]
        assert one.info.status == "FINISHED"
        assert one.data.tags["optuna.state"] == trial.state.name
        assert float(one.data.params["optimizer.lr"]) == pytest.approx(trial.params["optimizer.lr"])
        assert {"train/loss", "train/lr", "dev/accuracy", "best/dev/accuracy"} <= set(one.data.metrics)
        assert trial.user_attrs["runs"] == [one.info.run_id]
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    figures = {item.path for item in client.list_artifacts(parent.info.run_id, "figures")}
    drawn = {"history", "slice", "parallel_coordinate", "intermediate_values"}
    assert {f"figures/{name}.png" for name in drawn} <= figures
    assert f"dev/accuracy {best:.4f}" in result.stdout
    assert not list((project / "mlruns" / ".tune").rglob("*.ckpt"))

    recipe = project / "experiments" / "tuned" / "WNLI.yaml"
    assert f"dev/accuracy {best:.4f}" in recipe.read_text()
    output = run("lightning_glue.train", "--experiment", "tuned/WNLI", "trainer.gpus=0", cwd=project, PYTHONPATH=".")
    assert f"tiny, 2 epochs, batch 32, lr {winner.params['optimizer.lr']:g}" in output.stdout
    assert f"best trial {winner.number}: " in result.stdout
    assert ("no better than saying the majority class" in result.stdout) == bool(winner.user_attrs.get("collapsed"))
    assert f"trial {winner.number} of " in recipe.read_text()


@pytest.mark.torture
def test_a_search_that_is_through_writes_its_recipe_again_grows_and_keeps_its_space(project: Path) -> None:
    tune(project, "--trials", "4", "--workers", "2", *SHORT)
    winner = max((trial for trial in trials(project) if trial.state == TrialState.COMPLETE), key=lambda one: one.value)
    recipe = project / "experiments" / "tuned" / "WNLI.yaml"
    recipe.write_text("of another study")
    tune(project, "--trials", "4", *SHORT)  # none more
    assert f"trial {winner.number} of 4, " in recipe.read_text()

    again = tune(project, "--trials", "5", *SHORT)  # one more
    assert len(trials(project)) == 5
    assert again.stderr.count("done") + again.stderr.count("pruned") == 1
    other = tune(project, "--trials", "5", "optimizer.lr=1e-3", *SHORT, check=False)
    assert other.returncode == 2
    assert "study 'wnli' was made with another space: optimizer.lr is" in other.stderr
    assert other.stderr.count("\n") == 1


@pytest.mark.torture
def test_a_killed_trial_goes_on_from_its_checkpoint_in_the_same_run(project: Path) -> None:
    search = start(project, "--trials", "2", "trainer.max_epochs=12", *SHORT[1:])
    wait_for(lambda: scratch_checkpoint(project))
    (process,) = trial_processes(search)
    process.kill()
    output, _ = search.communicate(timeout=240)
    assert search.returncode == 0, output
    states = Counter(trial.state for trial in trials(project))
    assert states == {TrialState.COMPLETE: 2, TrialState.FAIL: 1}
    failed, second, retried = trials(project)
    assert failed.user_attrs["reason"] == "process 0 was ended by SIGKILL"
    assert retried.user_attrs["retry_of"] == 0
    assert retried.params == failed.params != second.params
    _, nested = runs(project)
    assert len(nested) == 2  # the retry has no run of its own
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    (run_id,) = retried.user_attrs["runs"]
    assert [point.step for point in client.get_metric_history(run_id, "dev/accuracy")] == [10 * e for e in range(1, 13)]
    assert {one.info.status for one in nested} == {"FINISHED"}


@pytest.mark.torture
def test_a_killed_search_goes_on_where_it_was(project: Path) -> None:
    arguments = ["--trials", "3", "trainer.max_epochs=6", *SHORT[1:]]
    search = start(project, *arguments)
    wait_for(lambda: sum(trial.state == TrialState.COMPLETE for trial in trials(project)) == 1)
    processes = trial_processes(search)
    search.kill()
    search.communicate()
    assert psutil.wait_procs(processes, timeout=40)[1] == []
    tune(project, *arguments)
    states = Counter(trial.state for trial in trials(project))
    assert states[TrialState.COMPLETE] + states[TrialState.PRUNED] == 3
    assert set(states) <= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    parent, _ = runs(project)  # one parent, not two
    assert parent.info.status == "FINISHED"


@pytest.mark.parametrize("number", [signal.SIGINT, torture(signal.SIGTERM)])
def test_stopping_a_search_leaves_no_process_and_no_lost_trial(project: Path, number: signal.Signals) -> None:
    search = start(project, "--trials", "2", "--procs", "2", "trainer.max_epochs=50", *SHORT[1:])
    wait_for(lambda: scratch_checkpoint(project))
    processes = trial_processes(search)
    assert len(processes) == 2
    search.send_signal(number)
    output, _ = search.communicate(timeout=60)
    assert search.returncode == 128 + number, output
    assert "the same command goes on" in output
    assert "Traceback" not in output
    assert psutil.wait_procs(processes, timeout=5)[1] == []
    assert Counter(trial.state for trial in trials(project)) == {TrialState.FAIL: 1, TrialState.WAITING: 2}
    parent, (nested,) = runs(project)
    assert (parent.info.status, nested.info.status) == ("KILLED", "KILLED")


@pytest.mark.torture
def test_the_prune_decision_reaches_every_process_of_a_trial(project: Path) -> None:
    study = SharedStudy(
        "wnli",
        open_storage(f"sqlite:///{project / 'optuna.db'}"),
        make_sampler("random", 1),
        optuna.pruners.ThresholdPruner(lower=2.0, n_warmup_steps=2),  # prunes whatever is reported second
        {"space": {}},
        heartbeat=5,
        retries=0,
    )
    study.fill_queue(2, [])
    space = make_space({"optimizer.lr": {"low": 1e-4, "high": 1e-3}}, set())

    def make_job(running, seed: int, checkpoints: Path) -> Job:
        overrides = ["trainer.gpus=0", "trainer.procs=2", "trainer.max_epochs=40", *SHORT[1:]]
        config = compose([*overrides, "tracking.checkpoints=false"], task="WNLI", model="tiny", data="sample")
        return Job(flatten(config) | running.parameters, {}, str(checkpoints))

    where = places(Division(workers=1, procs=2))
    Controller(study, space, make_job, groups(where, OBJECTIVE, Path("mlruns/.tune")), Silent()).run()
    assert [trial.state for trial in trials(project)] == [TrialState.PRUNED] * 2
    assert [len(trial.intermediate_values) for trial in trials(project)] == [2, 2]
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    nested = client.search_runs([client.get_experiment_by_name("glue-wnli-sample").experiment_id])
    assert {(one.info.status, one.data.tags["optuna.pruned"]) for one in nested} == {("FINISHED", "true")}
    known = [run_id for trial in trials(project) for run_id in trial.user_attrs["runs"]]
    assert sorted(known) == sorted(one.info.run_id for one in nested)  # told by process 0 alone
    for one in nested:
        assert [m.step for m in client.get_metric_history(one.info.run_id, "dev/accuracy")] == [10, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "SST2"], "unknown task 'SST2'; did you mean 'SST-2'?"),
        (["--trials", "0"], "--trials 0; expected at least 1"),
        (["tune.sampler=tpee"], "tune.sampler=tpee; did you mean 'tpe'?"),
        (["tune.space=wider"], "unknown tune.space=wider; did you mean 'wide'?"),
        (["tune.spaces.wide={}"], "unknown key"),
        (["--storage", "postgresql://127.0.0.1:9/x"], "storage postgresql://127.0.0.1:9/x cannot be reached"),
        (["tune.space=paper", "optimizer.lr=1e-5", "data.batch_size=16"], "the search space is empty"),
        (["--data", "glue", "data.glue_dir=/no/such"], "/no/such"),
    ],
)
def test_a_mistake_is_one_line(project: Path, arguments: list[str], message: str) -> None:
    result = tune(project, *arguments, check=False)
    assert result.returncode == 2
    error = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and message in error[0]
    assert "Traceback" not in result.stderr


def test_help_is_quick_to_import() -> None:
    code = (
        "import sys; sys.argv = ['tune', '--help']\n"
        "from lightning_glue import tune\n"
        "try: tune.parse_arguments()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'optuna', 'mlflow', 'hydra', 'fairseq'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=-3)
