"""The true final status of a run, whatever ends it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_glue.errors import Diverged
from lightning_glue.training.messages import how_to_go_on
from lightning_glue.training.preemption import Preemption, Stopped
from lightning_glue.utils.launch import is_distributed_child
from lightning_glue.utils.logs import log
from lightning_glue.utils.redact import first_line

if TYPE_CHECKING:
    from lightning_glue.tracking.logger import MLflowTracker


@contextmanager
def run_status(tracker: MLflowTracker, register: bool, preemption: Preemption, *, kept: bool = True) -> Iterator[None]:
    """Give the run its true final status: FINISHED, KILLED (a request to stop) or FAILED with the tracebacks.

    Args:
        register: the model of a finished run.
        kept: whether checkpoints outlive the training.
    """
    from lightning_glue.training.resume import keep_traceback, keep_tracebacks_left

    try:
        yield
        preemption.check()
    except (KeyboardInterrupt, SystemExit) as stop:
        if is_distributed_child():
            sys.exit(0)  # Lightning kills process 0 when another one ends with an error
        crashed = _attempted(lambda: keep_tracebacks_left(tracker))
        _attempted(lambda: tracker.finish("FAILED" if crashed else "KILLED"))
        cause = stop.signal if isinstance(stop, Stopped) else signal.SIGINT
        log.info("stopped by %s; run: %s", cause.name, tracker.describe())
        log.info("%s", how_to_go_on(tracker.run_id, preemption.saved_step if kept else None))
        sys.exit(128 + cause)
    except Diverged as error:
        where = error.where
        _attempted(lambda: tracker.set_tags({"diverged": where}))
        _attempted(lambda: tracker.finish("FAILED"))
        raise
    except BaseException:
        _attempted(lambda: keep_traceback(tracker))
        _attempted(lambda: tracker.finish("FAILED"))
        raise
    try:
        with preemption.acting_at_once():
            tracker.finish("FINISHED", register)
    except Stopped as stop:
        log.info("stopped by %s when all was done; run: %s", stop.signal.name, tracker.describe())
        raise


def _attempted(action: Callable[[], Any]) -> Any:
    """What an action at the end of a run gives; what hinders it, most likely what ended the run, hinders no other."""
    try:
        return action()
    except Exception as error:
        log.info("the run's end could not be written in full: %s", first_line(error))
        return None
