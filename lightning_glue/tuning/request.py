"""A search as it is asked for, and what that comes to: configuration, space, devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_glue import config as configuration
from lightning_glue.config import Config, TuneConfig
from lightning_glue.config.compose import Data
from lightning_glue.errors import UserError, suggest
from lightning_glue.execution.engines import check_counts, check_engine, count_gpus
from lightning_glue.tasks import TRAINABLE
from lightning_glue.training.default_model import with_default_model
from lightning_glue.utils.logs import log

if TYPE_CHECKING:
    from lightning_glue.execution.engines import Engine
    from lightning_glue.tuning.space import Space

DEFAULT_STORAGE = "sqlite:///optuna.db"
_NAME_LIMIT = 512  # characters of a study's name: the storages' tables hold no more


@dataclass(frozen=True)
class Request:
    """A search as it is asked for; None leaves it to ``conf/`` or to what the machine has.

    Attributes:
        task: a built-in one; None where ``data`` describes data of one's own.
        data: ``glue``, ``sample``, or a resolved description.
        trials: of the whole study.
        storage: of the study, an address of Optuna's or the path of a journal file.
        workers: trials at a time, on this machine or on all nodes of the engine; ``auto``: as many as do the most
            examples a second here, which is measured.
        engine, address: see :func:`~lightning_glue.execution.engines.open_engine`.
        overrides: ``key=value``, also of ``tune.``; a key of the search space is then fixed.
    """

    task: str | None
    model: str | None = None
    data: Data = None
    experiment: str | None = None
    trials: int | None = None
    study: str | None = None
    storage: str = DEFAULT_STORAGE
    workers: int | str | None = None
    gpus: int | None = None
    gpus_per_trial: int = 1
    trials_per_gpu: int = 1
    procs: int = 1
    retries: int | None = None
    overrides: Sequence[str] = ()
    engine: str = "local"
    address: str | None = None

    def __post_init__(self) -> None:
        """Raise UserError where a number or a name cannot be meant."""
        check_engine(self.engine, self.address)
        check_counts(self, ("trials", "workers", "gpus_per_trial", "trials_per_gpu", "procs"))
        if len(self.study or "") > _NAME_LIMIT:
            raise UserError(f"--study: a name of {len(self.study or '')} characters; expected at most {_NAME_LIMIT}")


@dataclass(frozen=True)
class Search:
    """What is searched, and from where.

    Attributes:
        config: what every trial's configuration is made from.
        gpus: for all trials together; 0: the CPU.
        asked: trials that the command line asks for; None: as many as the study is to have.
    """

    config: Config
    tune: TuneConfig
    space: Space
    gpus: int
    asked: int | None

    @property
    def metric(self) -> str:
        return configuration.task_of(self.config).selection_metric

    def warn_of_unused_epochs(self) -> None:
        """Say so where the epochs that are searched may change nothing."""
        if self.config.trainer.max_steps > 0 and "trainer.max_epochs" in self.space:
            log.warning(
                "trainer.max_epochs is searched, and trainer.max_steps=%d may end every trial before: "
                "give one of the two",
                self.config.trainer.max_steps,
            )


def compose_search(request: Request, engine: Engine) -> Search:
    """The search that is asked for, on the devices of ``engine``.

    Raises:
        UserError: a mistake in it or in ``conf/tune/``.
    """
    if request.task is None and not isinstance(request.data, Mapping):
        raise UserError("--task is missing; expected a task of GLUE, or --data with the description of your own data")
    if request.task is not None and request.task not in TRAINABLE:
        raise UserError(f"unknown task {request.task!r}{suggest(request.task, TRAINABLE)}")
    flags = {"tune.trials": request.trials, "tune.retries": request.retries}
    tuning = [f"{key}={value}" for key, value in flags.items() if value is not None]
    tuning += [entry for entry in request.overrides if entry.startswith("tune.")]
    asked = request.trials is not None or any(entry.startswith("tune.trials=") for entry in tuning)
    overrides = [entry for entry in request.overrides if not entry.startswith("tune.")]
    gpus = count_gpus(request.gpus, engine)
    fixed = {entry.lstrip("+~").partition("=")[0] for entry in overrides}
    if own := fixed & {"trainer.gpus", "trainer.procs"}:
        raise UserError(f"{own.pop()} of a trial is what --gpus-per-trial and --procs say; leave it out")
    overrides += [
        f"trainer.gpus={request.gpus_per_trial if gpus else 0}",
        f"trainer.procs={1 if gpus else request.procs}",
    ]
    overrides += [] if "tracking.checkpoints" in fixed else ["tracking.checkpoints=false"]
    config, tune = with_default_model(
        lambda model: configuration.compose_tune(
            tuning + overrides, task=request.task, model=model, data=request.data, experiment=request.experiment
        ),
        request.model,
        request.experiment,
        overrides,
        lambda composed: composed[0].trainer.gpus,
    )

    from lightning_glue.tuning.space import make_space

    if gpus and request.gpus_per_trial > gpus:
        raise UserError(f"--gpus-per-trial {request.gpus_per_trial}: the study is given {gpus} GPUs")
    space = make_space(tune.parameters, fixed)
    return Search(config, tune, space, gpus, tune.trials if asked else None)


def default_name(search: Search) -> str:
    """``SST-2-minilm``, with ``-sample`` or the space's name where they are not the usual ones."""
    config, tune = search.config, search.tune
    parts = [config.task.name, config.model.name]
    parts += ["sample"] if config.data.source == "sample" else []
    parts += [tune.space] if tune.space != "wide" else []
    return "-".join(parts)
