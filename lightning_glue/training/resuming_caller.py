"""A caller of a training that says what is trained, and finds the run to go on with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_glue.config import Config
from lightning_glue.training.messages import announce
from lightning_glue.training.run import Caller, Training
from lightning_glue.utils.launch import is_distributed_child

if TYPE_CHECKING:
    from lightning_glue.training.resume import Resume


class ResumingCaller(Caller):
    """As the command has it.

    Args:
        resume: the run to continue: its id, its last checkpoint, or ``auto`` for the newest one of this configuration,
            if there is one; None: a new run.
    """

    def __init__(self, resume: str | Resume | None, shows: bool = True) -> None:
        self.resume, self.shows = resume, shows

    def find(self, config: Config) -> Resume | None:
        from lightning_glue.training.resume import check_config, find

        found = find(self.resume, config) if isinstance(self.resume, str) else self.resume
        if found:
            check_config(found, config)
        return found

    def built(self, training: Training) -> None:
        from lightning_glue.training.resume import check_data

        if is_distributed_child():
            return
        if self.shows:
            announce(training.config, training.data, self.resume, training.found)
        if training.found:
            check_data(training.found, training.data.prepared.splits)
