"""Find an interrupted training again, and continue it exactly where it was.

A checkpoint is taken only between two optimizer steps. Everything random in a step follows from (seed, step, rank), and
the order of the batches from (seed, epoch), so the position of a training is two numbers: epoch, batches done in it.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_glue import config as configuration
from lightning_glue.config import Config, digest
from lightning_glue.data.binarize import SplitInfo
from lightning_glue.errors import TrackingError, UserError
from lightning_glue.model.checkpoint_file import safe_load
from lightning_glue.tracking.client import connect, is_missing
from lightning_glue.tracking.journal import Journal, try_lock
from lightning_glue.tracking.journals import JOURNALS, find_journal
from lightning_glue.tracking.known_runs import unfinished_runs
from lightning_glue.tracking.logger import MLflowTracker
from lightning_glue.tracking.mirror import MANIFEST
from lightning_glue.tracking.state import State
from lightning_glue.training.checkpoints import JOURNAL, POSITION, RECORD
from lightning_glue.training.distributed import children_end_with_us, decided_by_leader
from lightning_glue.training.preemption import INHERITED
from lightning_glue.utils import files
from lightning_glue.utils.digests import file_sha256
from lightning_glue.utils.launch import is_distributed_child, launch
from lightning_glue.utils.logs import log
from lightning_glue.utils.paths import checkpoint_name, local_folder, sqlite_file
from lightning_glue.utils.redact import first_line

_LAST = "checkpoints/last.ckpt"
_SCRATCH = ".scratch"  # below the folder of the journals
_MOST = 1 << 20  # bytes of a manifest


class PassedOver(TrackingError):
    """A run that cannot be continued and never could be from here: ``--resume auto`` looks for another one."""


@dataclass(frozen=True)
class Resume:
    """An unfinished run to continue.

    Attributes:
        path: its last checkpoint; None where it was interrupted before the first one.
        record: the checkpoint's plain values.
        position: epochs done, batches done in the next one.
        step: optimizer steps done.
    """

    run_id: str
    path: Path | None
    record: dict[str, Any]
    position: tuple[int, int] = (0, 0)
    step: int = 0

    def carry_best(self, checkpoints: Path) -> list[str]:
        """Take the best weights so far along, where the run goes on in another folder; the names of the files."""
        folder = self.path and self.path.parent
        carried = []
        for best in [*folder.glob("best.ckpt"), *folder.glob("step-*.ckpt")] if folder else []:
            if not (checkpoints / best.name).exists():
                checkpoints.mkdir(parents=True, exist_ok=True)
                with open(best, "rb") as source, files.new_file(checkpoints / best.name, "wb") as target:
                    shutil.copyfileobj(source, target)
                carried.append(best.name)
        return carried


def read_checkpoint(path: Path) -> Resume:
    """The run and the position of a ``last.ckpt``, whose tensors stay in the file.

    Raises:
        UserError: the file is missing or damaged, or cannot be continued from.
    """
    checkpoint = safe_load(path, mapped=True)
    if POSITION not in checkpoint:
        raise TrackingError(f"{path} cannot be resumed: it holds weights only; expected the last.ckpt of a run")
    record, position = checkpoint.get(RECORD), checkpoint[POSITION]
    known = isinstance(position, list | tuple) and [type(number) for number in position] == [int, int]
    if (
        not known
        or not isinstance(record, dict)
        or not isinstance(record.get("run_id"), str)
        or not isinstance(record.get("config"), dict)
    ):
        raise TrackingError(f"{path} cannot be resumed: run, configuration or position are missing in it")
    return Resume(record["run_id"], path, record, (position[0], position[1]), int(checkpoint.get("global_step", 0)))


def find(reference: str, config: Config) -> Resume | None:
    """The run to continue, or None where ``auto`` finds none; the same in every process of the job.

    Args:
        reference: path of a checkpoint, MLflow run id, or ``auto``: the newest unfinished run of this configuration,
            that is not being trained.

    Raises:
        UserError: there is nothing to continue from, or what there was is gone.
    """
    if INHERITED in os.environ and is_distributed_child():
        told = json.loads(os.environ[INHERITED])
        if told is None:
            return None
        path = Path(told["path"]) if told["path"] else None
        epochs, batches = told["position"]
        return Resume(told["run_id"], path, told["record"], (epochs, batches))
    found = decided_by_leader(lambda: _find(reference, config))
    if found and found.path and not found.path.exists():  # process 0 is on another machine
        root = Path(config.tracking.journal)
        return replace(found, path=_fetch_checkpoints(config.tracking.uri, found.run_id, root))
    return found


def _find(reference: str, config: Config) -> Resume | None:
    if reference.endswith(".ckpt") or Path(reference).is_file():
        if not Path(reference).is_file():
            raise TrackingError(f"--resume {reference}: no such file")
        return read_checkpoint(Path(reference))
    if reference != "auto":
        return _of_run(reference, config)
    root, uri = Path(config.tracking.journal), config.tracking.uri
    experiment = config.experiment
    for run_id in unfinished_runs(root, uri, experiment, digest(config)):
        try:
            return _of_run(run_id, config)
        except PassedOver as reason:
            log.info("--resume auto passes over a run: %s", reason)
        except UserError as error:
            raise TrackingError(f"--resume auto: {error}") from None
    return None


def _of_run(run_id: str, config: Config) -> Resume:
    """A run to continue: from its last checkpoint, here or on the server, or from the start if it never had one.

    Raises:
        PassedOver: there is nothing of it to go on with, and nothing was lost.
        UserError: it had a checkpoint, which is gone or damaged.
    """
    root, uri = Path(config.tracking.journal), config.tracking.uri
    folder = find_journal(root, run_id)
    if folder is None:
        return replace(read_checkpoint(_fetch_checkpoints(uri, run_id, root)), run_id=run_id)
    journal = Journal(folder)
    start = journal.start()
    if start is None:
        raise PassedOver(f"the journal {folder} of run {run_id} does not tell what it was started with")
    state = State(folder)
    run_id = state.run_id or run_id  # the journal's id is in nobody's table of runs
    _check_database(run_id, state)
    places = _local_places(folder, state)
    newest = max((path for path in places if path.is_file()), key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest:
        return replace(_read_or_say(newest, run_id), run_id=run_id)
    if not journal.newest(f'{{"artifact":"{_LAST}"'.encode()):
        return Resume(run_id, None, start)
    return replace(read_checkpoint(_from_server(state, run_id, places, config)), run_id=run_id)


def _read_or_say(path: Path, run_id: str) -> Resume:
    """:func:`read_checkpoint`, or what to do."""
    try:
        return read_checkpoint(path)
    except UserError as error:
        best = path.with_name("best.ckpt")
        way = f"start a new one with --init-from {best}, or " if best.is_file() else "start a new run "
        raise TrackingError(
            f"run {run_id} cannot go on: {error}; restore that file, or {way}without --resume"
        ) from None


def _local_places(folder: Path, state: State) -> list[Path]:
    """Where the run of a journal on this machine may have its last checkpoint."""
    store = local_folder(state.artifact_uri)
    return [folder / "artifacts" / _LAST, *([store / _LAST] if store else [])]


def _from_server(state: State, run_id: str, places: list[Path], config: Config) -> Path:
    """The server's copy of a run's last checkpoint that is not where it was here."""
    root, uri = Path(config.tracking.journal), config.tracking.uri
    looked = " and ".join(str(place) for place in places)
    if state.run_id and state.artifact_uri and not local_folder(state.artifact_uri):
        try:
            return _fetch_checkpoints(uri or state.uri, state.run_id, root)
        except UserError as error:
            looked += f" and on the server ({error})"
    raise TrackingError(
        f"run {run_id} cannot go on: its last checkpoint is gone, looked for {looked}; restore it (from a backup, or "
        "by moving the folder back), or leave --resume out to start a new run"
    )


def _check_database(run_id: str, state: State) -> None:
    """Raise PassedOver where the database that a run is in is no more: MLflow would make an empty one."""
    if state.run_id and is_missing(state.uri):
        raise PassedOver(
            f"run {run_id} cannot go on: it is in the database {sqlite_file(state.uri)}, which is gone; restore that "
            "file, or leave --resume out to start a new run"
        )


@contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """An empty folder of this process below that of the journals; those of processes that were killed are removed."""
    try:
        (root / _SCRATCH).mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack, try_lock(root / _SCRATCH / ".lock", wait=True):
            for lock in (root / _SCRATCH).glob("*/lock"):
                with try_lock(lock) as free:
                    if free:
                        shutil.rmtree(lock.parent, ignore_errors=True)
            folder = root / _SCRATCH / f"{os.getpid()}-{os.urandom(4).hex()}"
            folder.mkdir()
            stack.enter_context(try_lock(folder / "lock"))
            held = stack.pop_all()
    except OSError as error:
        raise TrackingError(f"cannot write below {root}: {error.strerror}; see tracking.journal") from None
    with held:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _fetch_checkpoints(uri: str | None, run_id: str, root: Path = Path(JOURNALS)) -> Path:
    """Bring a run's checkpoints here, for as long as this process lives, and check them; the path of the last one.

    Args:
        root: folder of the journals, below which they go.

    Raises:
        PassedOver: the run has none, or was interrupted before the first one was there with its manifest.
        UserError: the server cannot be asked, or what it has is damaged or not what a run stores.
    """
    with ExitStack() as stack:
        try:
            client = connect(uri)
            client.get_run(run_id)
            stored = {item.path: item.file_size or 0 for item in client.list_artifacts(run_id, "checkpoints")}
            if MANIFEST not in stored:
                raise PassedOver(f"run {run_id} has no checkpoint on the server, and no journal in {root}")
            if stored[MANIFEST] > _MOST:
                raise TrackingError(f"run {run_id}: {MANIFEST} has {stored[MANIFEST]} bytes; that is no manifest")
            target = stack.enter_context(scratch(root))
            (target / "checkpoints").mkdir()
            downloads = target / "download"
            downloads.mkdir()
            manifest = _read_manifest(Path(client.download_artifacts(run_id, MANIFEST, str(downloads))), run_id)
            if _LAST not in manifest:
                raise PassedOver(f"run {run_id} has no last.ckpt on the server, and no journal in {root}")
            for path, (file, expected) in manifest.items():
                fetched = Path(client.download_artifacts(run_id, file, str(downloads)))
                if file_sha256(fetched) != expected:
                    raise TrackingError(f"run {run_id}: {file} is damaged (its SHA-256 is not that of the manifest)")
                fetched.replace(target / path)
        except UserError:
            raise
        except Exception as error:  # a store may be of any kind, and has errors of its own
            raise TrackingError(f"run {run_id}: no checkpoint to be had ({first_line(error)})") from None
        atexit.register(stack.pop_all().close)
        return target / _LAST


def _read_manifest(manifest: Path, run_id: str) -> dict[str, tuple[str, str]]:
    """Each checkpoint's file in the store and its SHA-256; anybody who may write to the server may have written it."""
    try:
        entries = json.loads(manifest.read_text())
        return {
            checkpoint_name(path): (checkpoint_name(entry["file"]), str(entry["sha256"]))
            for path, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise TrackingError(f"run {run_id}: {MANIFEST} is damaged") from None


@contextmanager
def told_to_children(found: Resume | None, tracker: MLflowTracker) -> Iterator[None]:
    """Let the processes that Lightning starts go on where this one does, with the same command line, and end with it.

    They also learn where to leave the traceback of a crash.
    """
    os.environ[INHERITED] = json.dumps({**vars(found), "path": str(found.path or "")} if found else None)
    os.environ[JOURNAL] = str(tracker.folder.resolve())
    try:
        with children_end_with_us():  # kill -9 leaves nobody at work
            yield
    finally:
        del os.environ[INHERITED], os.environ[JOURNAL]


def keep_traceback(tracker: MLflowTracker) -> None:
    """In process 0: log the traceback of the exception at hand, and those that others left; there: leave it."""
    import traceback

    text = traceback.format_exc()
    if is_distributed_child():
        journal = os.environ.get(JOURNAL)
        if journal and Path(journal).is_dir():  # process 0 is on this machine, or its disk is shared
            with files.new_file(Path(journal) / f"traceback-{launch().rank}.txt") as file:
                file.write(text)
        return
    tracker.log_text(text, "traceback.txt")
    keep_tracebacks_left(tracker)


def keep_tracebacks_left(tracker: MLflowTracker) -> bool:
    """In process 0: log the tracebacks that others left; whether there are any."""
    found = sorted(tracker.folder.glob("traceback-*.txt"))
    for left in found:
        tracker.log_text(left.read_text(), left.name)
        left.unlink()
    return bool(found)


def split_digests(splits: dict[str, SplitInfo]) -> dict[str, str]:
    return {name: info.sha256 for name, info in splits.items()}


def check_data(found: Resume, splits: dict[str, SplitInfo]) -> None:
    """Raise UserError where the data are not those the run was trained on; names the split and both digests."""
    then, now = found.record.get("data", {}), split_digests(splits)
    for name in sorted(then.keys() | now.keys()):
        if found.path and then.get(name) != now.get(name):
            raise TrackingError(
                f"run {found.run_id} cannot be resumed on other data: split {name} was {_short(then.get(name))}, "
                f"is {_short(now.get(name))}{_file_of(splits.get(name))}; restore the files or start a new run"
            )


def _file_of(info: SplitInfo | None) -> str:
    return f" ({info.file})" if info else ""


def _short(digest: str | None) -> str:
    return f"sha256 {digest[:12]}" if digest else "absent"


def check_config(found: Resume, config: Config) -> None:
    """Raise UserError where ``config`` would make another result than the run's own configuration."""
    now, own = (_by_key(values) for values in (configuration.recorded(config), found.record.get("config", {})))
    for key in configuration.identity(config):
        if key in own and now[key] != own[key]:
            raise TrackingError(
                f"run {found.run_id} was started with {key}={own[key]}, not {now[key]}; leave {key} out"
            )


def _by_key(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with what a description says under a key of its own, as its identity has it."""
    said = configuration.without_place(values.get("task.description"))
    return values | {f"task.description.{key}": value for key, value in said.items()}
