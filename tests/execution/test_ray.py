"""Slots of a real Ray cluster of three nodes: what they say, and what becomes of them."""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.project import ROOT
from helpers.ray_cluster import RayNodes

from lightning_glue.errors import UserError
from lightning_glue.execution.channel import Message
from lightning_glue.execution.engines import Engine, open_engine
from lightning_glue.execution.executor import Executor, stop
from lightning_glue.execution.place import Division

NODES = 3


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("project"))
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        patch.setenv("MLFLOW_TRACKING_URI", "http://tracking")
        nodes = RayNodes(NODES, cpus=1)
        try:
            yield nodes
        finally:
            nodes.stop()


@pytest.fixture(scope="module")
def engine(nodes: RayNodes) -> Iterator[Engine]:
    with open_engine("ray", nodes.address) as engine:
        yield engine


def make_groups(engine: Engine, workers: int | None) -> list[Any]:
    return [*engine.groups(Division(workers=workers), "helpers.cheap:tells_itself", Path("logs"))]


class Talk:
    """Groups and what they have said."""

    def __init__(self, groups: list[Any]) -> None:
        self.groups, self.selector = groups, selectors.DefaultSelector()
        self.said: dict[int, list[Message | None]] = {group.place.number: [] for group in groups}

    def start(self, group: Executor) -> None:
        group.start()
        group.register(self.selector)

    def hear(self, group: Executor, event: str | None, seconds: float = 120) -> Message:
        """Listen to all until this group has said ``event``; None: until it is dead."""
        deadline, said = time.monotonic() + seconds, self.said[group.place.number]
        while True:
            for message in said:
                if (message and message["event"]) == event:
                    said.remove(message)
                    return message or {}
            assert time.monotonic() < deadline, said
            for key, _ in self.selector.select(timeout=1):
                who, rank = key.data
                messages = who.channels[rank].receive()
                self.said[who.place.number] += [None] if messages is None else messages
                if messages is None:
                    self.selector.unregister(key.fileobj)

    def job(self, group: Executor, **config: Any) -> tuple[int, int]:
        """Send a job; process and actor."""
        group.send({"job": {"config": config, "tags": {}, "checkpoints": ""}})
        worker, actor = self.hear(group, "run")["run_id"].split()
        return int(worker), int(actor)

    def finish(self, group: Executor, **config: Any) -> tuple[int, Message]:
        worker, _ = self.job(group, **config)
        assert self.hear(group, "report")["value"] == 0.5
        group.send_to(0, {"prune": True})
        return worker, self.hear(group, "done")


@pytest.fixture(scope="module")
def talk(engine: Engine) -> Iterator[Talk]:
    talk = Talk(make_groups(engine, None))
    for group in talk.groups:
        talk.start(group)
    for group in talk.groups:
        talk.hear(group, "ready")
    yield talk
    stop(talk.groups, talk.selector, grace=0)


def gone(*processes: int) -> bool:
    return psutil.wait_procs([psutil.Process(one) for one in processes if psutil.pid_exists(one)], timeout=20)[1] == []


@pytest.mark.torture
def test_every_node_has_a_slot_whose_process_is_warm_and_has_the_drivers_folder_and_variables(talk: Talk) -> None:
    assert len({group.node for group in talk.groups}) == len(talk.groups) == NODES
    workers = []
    for group in talk.groups:
        worker, done = talk.finish(group)
        workers.append(worker)
        assert done["pruned"] and done["data"]["cwd"] == os.getcwd()
        assert done["data"]["MLFLOW_TRACKING_URI"] == "http://tracking"
    assert talk.finish(talk.groups[0])[0] == workers[0]
    assert len(set(workers)) == NODES


@pytest.mark.torture
def test_a_group_without_a_place_waits_for_one_and_ends_when_it_is_told_to(
    talk: Talk, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    (more,) = make_groups(engine, NODES + 1)[NODES:]
    caplog.set_level("INFO", logger="lightning_glue")
    more.start()
    deadline = time.monotonic() + 60
    while not any("slot 3 waits for a node with 1 CPU free" in message for message in caplog.messages):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert more.is_running()
    stop([more], selectors.DefaultSelector(), grace=30)
    assert not more.processes


@pytest.mark.torture
def test_a_process_that_dies_says_how_and_is_started_again_on_its_node(talk: Talk) -> None:
    group = talk.groups[0]
    node, (worker, _) = group.node, talk.job(group, then="die")
    talk.hear(group, None)
    assert group.exit_reason() == "process 0 was ended by SIGKILL"
    stop([group], talk.selector, grace=0)
    talk.start(group)
    talk.hear(group, "ready")
    assert group.node == node and talk.finish(group)[0] != worker


@pytest.mark.torture
def test_an_actor_that_is_killed_takes_its_process_along(talk: Talk) -> None:
    group = talk.groups[0]
    worker, actor = talk.job(group, then="sleep")
    assert "Slot" in " ".join(psutil.Process(actor).cmdline())
    os.kill(actor, signal.SIGKILL)
    assert gone(worker)
    talk.hear(group, None)
    assert group.exit_reason().startswith(f"the actor of slot 0 on node {group.node} ended: ")
    stop([group], talk.selector, grace=0)


@pytest.mark.torture
def test_another_version_on_a_node_is_refused(talk: Talk, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_glue.__version__", "0.0.9")  # here; the place is that of the test before
    other = Talk(make_groups(engine, 1))
    other.start(other.groups[0])
    said = other.hear(other.groups[0], "failed")
    assert said["kind"] == "user"
    node = other.groups[0].node
    assert f"node {node} has lightning_glue " in said["message"] and "but 0.0.9 is here" in said["message"]
    stop(other.groups, other.selector, grace=0)


@pytest.mark.torture
def test_a_node_that_leaves_is_a_death_and_the_group_goes_elsewhere(talk: Talk, nodes: RayNodes) -> None:
    group = talk.groups[2]
    node, (worker, _) = group.node, talk.job(group, then="sleep")
    nodes.kill(nodes.named(node))
    talk.hear(group, None)
    assert gone(worker)
    assert group.exit_reason() == f"node {node} left the cluster"
    stop([group], talk.selector, grace=0)
    talk.start(group)  # where the slot was that the tests above have left
    talk.hear(group, "ready")
    assert group.node not in (node, talk.groups[1].node)
    assert talk.finish(group)[1]["pruned"]


def test_an_address_that_cannot_be_used_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="expected host:port"), open_engine("ray", "ray://h:1"):
        pass
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match="anybody could run code"), open_engine("ray", "127.0.0.1:9"):
        pass
