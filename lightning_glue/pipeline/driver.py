"""Gives out the jobs of a benchmark: each the moment what it needs is done, to a free slot, the most urgent first.

The driver trains nothing itself, so a job may crash in any way without taking it along. What is done is what the ledger
says; several drivers, on one machine or many, share a benchmark through it and through a lock for each job.
"""

from __future__ import annotations

import selectors
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

from lightning_glue.errors import UserError
from lightning_glue.execution.channel import Message
from lightning_glue.execution.executor import Executor, readable, stop, stop_signals
from lightning_glue.execution.job import Job
from lightning_glue.pipeline.drivers import claim
from lightning_glue.pipeline.graph import Graph, Node, Standing, standing
from lightning_glue.pipeline.ledger import Ledger
from lightning_glue.pipeline.teams import Team, wanted

_FINAL = ("user", "memory", "diverged")  # kinds of failure that would come again
_STILLBORN = 3  # deaths in a row before the first job, after which something other than a job must be wrong
_GRACE_SECONDS = 60.0  # for trainings that are told to stop: the step, the checkpoint, the last records


@dataclass
class Running:
    """A job on a team.

    Attributes:
        finished: processes that are through with it.
        of: what it is made from, see :mod:`lightning_glue.pipeline.ledger`.
    """

    node: Node
    team: Team
    of: dict[str, str]
    claim: ExitStack
    since: float = field(default_factory=time.time)
    run_id: str = ""
    finished: int = 0
    outcome: Message = field(default_factory=dict)


class Observer(Protocol):
    """Is told what happens; must return soon."""

    def looked(self, running: list[Running]) -> None:
        """Twice a second."""

    def started(self, running: Running) -> None: ...

    def ended(self, running: Running, state: str, why: str) -> None:
        """Args: state: ``done``, ``died``, ``failed`` or ``stopped``."""


class Driver:
    """Args:
    make_job: of a node, on a team.
    retries: times a job whose process died is tried again.
    """

    def __init__(
        self,
        folder: Path,
        graph: Graph,
        ledger: Ledger,
        teams: Sequence[Team],
        make_job: Callable[[Node, Team], Job],
        observer: Observer,
        *,
        retries: int,
    ) -> None:
        self.folder, self.graph, self.ledger, self.teams = folder, graph, ledger, teams
        self.make_job, self.observer, self.retries = make_job, observer, retries
        self.running: list[Running] = []
        self.selector = selectors.DefaultSelector()
        self.stopped_by: signal.Signals | None = None
        self._of_group = {id(team.group): team for team in teams}

    def run(self) -> None:
        """Work until nothing can be done any more, here or elsewhere, or a signal comes; leaves no process behind.

        Raises:
            KeyboardInterrupt: the second Ctrl-C; all has ended at once.
        """
        with stop_signals(self._stop):
            try:
                while not self.stopped_by and self._assign():
                    for group, rank in readable(self.selector, 0.5):
                        self._read(self._of_group[id(group)], rank)
                    self.observer.looked(self.running)
            finally:
                self._end_all()

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self.stopped_by:
            raise KeyboardInterrupt  # the second time: at once
        self.stopped_by = signal.Signals(number)

    def _end_all(self) -> None:
        groups = [team.group for team in self.teams]
        try:
            if self.running:
                stop(groups, self.selector, _GRACE_SECONDS, self._heard_at_the_end)
        finally:
            stop(groups, self.selector, grace=0)
            for running in list(self.running):
                self._over(running, "stopped")

    def _assign(self) -> bool:
        """Give idle slots their jobs; False when nothing is left to do, here or elsewhere."""
        self.ledger.refresh()
        found = self._standing()
        mine = {running.node.name for running in self.running}
        starting: set[int] = set()
        for name in found.ready:
            team = None if name in mine else self._team_for(self.graph[name], starting)
            if team and team.ready < team.group.place.processes:
                if self._is_free(name):
                    starting |= team.slots  # it is this job's as soon as its processes are there
                    self._start(team)
            elif team:
                self._begin(self.graph[name], team)
        return bool(found.open or self.running)

    def _standing(self) -> Standing:
        return standing(self.graph, self.ledger.done(self.graph), self.ledger.failed(self.graph))

    def _is_free(self, job: str) -> bool:
        with claim(self.folder, job) as free:
            return free

    def _team_for(self, node: Node, starting: set[int]) -> Team | None:
        """An idle team for a job: of the best kind there is, one that is warm before others."""
        taken = starting.union(*(running.team.slots for running in self.running))
        idle = [team for team in self.teams if not team.slots & taken]
        for kind in wanted(node):
            suitable = [team for team in idle if team.suits == kind]
            if suitable:
                return max(suitable, key=lambda team: (team.ready, bool(team.group.processes)))
        return None

    def _start(self, team: Team) -> None:
        """Start a team's processes, unless they are starting; those of idle teams on its slots go."""
        if team.group.processes:
            return
        others = [one for one in self.teams if one is not team and one.slots & team.slots and one.group.processes]
        self._end(*others)
        team.group.start()
        team.group.register(self.selector)

    def _begin(self, node: Node, team: Team) -> None:
        """Send a job to a team, unless another driver has it or has done it."""
        with ExitStack() as attempt:
            if not attempt.enter_context(claim(self.folder, node.name)):
                return
            self.ledger.refresh()
            if node.name not in self._standing().ready:
                return
            if self.ledger.entry(node.name).attempts > self.retries:  # its drivers die with it
                self.ledger.append(node.name, "failed", kind="died", message="every driver that had it died")
                return
            running = Running(node, team, self.ledger.inputs(self.graph, node.name), attempt.pop_all())
        self.running.append(running)
        self.ledger.append(node.name, "started", slot=team.name, devices=max(1, len(team.slots)))
        team.group.send({"job": asdict(self.make_job(node, team))})
        self.observer.started(running)

    def _read(self, team: Team, rank: int) -> None:
        messages = team.group.channels[rank].receive()
        if messages is None:
            self._died(team)
            return
        for message in messages:
            if not team.group.processes:  # ended by the message before
                return
            if message["event"] == "ready":
                team.ready, team.stillborn = team.ready + 1, 0
            elif running := self._at(team):
                self._heard(running, rank, message)
            elif message["event"] == "failed":  # its node is not like this one, for instance
                raise UserError(message["message"])

    def _at(self, team: Team) -> Running | None:
        return next((running for running in self.running if running.team is team), None)

    def _heard_at_the_end(self, group: Executor, rank: int, message: Message) -> None:
        """While all is stopped: a job may come to its own end yet; a failure is most likely the stop's."""
        running = self._at(self._of_group[id(group)])
        if running and message["event"] in ("run", "done"):
            self._heard(running, rank, message)

    def _heard(self, running: Running, rank: int, message: Message) -> None:
        match message["event"]:
            case "run":
                running.run_id = message["run_id"]
                self.ledger.append(running.node.name, "run", run_id=running.run_id)
            case "done":
                running.finished += 1
                running.outcome = message if rank == 0 else running.outcome
                if running.finished == running.team.group.place.processes:
                    self._over(running, "done")
            case "failed":
                self._failed(running, message["kind"], message["message"])

    def _died(self, team: Team) -> None:
        reason, running = team.group.exit_reason(), self._at(team)
        team.stillborn += team.ready < team.group.place.processes
        self._end(team)
        if running:
            self._retry(running, reason)
        elif team.stillborn >= _STILLBORN:
            raise UserError(f"no job can be run: {reason}; {team.group.log} ends with\n{team.group.last_words()}")

    def _failed(self, running: Running, kind: str, reason: str) -> None:
        if running.team.group.place.processes > 1 or kind == "error":
            self._end(running.team)  # its other processes hang, or its state is unknown
        if kind in _FINAL:
            self._over(running, "failed", reason, kind)
        else:
            self._retry(running, reason)

    def _retry(self, running: Running, reason: str) -> None:
        again = self.ledger.entry(running.node.name).attempts <= self.retries
        self._over(running, "died" if again else "failed", reason, "died")

    def _over(self, running: Running, state: str, why: str = "", kind: str = "") -> None:
        """A job is at its end, this time at least."""
        more: dict[str, object] = {"slot": running.team.name, "seconds": round(time.time() - running.since, 3)}
        if state == "done":
            run_id, metrics = running.outcome.get("run_id", ""), running.outcome.get("metrics", {})
            more |= {"id": uuid.uuid4().hex, "of": running.of, "run_id": run_id, "metrics": metrics}
        elif why:
            more |= {"kind": kind, "message": why}
        self.running.remove(running)
        with running.claim:  # given free once the ledger has it
            self.ledger.append(running.node.name, state, **more)
        self.observer.ended(running, state, why)

    def _end(self, *teams: Team) -> None:
        stop([team.group for team in teams], self.selector, grace=0)
        for team in teams:
            team.ready = 0
