"""The typed schema of the configuration: every key of ``conf/``, in the groups of its files."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from lightning_glue.tasks import Task, described_task, get_task


@dataclass(frozen=True)
class Expected:
    """A condition on the value of a field, in words and as a function; pydantic asks it."""

    words: str
    holds: Callable[[Any], bool]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import PydanticCustomError, core_schema

        def check(value: Any) -> Any:
            if not self.holds(value):
                raise PydanticCustomError("expected", "expected {words}", {"words": self.words})
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))


OWN = "_own"  # file of both groups for data of one's own
Count = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Le(1)]
NotNegative = Annotated[float, Ge(0)]


def _are_betas(betas: list[float]) -> bool:
    return len(betas) == 2 and all(0 <= beta < 1 for beta in betas)


def _is_gpus(text: str) -> bool:
    return text == "auto" or (text.isascii() and text.isdigit())


def _is_interval(batches: float) -> bool:
    return 0 < batches <= 1 or (batches > 1 and batches == int(batches))


class Part:
    """What pydantic is to do with each group of keys."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False, "coerce_numbers_to_str": True}


@dataclass
class TaskConfig(Part):
    name: str
    lr: float
    batch_size: int
    max_epochs: int
    description: dict[str, Any] | None = None  # of data of one's own, resolved; no key of a command line


@dataclass
class ModelConfig(Part):
    name: str
    source: str
    tokenizer: Literal["gpt2", "wordpiece"]
    lr_factor: float
    dropout: Share
    attention_dropout: Share
    pooler_dropout: Share
    architecture: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig(Part):
    source: Literal["glue", "sample", "own"]
    glue_dir: str | None
    bpe_dir: str | None
    on_bad_row: Literal["stop", "skip"]
    max_tokens: Annotated[int, Ge(8)]
    batch_size: Count
    length_pool: Count
    eval_tokens: Count | None


@dataclass
class OptimizerConfig(Part):
    lr: NotNegative | None
    betas: Annotated[list[float], Expected("two numbers from 0 to below 1", _are_betas)]
    eps: NotNegative
    weight_decay: NotNegative
    decay_biases: bool
    layer_decay: Annotated[float, Ge(0.01), Le(1)]
    warmup_ratio: Share


@dataclass
class TrainerConfig(Part):
    gpus: Annotated[str, Expected("auto or a number of GPUs, 0 for the CPU", _is_gpus)]
    procs: Count
    max_epochs: Count
    max_steps: Annotated[int, Expected("at least 1, or -1 for no limit", lambda steps: steps >= 1 or steps == -1)]
    accumulate: Count
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"]
    deterministic: bool
    checkpoint_every_steps: Count | None
    checkpoint_every_minutes: Annotated[float, Ge(0.001)] | None
    gradient_clip_val: NotNegative
    val_check_interval: Annotated[
        float, Expected("a share of an epoch up to 1, or a whole number of batches", _is_interval)
    ]
    early_stopping_patience: int | None
    log_every: Count
    predict: bool
    cuda_graphs: bool = True
    preflight: bool = True
    auto_batch: bool = False


@dataclass
class TrackingConfig(Part):
    uri: str | None
    experiment: str | None
    run_name: str | None
    checkpoints: bool
    keep_best: Count
    register: bool
    journal: str
    system_metrics_seconds: Annotated[float, Ge(0.1)] | None
    errors: bool = True


@dataclass
class Config(Part):
    task: TaskConfig
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    tracking: TrackingConfig
    seed: Annotated[int, Ge(0), Le(2**32 - 1)]  # NumPy's
    init_from: str | None
    recipe = ""  # no key: the name of the recipe it was composed with, which the run's name begins with

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return self.task.lr * self.model.lr_factor if self.optimizer.lr is None else self.optimizer.lr

    @property
    def experiment(self) -> str:
        """MLflow's experiment: the one given, else the task's; generated data have one of their own."""
        return self.tracking.experiment or task_of(self).place(self.data.source)

    @property
    def run_name(self) -> str:
        """MLflow's name of the run: the one given, else what tells runs of a task apart at a glance."""
        steps, epochs = self.trainer.max_steps, self.trainer.max_epochs
        length = f"{steps} steps" if steps > 0 else f"{epochs} epochs" if epochs > 1 else "1 epoch"
        default = f"{self.model.name} lr {self.lr:g} batch {self.data.batch_size} {length} seed {self.seed}"
        return self.tracking.run_name or (f"{self.recipe}: {default}" if self.recipe else default)


def task_of(config: Config) -> Task:
    """The task that a configuration is of: one that is built in, or the one that its description says."""
    description = config.task.description
    return described_task(description) if description else get_task(config.task.name)


def task_file(config: Config) -> str:
    """The file of ``conf/task/`` that a configuration is composed from."""
    return OWN if config.task.description else config.task.name


def data_file(config: Config) -> str:
    """The file of ``conf/data/`` that a configuration is composed from."""
    return OWN if config.task.description else config.data.source


@dataclass
class TuneConfig(Part):
    trials: Count
    space: str
    sampler: Literal["tpe", "gp", "grid", "random"]
    pruner: Literal["auto", "median", "hyperband", "wilcoxon", "none"]
    seeds: Count
    retries: Annotated[int, Ge(0)]
    heartbeat_seconds: Annotated[float, Ge(0.1)]
    collapse_margin: NotNegative
    warm: bool
    spaces: dict[str, Any]
    first_trials: list[dict[str, Any]]

    @property
    def parameters(self) -> dict[str, Any]:
        """The chosen search space as written: key to list of choices or to low, high, log, step."""
        return self.spaces[self.space]


def keys() -> list[str]:
    """Every dotted key of the schema, for example ``optimizer.lr``."""
    names: list[str] = []
    for name, kind in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            names += [f"{name}.{part.name}" for part in dataclasses.fields(kind) if part.name != "description"]
        else:
            names.append(name)
    return names
