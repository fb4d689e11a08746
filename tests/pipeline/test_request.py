"""A benchmark as it is asked for, and asked for again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_glue.config import paths
from lightning_glue.errors import UserError
from lightning_glue.pipeline.cost import parameters, rows_and_length, training_cost
from lightning_glue.pipeline.request import Request, compose_benchmark, find_data, safe_name, settle
from lightning_glue.pipeline.teams import make_teams


def ask(root: Path, **given: object):
    """The benchmark, stored as the command stores it."""
    usual = {"tasks": ["RTE"], "seeds": 2, "model": "tiny", "data": "sample", "gpus": 0}
    return settle(compose_benchmark(Request(**(usual | given)), root))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": 0}, "--seeds 0; expected at least 1"),
        ({"retries": -1}, "--retries -1"),
        ({"keep": "bets"}, "did you mean 'best'"),
        ({"tasks": ["sst2"]}, "did you mean 'SST-2'"),
        ({"tasks": ["AX"]}, "AX is predicted by MNLI's model"),
        ({"name": "../.."}, "expected letters or digits"),
        ({"overrides": ["seed=3"]}, "seed is what the benchmark itself decides"),
        ({"overrides": ["trainer.gpus=2"]}, "trainer.gpus is what"),
        ({"overrides": ["optimizer.lrr=3"]}, "unknown key 'optimizer.lrr'"),
        ({"transfer": True}, "add MNLI to the tasks"),
        ({"gpus": 99}, "--gpus 99: this machine shows"),
    ],
)
def test_what_cannot_be_meant_is_said(tmp_path: Path, given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask(tmp_path, **given)
    assert not list(tmp_path.iterdir())


def test_more_tasks_and_seeds_extend_and_fewer_are_worked_on_alone(tmp_path: Path) -> None:
    first = ask(tmp_path)
    more = ask(tmp_path, tasks=["WNLI"], seeds=3)
    assert more.id == first.id and (more.tasks, more.seeds) == (("WNLI",), (1, 2, 3))
    stored = json.loads((tmp_path / "tiny-sample" / "benchmark.json").read_text())
    assert (stored["tasks"], stored["seeds"], stored["model"]) == (["RTE", "WNLI"], [1, 2, 3], "tiny")
    again = ask(tmp_path, tasks=None, seeds=None)  # as it is stored
    assert (again.tasks, again.seeds) == (("RTE", "WNLI"), (1, 2, 3))
    fewer = ask(tmp_path, seeds=1)
    assert fewer.seeds == (1,) and fewer.stored["seeds"] == [1, 2, 3]


def test_drivers_that_begin_at_the_same_moment_begin_one_benchmark(tmp_path: Path) -> None:
    usual = {"seeds": 2, "model": "tiny", "data": "sample", "gpus": 0}
    made = [compose_benchmark(Request(tasks=[task], **usual), tmp_path) for task in ("RTE", "WNLI")]
    assert made[0].id != made[1].id
    first, second = map(settle, made)
    assert first.id == second.id and second.stored["tasks"] == ["RTE", "WNLI"]


@pytest.mark.parametrize(
    ("given", "difference"),
    [
        ({"overrides": ["optimizer.lr=3e-5"]}, "RTE: optimizer.lr is 0.001 there, 3e-05 here"),
        ({"tasks": ["RTE", "MNLI"], "transfer": True, "name": "tiny-sample"}, "transfer is False there, True here"),
        ({"model": "minilm", "name": "tiny-sample"}, "RTE: model"),
    ],
)
def test_another_configuration_under_the_same_name_is_refused(
    tmp_path: Path, given: dict[str, object], difference: str
) -> None:
    ask(tmp_path)
    with pytest.raises(UserError, match=f"made with another configuration: .*{difference}.*another --name"):
        ask(tmp_path, **given)
    ask(tmp_path, **(given | {"name": "other"}))


def test_where_a_training_runs_and_is_tracked_may_change(tmp_path: Path) -> None:
    ask(tmp_path)
    moved = ask(tmp_path, overrides=["tracking.uri=http://u:s3cret@host:1", "trainer.checkpoint_every_steps=3"])
    assert moved.configs["RTE"]["trainer.checkpoint_every_steps"] == 3
    assert moved.uri == "http://u:s3cret@host:1"
    assert "s3cret" not in (moved.folder / "benchmark.json").read_text()


def test_editing_conf_changes_nothing_of_a_benchmark_that_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    before = ask(tmp_path / "b").configs["RTE"]
    conf = shutil.copytree(paths.CONF, tmp_path / "conf")
    (conf / "task" / "RTE.yaml").write_text((conf / "task" / "RTE.yaml").read_text().replace("lr: 2e-5", "lr: 9e-5"))
    monkeypatch.setattr(paths, "CONF", conf)
    again = ask(tmp_path / "b")
    assert again.configs["RTE"] == before
    assert "conf/ has changed since" in caplog.text and "task.lr is 2e-05 there, 9e-05 here" in caplog.text


def test_a_file_that_is_no_benchmarks_is_said(tmp_path: Path) -> None:
    folder = ask(tmp_path).folder
    for text, message in {"{": "no description", "[]": "no description", '{"format": 1}': "no description"}.items():
        (folder / "benchmark.json").write_text(text)
        with pytest.raises(UserError, match=message):
            ask(tmp_path)


@pytest.mark.parametrize("name", ["a/b", "../x", ".hidden", "/etc/passwd", "a b", "x" * 300, "ü1"])
def test_a_name_is_a_folder_below_the_root_whatever_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / safe_name(name)).mkdir()
    assert [path.parent for path in tmp_path.rglob("*")] == [tmp_path]


def test_all_tasks_without_data_are_named_with_a_way_to_leave_them_out(tmp_path: Path, cache: Path) -> None:
    there = find_data(ask(tmp_path / "a"))["RTE"] / "RTE"
    glue = tmp_path / "glue"
    (glue / "WNLI").mkdir(parents=True)
    (glue / "RTE").symlink_to(there)
    given = {"tasks": ["RTE", "CoLA", "WNLI"], "data": "glue", "overrides": [f"data.glue_dir={glue}"]}
    benchmark = ask(tmp_path / "b", **given)
    with pytest.raises(UserError, match=r'no data of CoLA, WNLI \(.*no folder CoLA.*TASKS="RTE"'):
        find_data(benchmark)


def test_a_recipe_of_each_task_is_taken_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "experiments" / "own").mkdir(parents=True)
    recipe = "# @package _global_\ndefaults:\n  - override /task: RTE\noptimizer:\n  lr: 7e-4\n"
    (tmp_path / "experiments" / "own" / "RTE.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    made = ask(tmp_path / "b", tasks=["RTE", "WNLI"], experiment="own/{task}").configs
    assert made["RTE"]["optimizer.lr"] == 7e-4 and made["WNLI"]["optimizer.lr"] != 7e-4
    assert "WNLI has no recipe own/WNLI" in caplog.text


def test_cost_is_rows_times_length_times_epochs_times_model(tmp_path: Path, cache: Path) -> None:
    benchmark = ask(tmp_path)
    config, root = benchmark.configs["RTE"], find_data(benchmark)["RTE"]
    rows, length = rows_and_length("RTE", root)
    true = len((root / "RTE" / "train.tsv").read_text().splitlines()) - 1
    assert abs(rows - true) < 0.05 * true and 5 < length < 100
    cost = training_cost(config, root)
    assert training_cost(config | {"trainer.max_epochs": 2 * config["trainer.max_epochs"]}, root) == 2 * cost
    few = config | {"trainer.max_steps": 2, "data.batch_size": 8}
    assert training_cost(few, root) == pytest.approx(cost * 16 / (rows * config["trainer.max_epochs"]))
    assert training_cost(few, root) * 1e15 == pytest.approx(6 * parameters(config) * 16 * length)


def test_teams_of_one_of_a_slots_processes_and_over_slots(tmp_path: Path) -> None:
    from dataclasses import replace

    on_cpu = ask(tmp_path, workers=4, ddp=2)
    shape = [(team.suits, team.name, team.group.place.processes) for team in make_teams(on_cpu)]
    assert shape == [*(("one", str(n), 1) for n in range(4)), ("ddp", "0+1", 2), ("ddp", "2+3", 2)]
    procs = replace(on_cpu, request=replace(on_cpu.request, ddp=1, procs=3, workers=1))
    assert [team.settings["trainer.procs"] for team in make_teams(procs)] == [1, 3]
    shared = replace(on_cpu, gpus=4, request=replace(on_cpu.request, workers=None, jobs_per_gpu=2))
    teams = make_teams(shared)
    assert [team.group.place.gpus for team in teams[:8]] == [(0,), (1,), (2,), (3,)] * 2
    assert [(team.slots, team.group.place.gpus, team.settings["trainer.gpus"]) for team in teams[8:]] == [
        ({0, 1, 4, 5}, (0, 1), "2"), ({2, 3, 6, 7}, (2, 3), "2"),
    ]  # fmt: skip
    assert len({str(team.group.log) for team in teams}) == len(teams)
