"""The training of a library's call: in the caller's process or in workers, and whatever ends it as an exception."""

from __future__ import annotations

import signal

from lightning_glue.config import Config
from lightning_glue.errors import Interrupted, UserError
from lightning_glue.execution.fit_job import FitCaller, fit
from lightning_glue.execution.fit_workers import fit_in_workers, how_to_go_on
from lightning_glue.execution.job import Fitted
from lightning_glue.training.devices import resolve_devices
from lightning_glue.training.messages import quiet
from lightning_glue.utils.launch import launch


def fit_for_caller(config: Config, resume: str | None, verbose: bool) -> Fitted:
    """Train here, or in workers where there are to be several processes that nobody has started.

    Args:
        resume: a run id, a ``last.ckpt``, ``auto``, or None.

    Raises:
        UserError: nothing can be trained with this configuration on this machine.
        Diverged: the weights ceased to be numbers.
        Interrupted: it was asked to stop, and did so in order.
    """
    quiet()
    devices = resolve_devices(config.trainer)
    if devices.world > 1 and not launch().complete:
        return fit_in_workers(config, resume, verbose, devices.world if devices.accelerator == "cuda" else 0)
    caller = FitCaller(resume, verbose)
    try:
        return fit(config, caller)
    except SystemExit as stop:
        code = stop.code
    if not isinstance(code, int) or 0 < code <= 128:
        raise UserError(f"the training ended with exit code {code}")
    cause = signal.Signals(code - 128).name if code else "process 0"  # whom the other processes follow
    raise Interrupted(how_to_go_on(cause, caller.run_id), caller.run_id)
