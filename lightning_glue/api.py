"""The library: :func:`fit`, :func:`load` and :func:`search`, as ``lightning_glue`` exports them.

They raise and never exit, print nothing unless asked to, and leave signal handlers, warning filters, logging levels,
random states and the environment as they were. What is to be said besides goes through the logger ``lightning_glue``.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lightning_glue.config.arguments import Overrides, make_overrides, to_overrides
from lightning_glue.data.own import data_of_call
from lightning_glue.errors import CheckpointError, ConfigError, Interrupted, UserError
from lightning_glue.utils.console import no_bars
from lightning_glue.utils.quick_imports import quick_imports

Data: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | None

if TYPE_CHECKING:
    from lightning_glue.config import Config
    from lightning_glue.inference.text_model import Model


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        id: MLflow's id of the run.
        metrics: of the best evaluation, by name: ``dev/accuracy`` and the like from 0 to 1 (correlations from -1),
            ``dev/loss`` in nats (regression: squared error of the scaled target).
        folder: directory of the exported best model on this machine, which :func:`load` and fairseq read; None where
            artifacts are in a remote store, or with ``checkpoints=False``.

    >>> import lightning_glue as lg
    >>> run = lg.fit("SST-2", model="tiny", data="sample", max_steps=2)
    >>> len(run.id), sorted(run.metrics)
    (32, ['dev/accuracy', 'dev/loss'])
    """

    id: str
    metrics: Mapping[str, float] = field(hash=False)
    folder: str | None


@dataclass(frozen=True)
class Trial:
    """One trial of a study.

    Attributes:
        number: counted from 0.
        state: ``complete``, ``pruned``, ``fail``, ``running`` or ``waiting``.
        value: the selection metric's highest; of a pruned trial the last one; None without an evaluation.
        params: what it was trained with, by dotted key.
        runs: ids of its MLflow runs, one for each seed or attempt.
    """

    number: int
    state: str
    value: float | None
    params: Mapping[str, Any] = field(hash=False)
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A search, as far as it has come.

    Attributes:
        name: of the study; :func:`search` with the same name goes on with it.
        best_value: the task's selection metric of the best trial, for example accuracy from 0 to 1.
        best_params: its hyperparameters by dotted key, as ``overrides`` of :func:`fit` takes them.
        best_run: id of its (last) MLflow run.
        run_id: of the study's own MLflow run.
        trials: all of them, by number.

    >>> import lightning_glue as lg
    >>> study = lg.search("SST-2", trials=1, model="tiny", data="sample", overrides={"trainer.max_epochs": 1})
    >>> study.best_value == study.trials[0].value, study.trials[0].state
    (True, 'complete')
    """

    name: str
    best_value: float
    best_params: Mapping[str, Any] = field(hash=False)
    best_run: str | None
    run_id: str
    trials: tuple[Trial, ...] = field(repr=False)


def fit(
    task: str | None = None,
    model: str | os.PathLike[str] | None = None,
    data: Data = None,
    *,
    train: str | os.PathLike[str] | None = None,
    dev: str | os.PathLike[str] | Mapping[str, str] | None = None,
    test: str | os.PathLike[str] | Mapping[str, str] | None = None,
    text: str | int | Sequence[str | int] | None = None,
    label: str | int | None = None,
    kind: str | None = None,
    name: str | None = None,
    experiment: str | None = None,
    resume: str | None = None,
    init_from: str | Run | None = None,
    gpus: int | str | None = None,
    procs: int | None = None,
    overrides: Overrides = (),
    verbose: bool = False,
    **keys: Any,
) -> Run:
    """Fine-tune a model on a GLUE task or on data of your own, in a tracked MLflow run; blocks until it is finished.

    It does what ``python -m lightning_glue.train`` does, in this process. Several GPUs or processes are workers
    started for it, whatever this process is (a script, a notebook); under torchrun or srun it is their processes.
    Ctrl-C, SIGTERM and a closed terminal end it after the step, with a checkpoint, where it runs in the main thread;
    in another thread no signal handler is touched. One training at a time in a process. What another process than the
    first of torchrun's or srun's gets has metrics alone.

    Args:
        task: CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE or WNLI; may be left out with an ``experiment``, where
            ``resume`` names a run, and for data of your own.
        model: ``minilm``, ``roberta.base``, ..., the path of a fairseq ``*.pt`` or of a folder of Hugging Face, or
            ``owner/name`` of its hub. Default: where it runs on a GPU
            ``roberta.base``, else ``minilm``.
        data: ``glue`` (``$GLUE_DIR``, else the cache, else a download) or ``sample`` (generated); of your own the path
            of a description, or a dictionary with its keys (``docs/data.md``), such as ``labels`` or ``class_weights``.
        train: file of your own to train on: TSV, CSV, JSON lines or Parquet, by its suffix.
        dev, test: files to select the best checkpoint by and to predict; several by name. Default: a tenth of it; none.
        text: its column, or two of them for a pair; numbers count from 0 in files without a header.
        label: column of the labels.
        kind: ``classes`` (default), ``regression`` or ``multi-label``.
        name: of data of your own. Default: the file's.
        experiment: a recipe below ``experiments/``.
        resume: id or ``last.ckpt`` of an interrupted run that goes on; ``auto``: the newest of this configuration.
        init_from: run or checkpoint whose encoder is the start.
        gpus: of this machine; 0: the CPU. Default: one if there is one.
        procs: DDP processes on the CPU.
        overrides: any key of ``conf/``: ``["optimizer.lr=1e-5"]``, or ``{"optimizer.lr": 1e-5}``.
        verbose: print what is trained on, a line for each evaluation, and progress on a terminal.
        keys: keys of ``conf/`` by their last part, where that names one: ``max_epochs=3, lr=1e-5, batch_size=16``.

    Returns:
        The :class:`Run`.

    Raises:
        ConfigError: an unknown task, model or key, or a value out of range.
        DataError: the task's files are missing or malformed.
        CheckpointError: what the model is to start from cannot be used.
        TrackingError: MLflow or the run to resume cannot be used.
        Diverged: the weights ceased to be numbers; the run is FAILED.
        UserError: the base of all these.
        Interrupted: (a KeyboardInterrupt) it was told to stop; the run is KILLED, and the text says how to go on.

    >>> import lightning_glue as lg
    >>> run = lg.fit("RTE", model="tiny", data="sample", max_steps=2, overrides=["optimizer.warmup_ratio=0.1"])
    >>> sorted(run.metrics), run.folder.endswith("fairseq")
    (['dev/accuracy', 'dev/loss'], True)
    >>> with open("films.csv", "w") as file:
    ...     _ = file.write("review,stars\\n" + "A fine film.,5\\nA dull film.,1\\n" * 20)
    >>> run = lg.fit(train="films.csv", text="review", label="stars", model="tiny", max_steps=2)
    >>> sorted(run.metrics)
    ['dev/accuracy', 'dev/f1', 'dev/loss']
    """
    data = data_of_call(data, train=train, dev=dev, test=test, text=text, label=label, kind=kind, name=name)
    start = init_from.id if isinstance(init_from, Run) else init_from
    flags = {"trainer.gpus": None if gpus is None else str(gpus), "trainer.procs": procs, "init_from": start}
    given = make_overrides({key: value for key, value in flags.items() if value is not None}, overrides, keys)
    if task is None and experiment is None and resume in (None, "auto") and not isinstance(data, Mapping):
        raise ConfigError(
            'no task; expected fit("RTE", ...), fit(train="train.csv", text=..., label=...), or an experiment, or the '
            "id of a run to resume"
        )
    asked = {
        "task": task,
        "model": None if model is None else _name_or_path("model", model, ConfigError),
        "data": data,
        "experiment": experiment,
    }
    config = _compose(asked, given, resume)
    with _in_library(verbose):
        from lightning_glue.execution.fit_call import fit_for_caller

        done = fit_for_caller(config, resume, verbose)
    return Run(done.run_id, done.metrics, done.folder)


def _compose(asked: dict[str, Any], given: dict[str, Any], resume: str | None) -> Config:
    """The configuration that is asked for, or that of the run to resume."""
    from lightning_glue import config as configuration
    from lightning_glue.training.default_model import with_default_model

    overrides, named = to_overrides(given), {name: asked[name] for name in ("task", "data", "experiment")}
    present = with_default_model(
        lambda model: configuration.compose(overrides, model=model, **named),
        asked["model"],
        asked["experiment"],
        overrides,
        lambda config: config.trainer.gpus,
    )
    if resume in (None, "auto"):
        return present
    from lightning_glue.training.own_config import asked_keys, continued
    from lightning_glue.training.resume import find

    own = find(str(resume), present)
    assert own
    return continued(str(resume), own.record["config"], present, asked_keys(str(resume), asked, overrides))


def _name_or_path(what: str, given: Any, error: type[UserError]) -> str:
    try:
        return os.fspath(given)
    except TypeError:
        raise error(f"{what}: {given!r}; expected a name or a path") from None


@contextmanager
def _in_library(verbose: bool) -> Iterator[None]:
    """Import what takes seconds; afterwards the process is as it was before."""
    with quick_imports(freeze=False):
        import pytorch_lightning  # noqa: F401

        from lightning_glue.training.messages import LOGGERS
        from lightning_glue.utils.guest import as_a_guest

    with ExitStack() as stack:
        stack.callback(gc.collect)  # models and trainers refer to one another
        stack.enter_context(as_a_guest([*LOGGERS, "fairseq", "optuna"]))
        if not verbose:
            stack.enter_context(no_bars())
        yield


def load(
    run: Run | str | os.PathLike[str], *, uri: str | None = None, device: str | None = None, calibrated: bool = False
) -> Model:
    """The model of a run, to predict with. Nothing in its files is executed.

    Args:
        run: a :class:`Run`; an MLflow run id; ``models:/glue-rte@champion`` or ``models:/glue-rte/3``; an exported
            directory or a ``*.pt`` in one; or a ``*.ckpt`` of a training, whose tokenizer is that of the run's export
            beside it, else the one its configuration names; or a classifier's folder of Hugging Face.
        uri: the tracking store of a run id or a registered model. Default: MLFLOW_TRACKING_URI, else ``mlflow.db``.
        device: ``cpu`` or ``cuda``. Default: the GPU if there is one.
        calibrated: divide the outputs by the temperature that was fitted on the run's dev set, so that probabilities
            say how often the model is right; labels stay as they are.

    Returns:
        :class:`~lightning_glue.inference.text_model.Model` with ``predict(texts, pairs)``.

    Raises:
        CheckpointError: nothing is there, or no model that can be used.
        TrackingError: the store cannot be used, or has no such run or model.
        UserError: the base of both.

    >>> import lightning_glue as lg
    >>> run = lg.fit("SST-2", model="tiny", data="sample", max_steps=2)
    >>> model = lg.load(run)
    >>> len(model.predict(["A fine film.", "A dull film."]).labels)
    2
    """
    from lightning_glue.pipeline.loading import load_model

    if isinstance(run, Run):
        run = run.folder if run.folder and os.path.isdir(run.folder) else run.id
    return load_model(_name_or_path("load", run, CheckpointError), uri, device, calibrated=calibrated)


def search(
    task: str | None = None,
    trials: int | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    data: Data = None,
    train: str | os.PathLike[str] | None = None,
    dev: str | os.PathLike[str] | Mapping[str, str] | None = None,
    text: str | int | Sequence[str | int] | None = None,
    label: str | int | None = None,
    kind: str | None = None,
    name: str | None = None,
    experiment: str | None = None,
    study: str | None = None,
    storage: str | None = None,
    workers: int | Literal["auto"] | None = None,
    gpus: int | None = None,
    gpus_per_trial: int = 1,
    trials_per_gpu: int = 1,
    procs: int = 1,
    retries: int | None = None,
    overrides: Overrides = (),
    verbose: bool = False,
    **keys: Any,
) -> Study:
    """Search a task's hyperparameters with Optuna; blocks until this machine's share of the study is done.

    It does what ``python -m lightning_glue.tune`` does. Trials are trainings in processes of their own; the same call
    again goes on with the study. Ctrl-C gives unfinished trials back.

    Args:
        task, model, data, train, dev, text, label, kind, name, experiment: as of :func:`fit`.
        trials: of the whole study. Default: ``conf/tune/<task>.yaml``, for data of your own ``conf/tune/default.yaml``.
        study: its name. Default: made of task, model, data and space.
        storage: an address of Optuna's, or the path of a journal file. Default: OPTUNA_STORAGE, else ``optuna.db``.
        workers: trials at a time on this machine; ``"auto"``: as many as do the most examples a second, which is
            measured first.
        gpus: of this machine to use; 0: the CPU. Default: all.
        gpus_per_trial, trials_per_gpu, procs, retries: as of the command.
        overrides, keys: as of :func:`fit`; a key of the search space is then fixed. ``tune.seeds=5`` and the like too.
        verbose: print what the command prints.

    Returns:
        The :class:`Study`.

    Raises:
        ConfigError, DataError, CheckpointError, TrackingError: as of :func:`fit`.
        UserError: the base of these; also where the storage cannot be used, or no trial completed.
        Interrupted: (a KeyboardInterrupt) it was told to stop.

    >>> import lightning_glue as lg
    >>> study = lg.search("SST-2", trials=1, model="tiny", data="sample", workers=1, max_epochs=1)
    >>> sorted(study.best_params)[:2]
    ['data.batch_size', 'model.dropout']
    """
    data = data_of_call(data, train=train, dev=dev, text=text, label=label, kind=kind, name=name)
    given = make_overrides({}, overrides, keys, tune=True)
    with _in_library(verbose):
        from lightning_glue.tuning.request import DEFAULT_STORAGE, Request
        from lightning_glue.tuning.search import run

        done = run(
            Request(
                task,
                None if model is None else _name_or_path("model", model, ConfigError),
                data,
                experiment,
                trials,
                study,
                storage or os.environ.get("OPTUNA_STORAGE") or DEFAULT_STORAGE,
                workers,
                gpus,
                gpus_per_trial,
                trials_per_gpu,
                procs,
                retries,
                to_overrides(given),
            ),
            shows=verbose,
        )
        if done.stopped_by:
            name = done.study.name
            raise Interrupted(f'stopped by {done.stopped_by.name}; search(..., study="{name}") goes on', done.run_id)
        if done.error:
            raise UserError(done.error)
        return _study(done.study, done.run_id)


def _study(shared: Any, run_id: str) -> Study:
    from lightning_glue.tuning.results import best_trial
    from lightning_glue.tuning.slots import is_surplus

    def runs(trial: Any) -> tuple[str, ...]:
        return tuple(trial.user_attrs.get("runs", ()))

    best = best_trial(shared)
    if best is None:
        raise UserError(f"study {shared.name!r}: no trial completed yet; others are at work")
    trials: Sequence[Trial] = [
        Trial(trial.number, trial.state.name.lower(), trial.value, dict(trial.params), runs(trial))
        for trial in shared.trials()
        if not is_surplus(trial)
    ]
    of_best, value = runs(best), best.value
    assert value is not None  # it is complete
    return Study(shared.name, value, dict(best.params), of_best[-1] if of_best else None, run_id, tuple(trials))
