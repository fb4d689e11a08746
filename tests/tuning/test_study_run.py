"""A study's own run: one for all its controllers, through journals, with a status that is true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlflow
import optuna
import pytest
from helpers.control import SPACE, share
from helpers.project import run
from helpers.servers import free_port
from mlflow.entities import Run
from optuna.trial import TrialState

from lightning_glue import tune
from lightning_glue.tracking.logger import MLflowTracker
from lightning_glue.tuning.results import study_status
from lightning_glue.tuning.study import SharedStudy
from lightning_glue.tuning.study_run import STUDY_TAG, StudyTracking, draw


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, new_store: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> Path:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    new_store(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complete(study: SharedStudy) -> optuna.trial.FrozenTrial:
    trial = study.claim(SPACE)
    study.finish(trial._trial_id, TrialState.COMPLETE, trial.params["x"])
    return study.ended(trial._trial_id)


def store() -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")


def study_run(study: SharedStudy) -> Run:
    client = store()
    experiment = client.get_experiment_by_name("searches")
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`{STUDY_TAG}` = '{study.id}'")
    return found


@pytest.mark.torture
def test_two_controllers_write_one_run(folder: Path) -> None:
    storage = str(folder / "study.journal")
    studies = [share(storage, "shared", 4) for _ in range(2)]
    first, second = (
        StudyTracking(MLflowTracker(None, "searches", "study shared"), study, params, "dev/x", alone=alone)
        for study, params, alone in zip(studies, [{"trials": 2}, {"trials": 4}], [True, False])
    )
    for study, tracking in zip(studies, (first, second)):
        tracking.finished(complete(study), [])
        tracking.finished(complete(study), [])
    second.close("RUNNING")  # stopped, while the first goes on
    assert study_run(studies[0]).info.status == "RUNNING"
    first.close("FINISHED")
    found = study_run(studies[0])
    assert (found.info.status, found.data.params["trials"]) == ("FINISHED", "2")
    assert found.data.metrics["study/trials"] == 4
    assert found.data.metrics["best/dev/x"] == max(trial.value for trial in studies[0].trials())
    client = store()
    assert "figures/history.png" in [item.path for item in client.list_artifacts(found.info.run_id, "figures")]


def test_trials_that_end_at_the_same_moment_are_all_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_glue.tuning.study._LOOK_SECONDS", float("inf"))  # nobody sees the other's
    studies = [share(str(folder / "study.journal"), "moment", 2) for _ in range(2)]
    trackings = [
        StudyTracking(MLflowTracker(None, "searches", "study moment"), study, {}, "dev/x", alone=alone)
        for study, alone in zip(studies, [True, False])
    ]
    trials = [study.claim(SPACE) for study in studies]
    for study, trial in zip(studies, trials):
        study.finish(trial._trial_id, TrialState.COMPLETE, trial.params["x"])
    for study, tracking, trial in zip(studies, trackings, trials):
        tracking.finished(study.ended(trial._trial_id), [])
    for tracking, status in zip(trackings, ["RUNNING", "FINISHED"]):
        tracking.close(status)
    metrics = study_run(studies[0]).data.metrics
    assert (metrics["study/trials"], metrics["best/dev/x"]) == (2, max(trial.value for trial in studies[0].trials()))


@pytest.mark.torture
def test_a_search_without_its_server_is_delivered_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")  # one controller per task: each leads its own
    study = share(str(folder / "study.journal"), "away", 1)
    away = f"http://ann:s3cr3t@127.0.0.1:{free_port()}"
    tracker = MLflowTracker(away, "searches", "study away")
    tracking = StudyTracking(tracker, study, {"tracking.uri": away}, "dev/x", alone=True)
    tracking.finished(complete(study), [])
    tracking.close("FINISHED")
    run("lightning_glue.sync", "--uri", "sqlite:///mlflow.db", cwd=folder)
    found = study_run(study)
    assert (found.info.status, found.data.metrics["study/trials"]) == ("FINISHED", 1)
    assert "s3cr3t" not in str(found.data.params) + str(found.data.tags)


def stopped(by: int | None = None, last_failure: str = "") -> SimpleNamespace:
    return SimpleNamespace(stopped_by=by, last_failure=last_failure)


def test_the_status_of_a_search_is_true(folder: Path) -> None:
    study, other = (share(str(folder / "study.journal"), "status", 3, retries=0) for _ in range(2))
    failed = study.claim(SPACE)
    study.fail(failed._trial_id, "diverged at step 3", again=False)
    assert study_status(study, stopped()) == ("FAILED", "no trial completed; the last failed: diverged at step 3")
    assert study_status(study, stopped(2)) == ("KILLED", "")
    trial = other.claim(SPACE)
    assert study_status(study, stopped(2)) == ("RUNNING", "")  # another controller's trial goes on
    other.finish(trial._trial_id, TrialState.COMPLETE, 0.5)
    assert study_status(study, stopped()) == ("FINISHED", "")


def test_the_storage_of_the_environment_is_used_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPTUNA_STORAGE", "postgresql://ann:s3cr3t@db/optuna")
    monkeypatch.setattr("sys.argv", ["tune", "--task", "RTE"])
    assert tune.parse_arguments().storage == "postgresql://ann:s3cr3t@db/optuna"
    monkeypatch.setattr("sys.argv", ["tune", "--help"])
    with pytest.raises(SystemExit):
        tune.parse_arguments()
    assert "s3cr3t" not in capsys.readouterr().out


def test_a_command_line_is_recorded_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_glue.tracking.provenance import command_line

    monkeypatch.setattr(
        "sys.orig_argv", ["python", "-m", "x", "--storage", "postgresql://ann:s3'cr3t@db/optuna", "a b"]
    )
    assert command_line() == "python -m x --storage 'postgresql://ann:***@db/optuna' 'a b'"


def test_a_legend_of_many_trials_does_not_outgrow_its_plot(recwarn: pytest.WarningsRecorder) -> None:
    heights = []
    for trials in (5, 60):
        study = optuna.create_study(direction="maximize")
        study.add_trials([optuna.create_trial(value=0.5, intermediate_values={1: 0.4, 2: 0.5})] * trials)
        picture = draw(study, "accuracy")[0]["intermediate_values"]
        heights.append(int.from_bytes(picture[20:24], "big"))  # of PNG's header
    assert heights[0] == heights[1]
    assert not [str(warning.message) for warning in recwarn if "layout" in str(warning.message)]
