"""The exported model of a run: found by path or MLflow run id, on this machine or in the run's store."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.errors import CheckpointError
from lightning_glue.tracking.client import connect
from lightning_glue.tracking.journals import JOURNALS, delivered_run, find_journal
from lightning_glue.tracking.state import State
from lightning_glue.utils.console import command
from lightning_glue.utils.digests import file_sha256
from lightning_glue.utils.paths import local_folder
from lightning_glue.utils.redact import first_line, hide_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_EXPORT = "fairseq"  # the run's artifact folder
_READ = ("checkpoint_best.pt", "input0/dict.txt", "vocab.json", "merges.txt", "bpecodes",
         "tokenizer_config.json", "model_card.json")  # what is read of it  # fmt: skip
EXPORT_DIGEST = "lineage.export_sha256"  # the run's tag: SHA-256 of the exported checkpoint


def locate(reference: str, uri: str | None) -> Path:
    """The checkpoint, a file or an exported directory, behind a path, an MLflow run id or a registered model.

    Raises:
        UserError: nothing is there, or not what the run left; names what was looked for.
    """
    if reference.startswith("models:/"):
        from lightning_glue.tracking.registry import locate_version

        return locate_version(reference, uri)
    path = Path(reference).expanduser()
    if _RUN_ID.fullmatch(reference) and not path.exists():
        return _exported_by(delivered_run(reference), uri)
    if not path.exists():
        raise CheckpointError(
            f"{reference}: no checkpoint there; expected a file, a fairseq directory, an MLflow run id or "
            "models:/name@alias"
        )
    return path


def _exported_by(run_id: str, uri: str | None) -> Path:
    """The checkpoint in a run's fairseq directory: where it is on this machine, else downloaded until the exit."""
    from mlflow.exceptions import MlflowException

    try:
        client = connect(uri, retries=2)
        run = client.get_run(run_id)
        _check_reachable(run, client.tracking_uri)
        store = local_folder(run.info.artifact_uri)
        path = (store / _EXPORT if store else _download_export(client, run_id)) / "checkpoint_best.pt"
    except (MlflowException, OSError) as error:
        raise CheckpointError(f"run {run_id}: no fairseq directory to be had ({first_line(error)})") from None
    if not path.is_file():
        raise CheckpointError(_why_none(run))
    expected = run.data.tags.get(EXPORT_DIGEST)
    if expected and file_sha256(path) != expected:
        raise CheckpointError(f"run {run_id}: {path} is damaged: its SHA-256 is not the one that the run noted")
    return path


def _check_reachable(run: Run, uri: str) -> None:
    """Raise CheckpointError where a server alone has the files of a run that its database tells of here."""
    if uri.startswith("http") or not str(run.info.artifact_uri).startswith("mlflow-artifacts:"):
        return
    folder = find_journal(Path(JOURNALS), run.info.run_id)
    known = str(State(folder).uri if folder else "")
    address = hide_secrets(known) if known.startswith("http") else "http://HOST:PORT"
    raise CheckpointError(
        f"run {run.info.run_id} keeps its files behind the server that it was trained with, and the database here has "
        f"none of them; start that server, and set MLFLOW_TRACKING_URI={address}"
    )


def _why_none(run: Run) -> str:
    """Why a run has no exported model, and what to do."""
    run_id, status = run.info.run_id, run.info.status
    goes_on = f"{command('python', '-m', 'lightning_glue.train', '--resume', run_id)} goes on with it"
    if status == "RUNNING":
        return f"run {run_id} is not finished: its model is exported at its end; wait for it, or if it died, {goes_on}"
    if status != "FINISHED":
        return f"run {run_id} is not finished, it is {status}: its model is exported at its end; {goes_on}"
    if run.data.params.get("tracking.checkpoints") == "False":
        return f"run {run_id} was trained with tracking.checkpoints=false: its model was not kept"
    return f"run {run_id}: no fairseq directory to be had (no {_EXPORT}/checkpoint_best.pt among its artifacts)"


def _download_export(client: MlflowClient, run_id: str) -> Path:
    """Bring here those files of a run's export that are read, and no other name that its store may list."""
    target = Path(tempfile.mkdtemp(prefix="lightning-glue-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    listed = {item.path for item in client.list_artifacts(run_id, _EXPORT)}
    for name in _READ:
        if f"{_EXPORT}/{name.partition('/')[0]}" in listed:
            folder = (target / name).parent
            folder.mkdir(exist_ok=True)
            client.download_artifacts(run_id, f"{_EXPORT}/{name}", str(folder))
    return target
