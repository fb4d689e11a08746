"""The shared study: an exact queue, heartbeats, retries, on every kind of storage, with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from helpers.control import SPACE, control, share
from helpers.postgres import Postgres
from helpers.project import ROOT, torture
from helpers.zygote import FORKED
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from lightning_glue.errors import UserError
from lightning_glue.tuning.heartbeat import STALE_BEATS
from lightning_glue.tuning.slots import Slots, is_surplus, slot_of
from lightning_glue.tuning.storage import open_storage
from lightning_glue.tuning.strategy import make_pruner, make_sampler
from lightning_glue.tuning.study import AHEAD, SharedStudy


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture(autouse=True)
def quiet_and_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")


@pytest.fixture(params=["journal", torture("sqlite")])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}" if request.param == "sqlite" else str(tmp_path / "study.journal")


def start_controller(storage: str, total: int, objective: str = "objective", **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "helpers.control", storage, "cheap", str(total), objective]
    return subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)


def finish(controllers: list[subprocess.Popen], seconds: float = 240) -> None:
    for controller in controllers:
        _, errors = controller.communicate(timeout=seconds)
        assert controller.returncode == 0, errors


def stored_trials(storage: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="cheap", storage=open_storage(storage)).trials


def children(pid: int) -> set[int]:
    import psutil

    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def gone(pids: set[int], seconds: float = 40) -> bool:
    import psutil

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.1)
    return False


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_the_queue_is_exact_and_starts_with_the_given_parameters(storage: str) -> None:
    study = share(storage, "queue", None)
    study.fill_queue(4, [{"x": 0.25}])
    study.fill_queue(4, [{"x": 0.25}])  # asked again: nothing is missing
    claimed = [study.claim(SPACE) for _ in range(5)]
    assert claimed[0].params == {"x": 0.25}
    assert [trial and trial.number for trial in claimed] == [0, 1, 2, 3, None]
    assert len({trial.params["x"] for trial in claimed[:4]}) == 4
    for trial in claimed[:4]:
        assert study.finish(trial._trial_id, TrialState.COMPLETE, trial.params["x"])
    assert not study.finish(claimed[0]._trial_id, TrialState.FAIL)  # finished trials stay as they are
    share(storage, "queue", 6)
    assert len(share(storage, "queue", 6).trials(TrialState.WAITING)) == 2


def test_a_failed_trial_is_queued_again_with_what_it_has_reached(storage: str) -> None:
    study = share(storage, "retry", 1, retries=1)
    first = study.claim(SPACE)
    study.report(first._trial_id, 1, 0.5)
    study.set_trial_attribute(first._trial_id, "runs", ["abc"])
    assert study.fail(first._trial_id, "killed", again=True)
    second = study.claim(SPACE)
    assert second.params == first.params
    known = study.trial(second._trial_id)
    assert known.intermediate_values == {1: 0.5}
    assert (known.user_attrs["retry_of"], known.user_attrs["runs"]) == (0, ["abc"])
    assert not study.fail(second._trial_id, "killed", again=True)  # retries=1
    assert study.claim(SPACE) is None
    assert [trial.state for trial in study.trials()] == [TrialState.FAIL] * 2


@pytest.mark.parametrize("drawn", [False, True])
def test_a_retry_keeps_what_was_queued_for_it(storage: str, drawn: bool) -> None:
    study = share(storage, "queued", None, retries=1)
    study.fill_queue(1, [{"x": 0.125}])
    if drawn:
        trial_id = study.claim(SPACE)._trial_id
    else:  # its controller died between owning it and drawing
        trial_id = study.trials()[0]._trial_id
        study.storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    assert study.fail(trial_id, "killed", again=True)
    assert study.claim(SPACE).params == {"x": 0.125}


GRID = [{"x": x, "y": y} for x in (1, 2, 3) for y in (16, 32)]
POINTS = {"x": CategoricalDistribution([1, 2, 3]), "y": CategoricalDistribution([16, 32])}


@pytest.mark.parametrize("lost", range(6))
def test_a_grid_tries_a_failed_point_again_and_no_other(storage: str, lost: int) -> None:
    study = share(storage, "grid", None, retries=0)
    study.fill_queue(6, GRID)
    for number, point in enumerate(GRID):
        trial = study.claim(POINTS)
        assert trial.params == point
        if number == lost:
            assert not study.fail(trial._trial_id, "killed", again=True)
        else:
            study.finish(trial._trial_id, TrialState.COMPLETE, 0.5)
    assert study.left() == (0, False)  # the same command does not try it again
    again = share(storage, "grid", None, retries=0)
    again.fill_queue(6, GRID)
    assert again.claim(POINTS).params == GRID[lost]
    assert again.claim(POINTS) is None


def test_fewer_trials_than_before_are_all_that_is_done(storage: str) -> None:
    share(storage, "fewer", 6)
    study = share(storage, "fewer", None)
    assert study.asked_for() == 6
    study.fill_queue(2, [], grows=False)
    for _ in range(2):
        study.finish(study.claim(SPACE)._trial_id, TrialState.COMPLETE, 0.5)
    assert study.claim(SPACE) is None
    assert study.left() == (0, False)
    assert share(storage, "fewer", 6).left()[0] == 4


@pytest.mark.parametrize("kind", ["sqlite", torture("journal"), torture("postgresql")])
def test_a_trial_has_one_owner_however_many_reach_for_it(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = {"sqlite": f"sqlite:///{tmp_path / 'study.db'}", "journal": str(tmp_path / "study.journal")}.get(kind)
    url = url or request.getfixturevalue("postgres").new_database("owners")
    storage = open_storage(url)
    study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "owners")
    waiting = optuna.trial.create_trial(state=TrialState.WAITING)
    trials = [storage.create_new_trial(study_id, waiting) for _ in range(40)]
    together = threading.Barrier(4)

    def reach() -> list[int]:
        mine, own = open_storage(url), []
        for trial in trials:
            together.wait(60)
            own += [trial] if mine.set_trial_state_values(trial, TrialState.RUNNING) else []
        return own

    with ThreadPoolExecutor(4) as pool:
        owned = [trial for done in [pool.submit(reach) for _ in range(4)] for trial in done.result(timeout=120)]
    assert sorted(owned) == trials


def work(storage: str, name: str, total: int, begin: threading.Barrier) -> None:
    """A controller whose trials take no time."""
    study = share(storage, name, None)
    begin.wait(60)
    study.fill_queue(total, [])
    while True:
        trial = study.claim(SPACE)
        if trial:
            study.finish(trial._trial_id, TrialState.COMPLETE, trial.params["x"])
        elif study.left() == (0, False):
            return


def work_together(storage: str, name: str, total: int, controllers: int) -> list[optuna.trial.FrozenTrial]:
    """Several controllers ask for ``total`` trials at the same moment; those that count."""
    begin = threading.Barrier(controllers)
    with ThreadPoolExecutor(controllers) as pool:
        for done in [pool.submit(work, storage, name, total, begin) for _ in range(controllers)]:
            done.result(timeout=120)
    trials = optuna.load_study(study_name=name, storage=open_storage(storage)).trials
    assert [trial.number for trial in trials] == list(range(len(trials)))
    for trial in trials:
        assert trial.state == TrialState.COMPLETE or is_surplus(trial)
        assert trial.state == TrialState.COMPLETE or "heartbeat" not in trial.user_attrs  # it never ran
    return [trial for trial in trials if trial.state == TrialState.COMPLETE]


@pytest.mark.parametrize("kind", ["journal", torture("sqlite"), torture("postgresql")])
def test_controllers_that_raise_the_number_of_trials_at_once_get_exactly_that(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    storage = {"sqlite": f"sqlite:///{tmp_path / 'study.db'}", "journal": str(tmp_path / "study.journal")}.get(kind)
    storage = storage or request.getfixturevalue("postgres").new_database("raised")
    assert len(work_together(storage, "raised", 10, controllers=1)) == 10
    assert len(work_together(storage, "raised", 50, controllers=2)) == 50
    trials = work_together(storage, "raised", 70, controllers=4)
    assert len(trials) == 70
    assert sorted(slot_of(trial) for trial in trials) == list(range(70))
    assert len({trial.params["x"] for trial in trials}) == 70  # no two draw the same


def test_a_search_draws_the_same_whatever_the_number_of_controllers(storage: str) -> None:
    def drawn(name: str, controllers: int) -> dict[int, float]:
        return {trial.number: trial.params["x"] for trial in work_together(storage, name, 24, controllers)}

    alone, shared = drawn("alone", 1), drawn("shared", 2)
    assert {number: shared[number] for number in alone.keys() & shared.keys()} == alone


def test_two_controllers_that_queue_the_same_slot_run_one_trial(storage: str) -> None:
    one, other = share(storage, "same-slot", 1), share(storage, "same-slot", 1)
    one._make(Slots([]), 0)  # as if it had looked before the first was there
    assert len(one.trials(TrialState.WAITING)) == 2
    assert other.claim(SPACE).number == 0
    assert one.claim(SPACE) is None
    assert [is_surplus(trial) for trial in one.trials()] == [False, True]


@pytest.mark.torture
def test_a_maker_that_dies_over_the_queue_leaves_nothing_out(storage: str) -> None:
    code = (
        "import os; from helpers.control import *; made = []; real = SharedStudy._make\n"
        "def make(self, slots, slot):\n"
        "    real(self, slots, slot); made.append(slot); len(made) == 3 and os.kill(os.getpid(), 9)\n"
        f"SharedStudy._make = make; share({storage!r}, 'maker', 20)"
    )
    subprocess.run([sys.executable, "-c", FORKED + code], check=False)
    assert len(optuna.load_study(study_name="maker", storage=open_storage(storage)).trials) == 3
    assert len(work_together(storage, "maker", 20, controllers=2)) == 20


def test_few_trials_wait_however_many_are_to_come(storage: str) -> None:
    study = share(storage, "long", 3000)
    assert len(study.trials()) == AHEAD
    assert study.left() == (3000, False)
    study.claim(SPACE)
    assert len(study.trials(TrialState.WAITING)) == AHEAD


def test_a_trial_that_ends_is_read_alone_and_the_next_one_taken_unread(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_glue.tuning.study._LOOK_SECONDS", float("inf"))
    study = share(storage, "unread", 40)
    trial = study.claim(SPACE)
    study.finish(trial._trial_id, TrialState.COMPLETE, trial.params["x"])
    looks: list[object] = []
    monkeypatch.setattr(study.storage, "get_all_trials", lambda *said, **named: looks.append(said))
    ended = study.ended(trial._trial_id)
    assert (ended.state, ended.value) == (TrialState.COMPLETE, trial.params["x"])
    assert study.slots.best == ended
    assert study.claim(SPACE).number == trial.number + 1
    assert not looks


def test_the_end_of_a_long_trial_shows_what_others_did_meanwhile(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_glue.tuning.study._LOOK_SECONDS", 0.0)  # the last look is long ago
    study, other = share(storage, "meanwhile", 4), share(storage, "meanwhile", 4)
    trial, another = study.claim(SPACE), other.claim(SPACE)
    other.finish(another._trial_id, TrialState.COMPLETE, 2.0)
    study.finish(trial._trial_id, TrialState.COMPLETE, 1.0)
    assert study.ended(trial._trial_id).value == 1.0
    assert (study.slots.counts[TrialState.COMPLETE], study.slots.best.number) == (2, another.number)


def test_a_trial_says_only_what_there_is_to_say(storage: str) -> None:
    study = share(storage, "terse", 4)
    control(study, "noisy").run()
    for trial in study.trials(TrialState.COMPLETE):
        noted = {"slot", "heartbeat", *(["collapsed"] if trial.params["x"] < 0.2 else [])}  # a transaction each
        assert set(trial.user_attrs) == noted


def test_a_study_is_known_by_its_id_not_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_glue.tuning.study._STANDSTILL_SECONDS", 0.5)
    dead, new = (share(str(tmp_path / f"{name}.journal"), "same", 1) for name in ("dead", "new"))
    assert dead.id != new.id
    assert share(str(tmp_path / "new.journal"), "same", 1).id == new.id
    old = optuna.create_study(study_name="old", storage=open_storage(str(tmp_path / "o.journal")), direction="maximize")
    old.set_user_attr("space", {"x": "0 to 1"})  # made by a version that gave none
    assert len({share(str(tmp_path / "o.journal"), "old", 1).id for _ in range(3)}) == 1


def test_an_interruption_costs_no_retry(storage: str) -> None:
    study = share(storage, "interrupt", 1, retries=0)
    for _ in range(3):
        study.claim(SPACE)
        study.interrupt()
    assert study.claim(SPACE).number == 3


def test_a_trial_of_a_dead_process_of_this_machine_is_found_at_once(storage: str) -> None:
    share(storage, "dead", 1)
    code = "import os; from helpers.control import *; s=share({!r}, 'dead', 1); s.claim(SPACE); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", FORKED + code.format(storage)], check=False)
    study = share(storage, "dead", 1)
    assert [trial.number for trial in study.reap()] == [0]
    assert study.claim(SPACE).number == 1


def test_a_silent_trial_of_another_machine_is_given_up_after_four_heartbeats(storage: str) -> None:
    heartbeat = 0.5
    study, other = (share(storage, "silent", 2, heartbeat=heartbeat) for _ in range(2))
    silent, talking = other.claim(SPACE), other.claim(SPACE)
    deadline = time.monotonic() + STALE_BEATS * heartbeat * 10
    given_up: list[int] = []
    beat = 0
    while time.monotonic() < deadline and not given_up:
        beat += 1
        study.set_trial_attribute(silent._trial_id, "heartbeat", "elsewhere 1 1")
        study.set_trial_attribute(talking._trial_id, "heartbeat", f"elsewhere 1 {beat}")
        given_up = [trial.number for trial in study.reap()]
        time.sleep(heartbeat / 2)
    assert given_up == [silent.number]
    # Its controller was only slow: it learns that the trial is no longer its own, and loses nothing else.
    assert not other.beat(silent._trial_id)
    assert other.report(silent._trial_id, 1, 0.5)
    assert not other.finish(silent._trial_id, TrialState.COMPLETE, 0.5)
    assert other.beat(talking._trial_id)


def test_the_silence_of_others_is_not_counted_while_the_storage_was_away(storage: str) -> None:
    study, other = (share(storage, "outage", 2, heartbeat=0.2) for _ in range(2))
    trial = other.claim(SPACE)
    study.set_trial_attribute(trial._trial_id, "heartbeat", "elsewhere 1 1")
    assert study.reap() == []
    away, real = [True], study.storage.get_all_trials

    def get_all_trials(*args, **options):  # the storage is away for longer than a trial may be silent
        if away and (away.clear() or True):
            time.sleep(STALE_BEATS * 0.2 * 1.5)
            raise optuna.exceptions.StorageInternalError("the connection was closed")
        return real(*args, **options)

    study.storage.get_all_trials = get_all_trials
    assert study.reap() == []
    time.sleep(STALE_BEATS * 0.2 * 1.5)  # nor while this controller itself was held up
    assert study.reap() == []
    deadline = time.monotonic() + 20
    while not study.reap():  # silent all the same
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_another_configuration_under_the_same_name_is_refused(storage: str) -> None:
    share(storage, "same", 1)
    sampler, pruner = make_sampler("random", 1), optuna.pruners.NopPruner()
    with pytest.raises(UserError, match=r"study 'same' was made with another space: x is 0 to 1 there, 0 to 2 here"):
        SharedStudy("same", open_storage(storage), sampler, pruner, {"space": {"x": "0 to 2"}}, heartbeat=1, retries=0)


@pytest.mark.parametrize(
    "url",
    ["postgresql://127.0.0.1:9/none", "postgresql://ann@127.0.0.1:9/none", "grpc://127.0.0.1:9",
     "sqlite:////no/such/folder/x.db", "/no/such/x.journal", "nonsense://x"],
)  # fmt: skip
def test_a_storage_that_cannot_be_reached_is_one_line(url: str) -> None:
    with pytest.raises(UserError, match=f"^storage {url} cannot be reached: [^\n]+$"):
        open_storage(url)


@pytest.mark.parametrize(
    "url",
    ["postgresql://ann:s3cr3t@127.0.0.1:9/none", "grpc://ann:s3cr3t@127.0.0.1:9", "postgres+x://ann:s3cr3t@h/d",
     "grpc://ann:s3cr3t@127.0.0.1:port"],
)  # fmt: skip
def test_a_storage_that_cannot_be_reached_keeps_its_password(url: str) -> None:
    with pytest.raises(UserError, match=r"cannot be reached") as caught:
        open_storage(url)
    assert "s3cr3t" not in str(caught.value) and "ann:***@" in str(caught.value)


def test_wilcoxon_wants_several_seeds() -> None:
    from lightning_glue.config import compose_tune

    _, tune = compose_tune(["tune.pruner=wilcoxon"], task="RTE")
    with pytest.raises(UserError, match="set tune.seeds to 2 or more"):
        make_pruner(tune)


@pytest.mark.parametrize("name", ["tpe", torture("gp"), "random"])
def test_samplers_learn_from_a_study_that_is_filled_trial_by_trial(storage: str, name: str) -> None:
    study = SharedStudy(
        name, open_storage(storage), make_sampler(name, 1), optuna.pruners.NopPruner(), {}, heartbeat=9, retries=0
    )
    study.fill_queue(24, [])
    values = []
    while trial := study.claim(SPACE):
        values.append(trial.params["x"])
        study.finish(trial._trial_id, TrialState.COMPLETE, -((trial.params["x"] - 0.8) ** 2))
    assert len(set(values)) == 24
    distance = sum(abs(value - 0.8) for value in values[12:]) / 12
    assert distance < 0.15 if name != "random" else distance > 0.15


@pytest.mark.parametrize(
    ("pruner", "seeds", "kind"),
    [("auto", 1, "MedianPruner"), ("auto", 3, "WilcoxonPruner"), ("median", 3, "MedianPruner"),
     ("hyperband", 1, "HyperbandPruner"), ("none", 1, "NopPruner")],
)  # fmt: skip
def test_pruners_by_configuration(pruner: str, seeds: int, kind: str) -> None:
    from lightning_glue.config import compose_tune

    _, tune = compose_tune([f"tune.pruner={pruner}", f"tune.seeds={seeds}"], task="RTE")
    assert type(make_pruner(tune)).__name__ == kind


@pytest.mark.torture
def test_four_controllers_share_160_trials_on_postgresql(postgres: Postgres) -> None:
    url = postgres.new_database("shared")
    finish([start_controller(url, 160) for _ in range(4)])
    trials = stored_trials(url)
    assert [trial.number for trial in trials] == list(range(160))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert all(trial.value == trial.params["x"] for trial in trials)
    controllers = {trial.user_attrs["heartbeat"].split()[3] for trial in trials}
    assert len(controllers) == 4  # each did its share


@pytest.mark.torture
def test_four_controllers_share_40_trials_on_one_host(storage: str) -> None:
    finish([start_controller(storage, 40) for _ in range(4)])
    trials = stored_trials(storage)
    assert [trial.number for trial in trials] == list(range(40))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}


@pytest.mark.torture
def test_optunas_grpc_proxy_serves_controllers_without_a_database_driver(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = (
        "import optuna; from lightning_glue.tuning.storage import open_storage;"
        f"storage = open_storage('sqlite:///{tmp_path}/p.db');"
        f"optuna.storages.run_grpc_proxy_server(storage, host='127.0.0.1', port={port})"
    )
    proxy = subprocess.Popen([sys.executable, "-c", FORKED + code], stderr=subprocess.DEVNULL)
    try:
        url = f"grpc://127.0.0.1:{port}"
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        finish([start_controller(url, 12) for _ in range(2)])
        assert {trial.state for trial in stored_trials(url)} == {TrialState.COMPLETE}
    finally:
        proxy.kill()
        proxy.wait()


@pytest.mark.torture
def test_a_study_outlives_a_restart_of_its_database(postgres: Postgres) -> None:
    url = postgres.new_database("restarted")
    controller = start_controller(url, 30, CHEAP_SECONDS="0.05")
    wait_for(lambda: sum(trial.state == TrialState.COMPLETE for trial in stored_trials_or_none(url)) >= 5)
    postgres.stop()
    time.sleep(2)
    postgres.start()
    _, errors = controller.communicate(timeout=120)
    assert controller.returncode == 0, errors
    assert "storage is away, trying again" in errors
    trials = stored_trials(url)
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 30
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL}


def stored_trials_or_none(url: str) -> list[optuna.trial.FrozenTrial]:
    try:
        return stored_trials(url)
    except KeyError:  # not made yet
        return []


@pytest.mark.torture
def test_a_killed_controller_takes_its_processes_along_and_another_goes_on(storage: str) -> None:
    controller = start_controller(storage, 12, CHEAP_SECONDS="0.2")
    wait_for(lambda: sum(trial.state == TrialState.COMPLETE for trial in stored_trials_or_none(storage)) >= 2)
    workers = children(controller.pid)
    assert workers
    controller.kill()
    controller.communicate()
    assert gone(workers)
    finish([start_controller(storage, 12)])
    trials = stored_trials(storage)
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 12
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert len(failed) == len(trials) - 12
    for trial in failed:  # killed between taking a trial and its first sign of life, it has never run
        heard = "heartbeat" in trial.user_attrs
        assert trial.user_attrs["reason"] == ("its controller died" if heard else "interrupted")


def test_killed_workers_are_replaced_and_their_trials_retried(storage: str) -> None:
    study = share(storage, "cheap", 3)
    control(study, "dies_once").run()
    trials = study.trials()
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert [trial.user_attrs["reason"] for trial in failed] == ["process 0 was ended by SIGKILL"] * 3
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert sorted(trial.user_attrs["retry_of"] for trial in complete) == sorted(trial.number for trial in failed)


def test_out_of_memory_fails_the_trial_alone(storage: str) -> None:
    study = share(storage, "memory", 8)
    control(study, "out_of_memory").run()
    trials = study.trials()
    assert len(trials) == 8  # none is tried again: it would fail again
    for trial in trials:
        fits = trial.params["x"] <= 0.5
        assert trial.state == (TrialState.COMPLETE if fits else TrialState.FAIL)
        assert fits or trial.user_attrs["reason"].startswith("out of memory: tried to allocate")
    assert 0 < sum(trial.state == TrialState.FAIL for trial in trials) < 8


def test_several_seeds_give_the_median_and_wilcoxon_stops_the_hopeless(storage: str) -> None:
    pruner = optuna.pruners.WilcoxonPruner(p_threshold=0.2, n_startup_steps=2)
    study = share(storage, "seeds", 8, pruner=pruner)
    control(study, "noisy", seeds=5).run()
    trials = study.trials()
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert len(complete) + len(pruned) == 8
    assert complete and pruned
    for trial in complete:
        assert trial.value == pytest.approx(trial.params["x"] + 0.2)  # the seed in the middle
        assert len(trial.intermediate_values) == 5
    for trial in pruned:
        assert len(trial.intermediate_values) < 5
    for trial in trials:
        collapsed = len(trial.intermediate_values) if trial.params["x"] < 0.2 else 0
        assert trial.user_attrs.get("collapsed", 0) == collapsed


def test_trials_on_other_data_end_the_study(storage: str) -> None:
    study = share(storage, "data", 3)
    with pytest.raises(UserError, match=r"has trials on other data: split train has digest"):
        control(study, "other_data").run()
    assert len(study.trials(TrialState.WAITING)) == 2  # the second is given back
