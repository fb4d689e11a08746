"""One job on a group of worker processes that is started for it and ends with it."""

from __future__ import annotations

import selectors
from collections.abc import Callable
from dataclasses import asdict

from lightning_glue.execution.channel import Message
from lightning_glue.execution.executor import Executor, stop
from lightning_glue.execution.job import Job

_GRACE_SECONDS = 60.0  # for a training that is told to stop: the step, the checkpoint, the last records


def run_single(group: Executor, job: Job, heard: Callable[[Message], None], look: Callable[[], None]) -> Message:
    """Train ``job``; leaves no process behind.

    Args:
        heard: is called with what process 0 says meanwhile.
        look: is called twice a second.

    Returns:
        The event ``done`` of process 0, or the first ``failed``: of kind ``died`` where a process ended by itself.

    Raises:
        KeyboardInterrupt: Ctrl-C; the training was told to stop in order. A second one ends it at once.
    """
    selector = selectors.DefaultSelector()
    try:
        group.start()
        group.register(selector)
        return _watch(group, job, selector, heard, look)
    except KeyboardInterrupt:
        stop([group], selector, _GRACE_SECONDS)
        raise
    finally:
        stop([group], selector, grace=0)
        look()
        selector.close()


def _watch(
    group: Executor,
    job: Job,
    selector: selectors.BaseSelector,
    heard: Callable[[Message], None],
    look: Callable[[], None],
) -> Message:
    ready, done, outcome = 0, 0, Message()
    while done < group.place.processes:
        for key, _ in selector.select(timeout=0.5):
            _, rank = key.data
            messages = group.channels[rank].receive()
            if messages is None:
                return {"event": "failed", "kind": "died", "message": group.exit_reason()}
            for message in messages:
                match message["event"]:
                    case "ready":
                        ready += 1
                        if ready == group.place.processes:
                            group.send({"job": asdict(job)})
                    case "done":
                        done += 1
                        outcome = message if rank == 0 else outcome
                    case "failed":
                        return message
                    case _:
                        heard(message)
        look()
    return outcome
