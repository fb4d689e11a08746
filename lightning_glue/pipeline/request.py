"""A benchmark as it is asked for, and what that comes to: a resolved configuration for each task, stored at once."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.errors import UserError, suggest
from lightning_glue.execution.engines import check_counts, check_engine
from lightning_glue.pipeline.benchmark_folder import FILE, ROOT
from lightning_glue.pipeline.drivers import lock
from lightning_glue.pipeline.graph import FROM_MNLI
from lightning_glue.tasks import TRAINABLE, get_task
from lightning_glue.training.default_model import with_default_model
from lightning_glue.utils.files import new_file
from lightning_glue.utils.logs import log

KEEP = ("best", "median", "all")
SEEDS = 5
_FORMAT = 1
_LEFT_OUT = ("trainer.gpus", "trainer.procs")  # what a slot decides


@dataclass(frozen=True)
class Request:
    """A benchmark as it is asked for; None leaves it to what is stored, to ``conf/`` or to what the machine has.

    Attributes:
        experiment: a recipe below experiments/ for every task; ``{task}`` in it stands for the task's name.
        seeds: 1 to this.
        workers: jobs at a time; ``auto``: as many, or on a GPU as many on each, as do the most examples a second here,
            which is measured.
        jobs_per_gpu: jobs that share a GPU.
        ddp: GPUs, or slots on the CPU, that MNLI and QQP are trained on where so many are idle.
        procs: processes of each training on the CPU.
        retries: times a job whose process died is tried again.
        keep: seeds whose exported models are kept once the report exists.
        join: work beside drivers that are at it.
        engine, address: see :func:`~lightning_glue.execution.engines.open_engine`.
        overrides: ``key=value`` for every training.
    """

    tasks: Sequence[str] | None = None
    model: str | None = None
    data: str | None = None
    experiment: str | None = None
    name: str | None = None
    seeds: int | None = None
    transfer: bool = False
    workers: int | str | None = None
    gpus: int | None = None
    jobs_per_gpu: int = 1
    ddp: int = 1
    procs: int = 1
    retries: int = 2
    keep: str = "best"
    join: bool = False
    engine: str = "local"
    address: str | None = None
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raise UserError where a value cannot be meant."""
        check_engine(self.engine, self.address)
        check_counts(self, ("seeds", "workers", "jobs_per_gpu", "ddp", "procs"))
        if self.retries < 0:
            raise UserError(f"--retries {self.retries}; expected at least 0")
        if self.engine != "local" and (self.ddp > 1 or self.procs > 1):
            raise UserError(f"--engine {self.engine} gives each job one device; leave --ddp and --procs out")
        if self.keep not in KEEP:
            raise UserError(f"--keep {self.keep!r}{suggest(self.keep, KEEP)}")
        for task in self.tasks or ():
            if task not in TRAINABLE:
                note = "; AX is predicted by MNLI's model" if task == "AX" else suggest(task, TRAINABLE)
                raise UserError(f"unknown task {task!r}{note}")
        if self.name is not None and not re.search(r"[A-Za-z0-9]", self.name):
            raise UserError(f"--name {self.name!r}; expected letters or digits in it")
        for override in self.overrides:
            key = override.partition("=")[0].lstrip("+~")
            if key in (*_LEFT_OUT, "seed", "init_from", "tracking.run_name", "tracking.checkpoints", "task", "model"):
                raise UserError(f"{key} is what the benchmark itself decides for each training; leave {override} out")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as it is worked on.

    Attributes:
        configs: of the trainings by task, dotted keys, seed and device aside; with this command's ``tracking.`` keys.
        tasks, seeds: that this command works on.
        stored: what ``benchmark.json`` says: all tasks and seeds that were ever asked for.
        gpus: to use; 0: the CPU.
        before: what ``benchmark.json`` said when this was put together.
    """

    folder: Path
    request: Request
    configs: dict[str, dict[str, Any]]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    stored: dict[str, Any]
    gpus: int
    before: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        return self.stored["id"]

    @property
    def name(self) -> str:
        return self.stored["name"]

    @property
    def experiment(self) -> str:
        """MLflow's: one for all, for runs of several experiments cannot be nested."""
        return self.stored["experiment"]

    @property
    def any_config(self) -> dict[str, Any]:
        return next(iter(self.configs.values()))

    @property
    def uri(self) -> str | None:
        return self.any_config["tracking.uri"]


def safe_name(name: str) -> str:
    """A benchmark's name as that of its folder."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:80].lstrip(".") or "_"


def compose_benchmark(request: Request, gpus: int, root: Path = ROOT) -> Benchmark:
    """What is asked for, put together with what is stored of a benchmark of this name; writes nothing.

    Args:
        gpus: to use; 0: the CPU.

    Raises:
        UserError: a mistake in it, or a benchmark of this name was made with another configuration; names the keys.
    """
    # The tasks may be those that are stored, under a name that one task's configuration is enough to tell.
    name = request.name or _default_name(request, _compose(request, (request.tasks or TRAINABLE)[0], gpus))
    folder = root / safe_name(name)
    stored = read_stored(folder)
    tasks = tuple(dict.fromkeys(request.tasks or (stored or {}).get("tasks") or TRAINABLE))
    count = request.seeds or len((stored or {}).get("seeds", ())) or SEEDS
    if request.transfer and "MNLI" not in tasks:
        raise UserError(f"--transfer starts {', '.join(FROM_MNLI)} from MNLI's models; add MNLI to the tasks")
    if request.ddp > 1 and gpus and request.ddp > gpus:
        raise UserError(f"--ddp {request.ddp}: the benchmark is given {gpus} GPUs")
    made = {task: _compose(request, task, gpus) for task in tasks}
    asked = _described(request, name, tasks, tuple(range(1, count + 1)), made)
    if stored:
        _check_same(asked, stored, folder)
    configs = {task: _as_stored(task, config, asked, stored or asked) for task, config in made.items()}
    together = _together(asked, stored)
    return Benchmark(folder, request, configs, tasks, tuple(range(1, count + 1)), together, gpus, stored)


def _compose(request: Request, task: str, gpus: int) -> Config:
    recipe = request.experiment and request.experiment.replace("{task}", task)
    if recipe and recipe != request.experiment and recipe not in configuration.experiments():
        log.info("%s has no recipe %s: conf/task/%s.yaml it is", task, recipe, task)
        recipe = None
    given = [f"trainer.gpus={int(bool(gpus))}", *request.overrides]
    return with_default_model(
        lambda model: configuration.compose(given, task=task, model=model, data=request.data, experiment=recipe),
        request.model, recipe, request.overrides, lambda config: config.trainer.gpus,
    )  # fmt: skip


def _default_name(request: Request, config: Config) -> str:
    """``roberta.base``, with ``-sample`` and ``-transfer`` where they are not the usual ones."""
    parts = [config.model.name, *(["sample"] if config.data.source == "sample" else [])]
    return "-".join([*parts, *(["transfer"] if request.transfer else [])])


def _described(
    request: Request, name: str, tasks: Sequence[str], seeds: Sequence[int], made: dict[str, Config]
) -> dict[str, Any]:
    """The content of benchmark.json."""
    config = next(iter(made.values()))
    source = "-sample" if config.data.source == "sample" else ""
    return {
        "format": _FORMAT,
        "id": uuid.uuid4().hex,
        "name": name,
        "model": config.model.name,
        "tasks": list(tasks),
        "seeds": list(seeds),
        "experiment": config.tracking.experiment or f"glue-benchmark{source}",
        "uri": configuration.recorded(config)["tracking.uri"],
        "transfer": request.transfer,
        "keep": request.keep,
        "data": config.data.source,
        "recipe": request.experiment or "",
        "overrides": [one for one in request.overrides if not one.startswith("tracking.")],
        "configs": {task: _identity(config) for task, config in made.items()},
    }


def _identity(config: Config) -> dict[str, Any]:
    """What makes two trainings of a task the same, seed and start aside."""
    found = {key: value for key, value in configuration.identity(config).items() if key not in ("seed", "init_from")}
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def read_stored(folder: Path) -> dict[str, Any] | None:
    """What benchmark.json says; None where there is none.

    Raises:
        UserError: it is none of ours.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(stored["configs"], dict) and isinstance(stored["id"], str) and stored["tasks"]
        newer = stored["format"] > _FORMAT
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
        raise UserError(f"{path} is no description of a benchmark; restore it, or move {folder} away") from None
    if newer:
        raise UserError(f"{path} is of a newer version (format {stored['format']}, this one reads {_FORMAT}); update")
    found: dict[str, Any] = stored
    return found


def _check_same(asked: dict[str, Any], stored: dict[str, Any], folder: Path) -> None:
    """Raise UserError where what is asked for would make other trainings than those that are stored."""
    differing = [
        f"{key} is {stored[key]!r} there, {asked[key]!r} here"
        for key in ("name", "transfer", "data", "experiment")
        if stored[key] != asked[key]
    ]
    same_words = all(stored[key] == asked[key] for key in ("model", "recipe", "overrides"))
    for task in asked["configs"].keys() & stored["configs"].keys():
        there, here = stored["configs"][task], asked["configs"][task]
        keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
        told = [f"{key} is {there.get(key)} there, {here.get(key)} here" for key in keys]
        if keys and same_words:
            log.info("conf/ has changed since benchmark %s began, which goes on as it began: %s %s",
                     stored["name"], task, "; ".join(told))  # fmt: skip
        elif keys:
            differing += [f"{task}: {one}" for one in told]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"benchmark {stored['name']!r} in {folder} was made with another configuration: "
            f"{'; '.join(differing[:3])}{more}; ask for the same, or give this one another --name"
        )


def _as_stored(task: str, config: Config, asked: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """A task's configuration: what makes the training as it was stored, where and how it runs as it is asked for."""
    flat = configuration.flatten(config) | stored["configs"].get(task, {})
    flat |= {
        "tracking.experiment": asked["experiment"],
        "tracking.checkpoints": True,
    }
    return flat


def _together(asked: dict[str, Any], stored: dict[str, Any] | None) -> dict[str, Any]:
    """benchmark.json with what is asked for besides."""
    if not stored:
        return asked
    tasks = [task for task in TRAINABLE if task in (*stored["tasks"], *asked["tasks"])]
    return stored | {
        "tasks": tasks,
        "seeds": sorted({*stored["seeds"], *asked["seeds"]}),
        "uri": asked["uri"],
        "keep": asked["keep"],
        "configs": asked["configs"] | stored["configs"],
    }


def settle(benchmark: Benchmark) -> Benchmark:
    """Write benchmark.json, whole; the benchmark as it is then, for another driver may have begun or extended it.

    Raises:
        UserError: as :func:`compose_benchmark`.
    """
    with lock(benchmark.folder / "drivers" / "asked.lock", wait=True):
        if read_stored(benchmark.folder) != benchmark.before:
            benchmark = compose_benchmark(benchmark.request, benchmark.gpus, benchmark.folder.parent)
        if benchmark.stored != benchmark.before:
            with new_file(benchmark.folder / FILE) as file:
                json.dump(benchmark.stored, file, indent=2)
    return benchmark


def find_data(benchmark: Benchmark) -> dict[str, Path]:
    """The folder that has each task's files.

    Raises:
        UserError: some have none; names them all, and how to leave them out.
    """
    from lightning_glue.data import reader, sources

    found, missing = dict[str, Path](), dict[str, str]()
    for name, config in benchmark.configs.items():
        task = get_task(name)
        assert task.train
        try:
            root = sources.glue_directory(task, config["data.source"], config["data.glue_dir"])
            lacking = [split.file_name for split in (task.train, *task.dev) if not reader.has_split(task, split, root)]
            if lacking:
                raise UserError(f"no {', '.join(lacking)} in {root / task.directory}")
            found[name] = root
        except UserError as error:
            missing[name] = str(error)
    if missing:
        reason = next(iter(missing.values()))
        rest = f'leave them out with TASKS="{" ".join(found)}" (--tasks)' if found else "nothing else is there"
        raise UserError(f"no data of {', '.join(missing)} ({reason}); add them, or {rest}")
    return found


def asked_as_parameters(benchmark: Benchmark) -> dict[str, Any]:
    """What the benchmark's run in MLflow records."""
    asked = {key: value for key, value in benchmark.stored.items() if key not in ("configs", "uri")}
    where = {key: value for key, value in asdict(benchmark.request).items() if key in ("gpus", "workers", "ddp")}
    return {f"glue.{key}": value for key, value in (asked | where).items()}
