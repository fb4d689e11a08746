"""The configuration of a run: typed schema, Hydra composition, and errors that name the nearest valid key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_glue.addresses import hide_secrets
from lightning_glue.errors import UserError, suggest

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
EXPERIMENTS = ROOT / "experiments"


@dataclass
class TaskConfig:
    name: str
    lr: float
    batch_size: int
    max_epochs: int


@dataclass
class ModelConfig:
    name: str
    source: str
    tokenizer: str
    lr_factor: float
    dropout: float
    attention_dropout: float
    pooler_dropout: float
    architecture: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    source: str
    glue_dir: str | None
    bpe_dir: str | None
    on_bad_row: str
    max_tokens: int
    batch_size: int
    length_pool: int
    eval_tokens: int | None


@dataclass
class OptimizerConfig:
    lr: float | None
    betas: list[float]
    eps: float
    weight_decay: float
    decay_biases: bool
    layer_decay: float
    warmup_ratio: float


@dataclass
class TrainerConfig:
    gpus: str  # "auto" or a number
    procs: int
    max_epochs: int
    max_steps: int
    accumulate: int
    precision: str
    deterministic: bool
    checkpoint_every_steps: int | None
    checkpoint_every_minutes: float | None
    gradient_clip_val: float
    val_check_interval: float
    early_stopping_patience: int | None
    log_every: int
    predict: bool


@dataclass
class TrackingConfig:
    uri: str | None
    experiment: str | None
    run_name: str | None
    checkpoints: bool
    keep_best: int
    register: bool
    journal: str
    system_metrics_seconds: float | None


@dataclass
class Config:
    task: TaskConfig
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    tracking: TrackingConfig
    seed: int
    init_from: str | None

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return self.task.lr * self.model.lr_factor if self.optimizer.lr is None else self.optimizer.lr

    @property
    def run_name(self) -> str:
        """MLflow's name of the run: the one given, else what tells runs of a task apart at a glance."""
        default = f"{self.model.name} lr {self.lr:g} batch {self.data.batch_size} seed {self.seed}"
        return self.tracking.run_name or default


@dataclass
class TuneConfig:
    trials: int
    space: str
    sampler: str
    pruner: str
    seeds: int
    retries: int
    heartbeat_seconds: float
    collapse_margin: float
    warm: bool
    spaces: dict[str, Any]
    first_trials: list[dict[str, Any]]

    @property
    def parameters(self) -> dict[str, Any]:
        """The chosen search space as written: key to list of choices or to low, high, log, step."""
        return self.spaces[self.space]


_CHOICES = {
    "data.source": ("glue", "sample"),
    "data.on_bad_row": ("stop", "skip"),
    "model.tokenizer": ("gpt2", "wordpiece"),
    "trainer.precision": ("auto", "32-true", "bf16-mixed", "16-mixed", "64-true"),
    "tune.sampler": ("tpe", "gp", "grid", "random"),
    "tune.pruner": ("auto", "median", "hyperband", "wilcoxon", "none"),
}
_AT_LEAST = {
    "data.batch_size": 1,
    "data.length_pool": 1,
    "data.max_tokens": 8,
    "data.eval_tokens": 1,
    "trainer.procs": 1,
    "seed": 0,
    "trainer.max_epochs": 1,
    "trainer.accumulate": 1,
    "trainer.log_every": 1,
    "trainer.checkpoint_every_steps": 1,
    "trainer.checkpoint_every_minutes": 0.001,
    "optimizer.lr": 0,
    "optimizer.eps": 0,
    "optimizer.weight_decay": 0,
    "optimizer.warmup_ratio": 0,
    "optimizer.layer_decay": 0.01,
    "trainer.gradient_clip_val": 0,
    "tracking.system_metrics_seconds": 0.1,
    "tracking.keep_best": 1,
    "model.dropout": 0,
    "model.attention_dropout": 0,
    "model.pooler_dropout": 0,
    "tune.trials": 1,
    "tune.seeds": 1,
    "tune.retries": 0,
    "tune.heartbeat_seconds": 0.1,
    "tune.collapse_margin": 0,
}
_AT_MOST = {
    "seed": 2**32 - 1,  # NumPy's
    "optimizer.layer_decay": 1,
    "optimizer.warmup_ratio": 1,
    "model.dropout": 1,
    "model.attention_dropout": 1,
    "model.pooler_dropout": 1,
}


def options(group: str) -> list[str]:
    """Names of a group's files, for example the models."""
    return sorted(path.stem if path.suffix == ".yaml" else path.name for path in (CONF / group).glob("*.yaml"))


def experiments() -> list[str]:
    """Names of the recipes below experiments/, for example ``paper/roberta_base``."""
    return sorted(str(path.relative_to(EXPERIMENTS).with_suffix("")) for path in EXPERIMENTS.rglob("*.yaml"))


def _experiment_override(name: str) -> str:
    if name not in experiments():
        raise UserError(f"unknown experiment {name!r}{suggest(name, experiments())}")
    package, _, leaf = f"experiments/{name}".rpartition("/")
    return f"+{package}={leaf}"


def _choose(group: str, name: str) -> str:
    if group == "task" and name == "AX":
        raise UserError("AX has no training data: train --task MNLI, then predict AX with it (trainer.predict=true)")
    if name not in options(group):
        raise UserError(f"unknown {group} {name!r}{suggest(name, options(group))}")
    return f"{group}={name}"


def _choose_model(name: str) -> list[str]:
    """A named model, or the path of a fairseq checkpoint or directory."""
    if name in options("model"):
        return [f"model={name}"]
    if "/" in name or name.endswith((".pt", ".ckpt")):
        path = Path(name).expanduser()
        if not path.exists():
            raise UserError(f"model {name}: no such file or directory")
        return ["model=roberta.base", f"model.name={quote(path.stem)}", f"model.source={quote(str(path.absolute()))}"]
    raise UserError(f"unknown model {name!r}{suggest(name, options('model'))}; or the path of a *.pt checkpoint")


def quote(value: str) -> str:
    """``value`` as one token of Hydra's override grammar."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def compose(
    overrides: list[str] | None = None,
    *,
    task: str | None = None,
    model: str | None = None,
    data: str | None = None,
    experiment: str | None = None,
) -> Config:
    """Compose the configuration; arguments left out keep the experiment's choice, else the default's.

    Args:
        overrides: ``key=value`` in Hydra's syntax; they win over everything else.

    Raises:
        UserError: an unknown task, model, experiment or key, or a value of the wrong type or range.
    """
    return _checked(_compose(_chosen(task, model, data, experiment) + (overrides or []), keys()))


def compose_tune(
    overrides: list[str],
    *,
    task: str,
    model: str | None = None,
    data: str | None = None,
    experiment: str | None = None,
) -> tuple[Config, TuneConfig]:
    """Compose the configuration that trials start from, and that of the search (``conf/tune/<task>.yaml``).

    Raises:
        UserError: as :func:`compose`; also for a search space that does not exist.
    """
    from omegaconf import open_dict

    chosen = _chosen(task, model, data, experiment)
    tune_keys = [f"tune.{part.name}" for part in dataclasses.fields(TuneConfig)]
    composed = _compose([*chosen, f"+tune={task}", *overrides], [*keys(), *tune_keys])
    tune: TuneConfig = _to_dataclass(TuneConfig, composed.tune, "tune.")
    with open_dict(composed):
        del composed["tune"]
    _check_values({f"tune.{name}": value for name, value in vars(tune).items()})
    if tune.space not in tune.spaces:
        raise UserError(f"unknown tune.space={tune.space}{suggest(tune.space, tune.spaces)}")
    return _checked(composed), tune


def _chosen(task: str | None, model: str | None, data: str | None, experiment: str | None) -> list[str]:
    chosen = [_experiment_override(experiment)] if experiment else []
    chosen += [_choose("task", task)] if task else []
    chosen += _choose_model(model) if model else []
    return chosen + ([_choose("data", data)] if data else [])


def _compose(overrides: list[str], known: list[str]) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # A learning rate for RoBERTa, in conf/tune/: ${lr:2e-5} follows the model as the task's own does.
    OmegaConf.register_new_resolver(
        "lr", lambda value, *, _root_: float(f"{float(value) * _root_.model.lr_factor:.9g}"), replace=True
    )
    search_path = f"hydra.searchpath=[{quote(f'file://{ROOT}')}]"
    _check_keys(overrides, known)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose("run", overrides=[search_path, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"configuration: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(line for line in lines[:2] if not line.startswith(("full_key", "object_type", "See ")))


def keys() -> list[str]:
    """Every dotted key of the schema, for example ``optimizer.lr``."""
    import typing

    names: list[str] = []
    for name, kind in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            names += [f"{name}.{part.name}" for part in dataclasses.fields(kind)]
        else:
            names.append(name)
    return names


def _check_keys(overrides: list[str], known: list[str]) -> None:
    """Refuse a key outside the schema before Hydra words it at length."""
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    known = [*known, *groups]
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"{override!r} is no override; expected key=value, for example optimizer.lr=3e-5")
        name = key.lstrip("+~")
        if name in groups and value not in options(name):
            raise UserError(f"unknown {name} {value!r}{suggest(value, options(name))}")
        if name in known or name.startswith(("experiments", "model.architecture.")):
            continue
        raise UserError(f"unknown key {name!r}{suggest(name, sorted(known))}")


def _checked(composed: Any) -> Config:
    """Convert to the typed schema and check choices and ranges."""
    composed.trainer.gpus = str(composed.trainer.gpus)
    config: Config = _to_dataclass(Config, composed, "")
    _check_values(flatten(config))
    if not re.fullmatch(r"auto|\d+", config.trainer.gpus):
        raise UserError(f"trainer.gpus={config.trainer.gpus}; expected auto or a number of GPUs, 0 for the CPU")
    return config


def _to_dataclass(schema: type, composed: Any, prefix: str) -> Any:
    """Resolve interpolations and convert to the typed schema."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        OmegaConf.resolve(composed)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), composed))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{prefix + key if key else 'configuration'}: {_first_line(error)}") from None


def _check_values(flat: dict[str, Any]) -> None:
    """Check the choices and ranges of the keys that are there."""
    for key, value in flat.items():
        numbers = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, float)]
        if not all(map(math.isfinite, numbers)):
            raise UserError(f"{key}={value}; expected a finite number")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise UserError(f"{key}={value}{suggest(str(value), _CHOICES[key])}")
        if key in _AT_LEAST and value is not None and value < _AT_LEAST[key]:
            raise UserError(f"{key}={value} is too small; expected at least {_AT_LEAST[key]}")
        if key in _AT_MOST and value > _AT_MOST[key]:
            raise UserError(f"{key}={value} is too large; expected at most {_AT_MOST[key]}")
    betas = flat.get("optimizer.betas", (0.0, 0.0))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optimizer.betas={betas}; expected two numbers from 0 to below 1")
    steps = flat.get("trainer.max_steps", -1)
    if steps < 1 and steps != -1:
        raise UserError(f"trainer.max_steps={steps}; expected at least 1, or -1 for no limit")
    interval = flat.get("trainer.val_check_interval", 1)
    if interval <= 0 or (interval > 1 and interval != int(interval)):
        raise UserError(
            f"trainer.val_check_interval={interval}; expected a share of an epoch up to 1, or a whole number of batches"
        )


def flatten(config: Config) -> dict[str, Any]:
    """The whole configuration as dotted keys, with the learning rate in force."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": part for key, part in value.items()})
        else:
            flat[name] = value
    flat["optimizer.lr"] = config.lr
    return flat


# Where and how a run is carried out; none of these keys changes what comes out beyond rounding.
_PLACE = {
    "trainer.gpus",
    "trainer.procs",
    "trainer.checkpoint_every_steps",
    "trainer.checkpoint_every_minutes",
    "data.glue_dir",
    "data.bpe_dir",
}


def recorded(config: Config) -> dict[str, Any]:
    """:func:`flatten` without the passwords of addresses: what is kept of a configuration, wherever that is."""
    return {key: hide_secrets(value) if isinstance(value, str) else value for key, value in flatten(config).items()}


def identity(config: Config) -> dict[str, Any]:
    """The keys of :func:`flatten` that make two trainings the same training."""
    return {
        key: value for key, value in flatten(config).items() if key not in _PLACE and not key.startswith("tracking.")
    }


def digest(config: Config) -> str:
    """Hexadecimal digest of :func:`identity`."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:32]


def unflatten(flat: dict[str, Any]) -> Config:
    """The configuration that :func:`flatten` gave."""
    from omegaconf import OmegaConf

    nested: dict[str, Any] = {}
    for key, value in flat.items():
        group, _, name = key.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[name] = value
    return _checked(OmegaConf.create(nested))
