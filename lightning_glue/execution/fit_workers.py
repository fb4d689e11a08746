"""A training in several processes, started for it by a process that may be anything.

Lightning would start that one again with its command line, which a notebook has not, and which would run everything
else in a script once more.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lightning_glue import config as configuration
from lightning_glue import errors
from lightning_glue.config import Config
from lightning_glue.errors import Diverged, Interrupted, UserError
from lightning_glue.execution.job import Fitted, Job
from lightning_glue.execution.local import Group
from lightning_glue.execution.place import Division, places
from lightning_glue.execution.single_job import run_single
from lightning_glue.utils.logs import log


def fit_in_workers(config: Config, resume: str | None, verbose: bool, gpus: int) -> Fitted:
    """Train on ``gpus`` GPUs; 0: in ``trainer.procs`` processes on the CPU.

    Args:
        resume: the run to go on with, as ``--resume`` names it.
        verbose: pass on what the training prints.

    Raises:
        UserError: as :func:`~lightning_glue.training.run.train`; or a process died.
        Interrupted: Ctrl-C; the training was told to stop in order.
    """
    procs = config.trainer.procs
    (place,) = places(Division(workers=1, gpus=gpus, gpus_per_trial=gpus or 1, procs=procs))
    job = Job(configuration.flatten(config), {}, "", resume=resume, shows=verbose)
    runs: list[str] = []
    with tempfile.TemporaryDirectory(prefix="lightning-glue-") as folder:
        group = Group(place, "lightning_glue.execution.fit_job:fit_job", Path(folder) / "log")
        follower = _Follower(group.log, verbose)
        try:
            answer = run_single(group, job, lambda message: runs.append(message["run_id"]), follower.look)
        except KeyboardInterrupt:
            run_id = runs[-1] if runs else ""
            raise Interrupted(how_to_go_on("SIGINT", run_id), run_id) from None
        if answer["event"] == "failed":
            raise _mistake(answer, config, group.last_words())
    return Fitted(answer["run_id"], answer["metrics"], answer["folder"])


def _mistake(answer: dict[str, Any], config: Config, last_words: str) -> UserError:
    """The error of a worker, as it would have been raised here."""
    kind, text = answer["kind"], answer["message"]
    if kind == "diverged":
        return Diverged(text.removeprefix("diverged at "), config.lr)
    if kind == "user":
        found = getattr(errors, answer.get("class", ""), UserError)
        return (found if issubclass(found, UserError) else UserError)(text)
    return UserError(f"the training failed: {text}" + (f"\n{last_words}" if last_words else ""))


class _Follower:
    """Passes on what workers write to their log: warnings to the logger, the rest to standard output if asked for."""

    def __init__(self, path: Path, verbose: bool) -> None:
        self.path, self.verbose, self.done = path, verbose, 0

    def look(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.done)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.done += len(whole + newline)
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith("warning: "):
                log.warning("%s", line.removeprefix("warning: "))
            elif self.verbose:
                print(line, flush=True)


def how_to_go_on(cause: str, run_id: str) -> str:
    if not run_id:
        return f"stopped by {cause} before there was a run"
    return f'stopped by {cause}; lightning_glue.fit(resume="{run_id}") goes on with the run'
