"""Runs that can be compared, grouped over their seeds: what a report has of them."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from lightning_glue.tracking import seed_noise
from lightning_glue.tracking.published import DEV_ROWS, Published, published
from lightning_glue.tracking.registry import difference
from lightning_glue.tracking.stored_runs import Scored, is_training, is_trial, scored_run

if TYPE_CHECKING:
    from mlflow.entities import Run

# Parameters that do not tell two recipes apart: the seed, and where and how fast a run was made.
_NOT_RECIPE = (
    "seed", "tracking.", "task.", "data.glue_dir", "data.bpe_dir", "data.eval_tokens", "trainer.gpus", "trainer.procs",
    "trainer.accumulate", "trainer.log_every", "trainer.predict", "trainer.checkpoint", "trainer.preflight",
    "trainer.auto_batch", "trainer.cuda_graphs",
)  # fmt: skip
_USUAL = {"optimizer.lr": "lr", "data.batch_size": "batch"}
_TOLD = {*_USUAL, "trainer.max_epochs", "trainer.max_steps"}  # in a recipe's words
_COMMON = (
    "optimizer.", "data.max_tokens", "trainer.precision", "trainer.gradient_clip_val", "init_from", "model.dropout",
    "model.attention_dropout", "model.pooler_dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone.

    Attributes:
        recipe: what tells it from others of its section, in words.
        published: the score that the same model is known to reach; None where there is none.
        together: scores of what was made of all seeds, by name: ensemble, soup.
        energy: watt hours, where the machine tells.
    """

    task: str
    recipe: str
    runs: list[Scored]
    published: Published | None = None
    together: Mapping[str, float] = field(default_factory=dict)
    energy: float | None = None

    @cached_property
    def seeds(self) -> list[Scored]:
        """One run of each seed: the newest."""
        return list({run.seed: run for run in sorted(self.runs, key=lambda run: run.started)}.values())

    @property
    def scores(self) -> list[float]:
        return [run.score for run in self.seeds]

    @property
    def median(self) -> float:
        return statistics.median(self.scores)

    @property
    def best(self) -> Scored:
        return max(self.seeds, key=lambda run: run.score)

    @property
    def minutes(self) -> float:
        return sum(run.minutes for run in self.runs)

    @property
    def majority(self) -> float | None:
        """The score of saying the most frequent class, where a run says it."""
        return next((run.majority for run in self.seeds if run.majority is not None), None)

    @property
    def verdict(self) -> str:
        return seed_noise.verdict(self.scores, self.published.score) if self.published else ""


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """Groups that can be compared, as a table and a plot; ``notes`` say what is not in it.

    Attributes:
        details: a table of other things.
    """

    title: str
    groups: list[Group]
    notes: list[str]
    details: Table | None = None


def recipe_key(run: Scored, tasks: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """What tells a recipe from others; of the run that one started from, its task: each seed has a start of its own.

    Args:
        tasks: of the runs that are known, by id.
    """
    params = {key: value for key, value in run.params.items() if not key.startswith(_NOT_RECIPE)}
    if start := start_of(run, tasks):
        params["init_from"] = f"a model of {start}"
    return tuple(sorted(params.items()))


def recipe_names(keys: list[tuple[tuple[str, str], ...]]) -> list[str]:
    """Each recipe in words: learning rate, batch, length, and whatever else differs between recipes."""
    values = defaultdict(set)
    for key in keys:
        for name, value in key:
            values[name].add(value)
    other = [name for name in sorted(values.keys() - _TOLD) if len(values[name]) > 1 and not name.startswith("model.")]
    return [_in_words(dict(key), other) for key in keys]


def _in_words(params: dict[str, str], other: list[str]) -> str:
    """A recipe; the steps that end it stand in place of the epochs that they cut short."""
    words = [f"{short} {params[name]}" for name, short in _USUAL.items() if name in params]
    steps, epochs = params.get("trainer.max_steps", "-1"), params.get("trainer.max_epochs")
    if steps != "-1":
        words.append(f"{steps} steps")
    elif epochs is not None:
        words.append(f"{epochs} epochs" if epochs != "1" else "1 epoch")
    return ", ".join([*words, *(f"{name} {params[name]}" for name in other if name in params)])


def in_common(runs: Iterable[Scored]) -> str:
    """What all runs were made with besides what their recipes say, on one line; empty for none."""
    shared: set[tuple[str, str]] | None = None
    for run in runs:
        shared = set(run.params.items()) if shared is None else shared & run.params.items()
    found = sorted(
        (name.rpartition(".")[2], value)
        for name, value in shared or ()
        if name.startswith(_COMMON) and name not in _TOLD and value not in ("None", "")
    )
    return "in common: " + ", ".join(f"{name} {value}" for name, value in found) if found else ""


def scored_splits(run: Scored) -> dict[str, str]:
    """Digests of what a score depends on: training and dev data."""
    return {name: digest for name, digest in run.data.items() if name == "train" or name.startswith("dev")}


def start_of(run: Scored, tasks: Mapping[str, str]) -> str | None:
    """The task whose model a run started from; None: a pretrained one; empty: nobody knows.

    Args:
        tasks: of the runs that are known, by id.
    """
    start = run.params.get("init_from", "None")
    return None if start in ("None", "") else tasks.get(start, "")


def published_for(run: Scored, tasks: Mapping[str, str]) -> Published | None:
    """The published score that a run's can be compared with: of its model, on the whole official dev set."""
    if run.task not in DEV_ROWS or run.dev_rows not in (None, DEV_ROWS[run.task]):
        return None
    source = run.params.get("model.source", run.params["model.name"])
    return published(run.task, source, start_of(run, tasks), run.params.get("data.source", "glue"))


def group_runs(runs: list[Scored], tasks: Mapping[str, str]) -> list[Group]:
    """A group per recipe of comparable runs, the best median first."""
    members: dict[tuple[tuple[str, str], ...], list[Scored]] = defaultdict(list)
    for run in runs:
        members[recipe_key(run, tasks)].append(run)
    found = [
        Group(runs[0].task, recipe, members[key], published_for(members[key][0], tasks))
        for key, recipe in zip(members, recipe_names(list(members)))
    ]
    return sorted(found, key=lambda group: -group.median)


def compare(runs: list[Run], uri: str, *, task: str | None, trials: bool) -> list[Section]:
    """A section per task and data: scores on different data are never in one table."""
    by_task: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if is_training(run) and (trials or not is_trial(run)) and task in (None, run.data.params["task.name"]):
            by_task[run.data.params["task.name"]].append(run)
    tasks = {run.info.run_id: run.data.params["task.name"] for run in runs if is_training(run)}
    return [section for name in sorted(by_task) for section in _of_task(name, by_task[name], uri, tasks)]


def _of_task(name: str, members: list[Run], uri: str, tasks: Mapping[str, str]) -> list[Section]:
    finished = [run for run in members if run.info.status == "FINISHED"]
    left_out = Counter(run.info.status for run in members if run.info.status != "FINISHED")
    notes = [f"{count} {status} not scored" for status, count in sorted(left_out.items())]
    datasets: dict[str, list[Scored]] = defaultdict(list)
    for found in filter(None, (scored_run(run, uri) for run in finished)):
        datasets[json.dumps(scored_splits(found), sort_keys=True)].append(found)
    if not datasets:
        return [Section(name, [], notes or ["no finished run"])]
    first, sections = next(iter(datasets)), []
    for number, (digests, scored) in enumerate(datasets.items(), 1):
        apart = "" if digests == first else difference(json.loads(first), json.loads(digests))
        title = name if len(datasets) == 1 else f"{name}, data {number}"
        title += " (generated sample)" if scored[0].params.get("data.source") == "sample" else ""
        groups = group_runs(scored, tasks)
        more = [f"not comparable with {name}, data 1: {apart}"] if apart else notes
        said = [in_common(scored), *(said(group) for group in groups for said in (repeated_note, majority_note))]
        sections.append(Section(title, groups, [*more, *filter(None, said)]))
    return sections


def repeated_note(group: Group) -> str:
    """Which seeds have several runs, of which the newest counts; empty where none has."""
    counts = Counter(run.seed for run in group.runs)
    found = [f"seed {seed} has {count} runs" for seed, count in sorted(counts.items()) if count > 1]
    return f"{group.recipe}: {', '.join(found)}; the newest counts" if found else ""


def majority_note(group: Group) -> str:
    """Said of a group that is no better than saying the most frequent class; empty of others."""
    level = group.majority
    if level is None or group.median > level:
        return ""
    what = f"{group.task}, {group.recipe}: {group.best.metric} {group.median:.4f}"
    return f"{what} is no better than {group.best.constant} ({level:.4f})"
