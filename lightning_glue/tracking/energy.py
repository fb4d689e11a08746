"""The energy that a run's GPUs took, from the samples of their power that MLflow keeps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

GPUS = "resolved.gpus"  # tag of a run: numbers of its GPUs on its machine
_POWER = re.compile(r"system/gpu_([0-9]{1,3})_power_usage_watts")  # of every GPU of the machine, as NVML numbers them
_MS_PER_HOUR = 3_600_000


def watt_hours(samples: Sequence[tuple[int, float]], start: int, end: int) -> float:
    """Power over time, by the trapezoidal rule; before the first sample and after the last one, that of these.

    Args:
        samples: time in milliseconds, watts.
        start, end: of the run, in milliseconds.
    """
    known = sorted((time, watts) for time, watts in samples if start <= time <= end)
    if not known:
        return 0.0
    points = [(start, known[0][1]), *known, (end, known[-1][1])]
    pairs = pairwise(points)
    return sum((later - earlier) * (one + two) / 2 for (earlier, one), (later, two) in pairs) / _MS_PER_HOUR


def energy(client: MlflowClient, run: Run) -> float | None:
    """Watt hours of the GPUs that a finished run was made on, while it was; a request for each GPU.

    What others did there meanwhile is in it. None where there are no samples, or nothing says which GPUs these were.
    """
    there = {int(match[1]): name for name in run.data.metrics if (match := _POWER.fullmatch(name))}
    named = run.data.tags.get(GPUS, "")
    own = [int(one) for one in named.split(",")] if re.fullmatch(r"[0-9]{1,3}(,[0-9]{1,3})*", named) else []
    names = [there[one] for one in own if one in there]
    if not names or len(names) != len(own) or run.info.end_time is None:
        return None
    total = 0.0
    for name in names:
        samples = [(one.timestamp, one.value) for one in client.get_metric_history(run.info.run_id, name)]
        total += watt_hours(samples, run.info.start_time, run.info.end_time)
    return total
