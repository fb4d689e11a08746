"""Hydra's composition of a configuration, with errors that name the nearest valid task, model, recipe or key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lightning_glue.config import paths
from lightning_glue.config.check import checked
from lightning_glue.config.schema import OWN, Config, TuneConfig, keys, task_of
from lightning_glue.errors import ConfigError, suggest
from lightning_glue.tasks import TASKS
from lightning_glue.utils.paths import is_hub_name

Data: TypeAlias = str | Mapping[str, Any] | None


def options(group: str) -> list[str]:
    """Names of a group's files, for example the models."""
    return sorted(path.stem for path in (paths.CONF / group).glob("[!_]*.yaml"))


def experiments() -> list[str]:
    """Names of the recipes below experiments/, here and the program's, for example ``paper/roberta_base``."""
    folders = [root / "experiments" for root in paths.recipe_roots()]
    return sorted({str(path.relative_to(one).with_suffix("")) for one in folders for path in one.rglob("*.yaml")})


def _experiment_override(name: str) -> str:
    if name not in experiments():
        raise ConfigError(f"unknown experiment {name!r}{suggest(name, experiments())}")
    package, _, leaf = f"experiments/{name}".rpartition("/")
    return f"+{package}={leaf}"


def _check_task(experiment: str | None, task: object, overrides: list[str]) -> None:
    """Raise ConfigError where a recipe for any task comes without one."""
    if experiment not in experiments() or task or any(one.startswith("task=") for one in overrides):
        return
    files = (root / "experiments" / f"{experiment}.yaml" for root in paths.recipe_roots())
    if "override /task:" not in next(file for file in files if file.is_file()).read_text(encoding="utf-8"):
        raise ConfigError(f"experiment {experiment} is for any task; give --task as well, for example --task RTE")


def _choose(group: str, name: str) -> str:
    if group == "task" and name == "AX":
        raise ConfigError("AX has no training data: train --task MNLI, then predict AX with it (trainer.predict=true)")
    if name not in options(group):
        raise ConfigError(f"unknown {group} {name!r}{suggest(name, options(group))}")
    return f"{group}={name}"


def models_in_words() -> str:
    """What ``--model`` takes, for ``--help``."""
    return (
        f"one of {', '.join(options('model'))}, the path of a fairseq *.pt or of a folder (fairseq's or Hugging "
        "Face's), or owner/name of its hub (default: roberta.base if on a GPU, else minilm)"
    )


def _choose_model(name: str) -> list[str]:
    """A named model, the path of a checkpoint or folder of fairseq or Hugging Face, or ``owner/name`` of its hub."""
    if name in options("model"):
        return [f"model={name}"]
    if is_hub_name(name):
        return ["model=roberta.base", f"model.name={quote(name.partition('/')[2])}", f"model.source={quote(name)}"]
    path = Path(name).expanduser()
    if "/" in name or name.endswith((".pt", ".ckpt")) or path.exists():
        if not path.exists():
            raise ConfigError(f"model {name}: no such file or directory")
        return ["model=roberta.base", f"model.name={quote(path.stem)}", f"model.source={quote(str(path.absolute()))}"]
    near = suggest(name, options("model"))
    raise ConfigError(f"unknown model {name!r}{near}; or the path of a *.pt checkpoint or of a folder")


def quote(value: str) -> str:
    """``value`` as one token of Hydra's override grammar."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def compose(
    overrides: list[str] | None = None,
    *,
    task: str | None = None,
    model: str | None = None,
    data: Data = None,
    experiment: str | None = None,
) -> Config:
    """Compose the configuration; arguments left out keep the experiment's choice, else the default's.

    Args:
        data: name of a file of ``conf/data/``, or the resolved description of data of one's own.
        overrides: ``key=value`` in Hydra's syntax; they win over everything else.

    Raises:
        UserError: an unknown task, model, experiment or key, or a value of the wrong type or range.
    """
    _check_task(experiment, task or isinstance(data, Mapping), overrides or [])
    composed = _compose(_chosen(task, model, data, experiment) + (overrides or []), keys())
    config = _with_description(_plain(composed), data)
    config.recipe = experiment or ""
    return config


def compose_tune(
    overrides: list[str],
    *,
    task: str | None,
    model: str | None = None,
    data: Data = None,
    experiment: str | None = None,
) -> tuple[Config, TuneConfig]:
    """Compose the configuration that trials start from, and that of the search (``conf/tune/<task>.yaml``, else
    ``conf/tune/default.yaml``).

    Raises:
        UserError: as :func:`compose`; also for a search space that does not exist.
    """
    chosen = _chosen(task, model, data, experiment)
    tune_keys = [f"tune.{part.name}" for part in dataclasses.fields(TuneConfig)]
    tune_file = task if task in options("tune") else "default"
    composed = _compose([*chosen, f"+tune={tune_file}", *overrides], [*keys(), *tune_keys])
    values = _plain(composed)
    tune = checked(TuneConfig, values.pop("tune"), "tune.")
    if tune.space not in tune.spaces:
        raise ConfigError(f"unknown tune.space={tune.space}{suggest(tune.space, tune.spaces)}")
    return _with_description(values, data), tune


def _chosen(task: str | None, model: str | None, data: Data, experiment: str | None) -> list[str]:
    chosen = [_experiment_override(experiment)] if experiment else []
    if isinstance(data, Mapping):
        if task:
            raise ConfigError(f"--task {task}, but --data describes {data['name']}; leave --task out")
        chosen += [f"task={OWN}", f"data={OWN}"]
    chosen += [_choose("task", task)] if task else []
    chosen += _choose_model(model) if model else []
    return chosen + ([_choose("data", data)] if isinstance(data, str) else [])


def _with_description(values: dict[str, Any], data: Data) -> Config:
    """The typed configuration, with the description of data of one's own; a built-in task's stays in ``conf/``."""
    task, own = values["task"], values["data"]["source"] == "own"
    if isinstance(data, Mapping):
        task |= {"name": data["name"], "description": dict(data)}
    elif not own:
        task.pop("description", None)
    elif not task.get("description") or task["name"] in TASKS:
        raise ConfigError("data.source=own has no description; give --data FILE.yaml, see docs/data.md")
    config = checked(Config, values)
    task_of(config)
    return config


def _compose(overrides: list[str], known: list[str]) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # A learning rate for RoBERTa, in conf/tune/: ${lr:2e-5} follows the model as the task's own does.
    OmegaConf.register_new_resolver(
        "lr", lambda value, *, _root_: float(f"{float(value) * _root_.model.lr_factor:.9g}"), replace=True
    )
    # conf/ comes first: nothing but a recipe is ever taken from the current folder.
    search_path = f"hydra.searchpath=[{','.join(quote(f'file://{root}') for root in paths.recipe_roots())}]"
    _check_keys(overrides, known)
    # Hydra copies its store, of which there is one, for every composition: fairseq registers thousands of nodes in it.
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
    try:
        with initialize_config_dir(str(paths.CONF), version_base="1.3"):
            return hydra_compose("run", overrides=[search_path, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"configuration: {_first_line(error)}") from None


def _plain(composed: Any) -> dict[str, Any]:
    """The composed values, interpolations resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key or 'configuration'}: {_first_line(error)}") from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(line for line in lines[:2] if not line.startswith(("full_key", "object_type", "See ")))


def _check_keys(overrides: list[str], known: list[str]) -> None:
    """Refuse a key outside the schema before Hydra words it at length."""
    groups = [path.name for path in paths.CONF.iterdir() if path.is_dir()]
    known = [*known, *groups]
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is no override; expected key=value, for example optimizer.lr=3e-5")
        name = key.lstrip("+~")
        if name in groups and value not in (*options(name), OWN):
            raise ConfigError(f"unknown {name} {value!r}{suggest(value, options(name))}")
        if name in known or name.startswith(("experiments", "model.architecture.")):
            continue
        usual = [key for key in sorted(known) if name.startswith("task.") or not key.startswith("task.")]
        raise ConfigError(f"unknown key {name!r}{suggest(name, usual)}")
