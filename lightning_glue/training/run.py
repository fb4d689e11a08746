"""One tracked training: from a configuration to a run with the best model, its figures and predictions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.errors import Diverged
from lightning_glue.tasks import get_task
from lightning_glue.training.build import Warm, build
from lightning_glue.training.preemption import Preemption, Stopped
from lightning_glue.training.status import run_status
from lightning_glue.training.trainer import evaluation_interval, make_callbacks, make_trainer, prepare_process
from lightning_glue.utils.launch import is_distributed_child
from lightning_glue.utils.quick_imports import quick_imports

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from lightning_glue.data.datamodule import GlueDataModule
    from lightning_glue.model.pretrained import Pretrained
    from lightning_glue.tracking.logger import MLflowTracker
    from lightning_glue.training.callbacks import BestEvaluation
    from lightning_glue.training.module import GlueModule
    from lightning_glue.training.resume import Resume


class Caller:
    """What the caller of :func:`train` adds to a training; by itself nothing.

    Attributes:
        tags: of the run, besides the usual ones.
        parent: what tells the run's parent, see :class:`~lightning_glue.tracking.logger.MLflowTracker`.
        callbacks: of Lightning, besides the usual ones.
        checkpoints: folder for them instead of the run's.
        warm: what an earlier training left in this process.
        shows: evaluations and progress on the terminal.
    """

    tags: Mapping[str, str] = {}
    parent: dict[str, str] | None = None
    callbacks: Sequence[pl.Callback] = ()
    checkpoints: Path | None = None
    warm: Warm | None = None
    shows: bool = True

    def find(self, config: Config) -> Resume | None:
        """The interrupted run to go on with; asked before anything is made."""
        return None

    def built(self, training: Training) -> None:
        """Model and data are there; ``training.found`` may still be changed. There is no run yet."""

    def started(self, training: Training) -> None:
        """The run is there; called in process 0 alone."""

    def ending(self, training: Training, best: BestEvaluation) -> None:
        """All is done but the run's status."""


@dataclass
class Training:
    """A training and what it is made of.

    Attributes:
        pretrained: what the model started from.
        found: the interrupted run that is continued.
        register: the best model, once the run is finished.
        best: the best evaluation, once there is one.
    """

    config: Config
    module: GlueModule
    data: GlueDataModule
    pretrained: Pretrained
    tracker: MLflowTracker
    found: Resume | None = None
    register: bool = False
    best: BestEvaluation | None = None
    preemption: Preemption = field(default_factory=Preemption)

    def carry_out(self, caller: Caller) -> BestEvaluation:
        """Train in one tracked run, new or ``found``; what comes out is in the run and in ``module``.

        Raises:
            Diverged: the weights are no longer numbers; the run is FAILED.
        """
        leader = not is_distributed_child()
        found, config, tracker, preemption = self.found, self.config, self.tracker, self.preemption
        with preemption:
            with preemption.acting_at_once():
                tags = self._tags(caller) if leader else {}
                seconds = config.tracking.system_metrics_seconds
                tracker.start(configuration.recorded(config), tags, seconds, found.run_id if found else None)
            if leader:
                caller.started(self)
            kept = config.tracking.checkpoints or caller.checkpoints is not None
            preemption.saved_step = found.step if found and found.path else None
            with run_status(tracker, self.register, preemption, kept=kept), ExitStack() as stack:
                folder = caller.checkpoints
                if leader:
                    folder = folder or stack.enter_context(checkpoint_folder(config, tracker))
                    self._log_origin(stack, folder)
                if found:
                    self.data.start = found.position
                preemption.check()
                self.best = self.fit(folder, caller.callbacks, shows=caller.shows)
                if leader:
                    if caller.shows:
                        print("last step done; writing the best model and figures", flush=True)
                    self.conclude(self.best)
                caller.ending(self, self.best)
                if leader and caller.shows:
                    print(f"delivering to MLflow{', registering the model' if self.register else ''}", flush=True)
        return self.best

    def check(self, checkpoints: Path | None) -> None:
        """Look for what would end the training late, before there is a run; see ``trainer.preflight``.

        Raises:
            UserError: a folder cannot be written, the disk is too small, or the longest batch does not fit into memory.
        """
        from lightning_glue.training import auto_batch, preflight
        from lightning_glue.training.devices import resolve_devices

        config, data, found = self.config, self.data, self.found
        if found:
            self._divide(auto_batch.as_recorded(config, found))
        if not config.trainer.preflight:
            return
        path = found.path if found else None
        already = sum(one.stat().st_size for one in path.parent.glob("*.ckpt")) if path else 0
        preflight.check_folders(config, self.module, checkpoints, already)
        world = resolve_devices(config.trainer).world
        padded = not self.module.model.runs_unpadded
        rows = preflight.longest_batch(data, config.trainer.max_epochs, config.trainer.max_steps, padded=padded)
        train = data.splits["train"]

        def attempt(accumulate: int) -> None:
            part = train[preflight.longest_part(rows, train, world * accumulate)]
            if not preflight.surely_fits(self.module, part, config):
                preflight.probe(self.module, part, config)

        fixed = found is not None and found.path is not None
        accumulate = auto_batch.fitting(self.config, world, attempt, fixed=fixed)
        self._divide(auto_batch.divided(self.config, accumulate))

    def _divide(self, config: Config) -> None:
        """Go on with another division of the steps into micro-batches."""
        self.config, self.data.accumulate = config, config.trainer.accumulate
        self.module.origin.config = configuration.recorded(config)

    def _tags(self, caller: Caller) -> dict[str, str]:
        from lightning_glue.tracking.known_runs import run_tags
        from lightning_glue.tracking.own_tasks import task_tag
        from lightning_glue.training import auto_batch
        from lightning_glue.training.describe import gpus_in_force, in_force
        from lightning_glue.training.devices import resolve_devices

        chosen = auto_batch.tags(self.config, resolve_devices(self.config.trainer).world)
        come_from = {f"lineage.{name}": value for name, value in self.module.origin.lineage.items()}
        return {
            **run_tags(self.config),
            **in_force(self.config),
            **gpus_in_force(self.config),
            **chosen,
            **come_from,
            **(task_tag(self.config.task.description) if self.config.task.description else {}),
            **caller.tags,
        }

    def _log_origin(self, stack: ExitStack, checkpoints: Path) -> None:
        """What the run was made from, and the best checkpoints so far of one that goes on."""
        from lightning_glue.tracking import provenance
        from lightning_glue.training.describe import CONFIG_FILE, config_file
        from lightning_glue.training.resume import split_digests, told_to_children

        splits = self.data.prepared.splits
        self.module.origin.run_id, self.module.origin.data = self.tracker.run_id, split_digests(splits)
        self.tracker.log_inputs(self.module.task.name, splits)
        self.tracker.log_text(provenance.git_diff(), "git.diff")
        self.tracker.log_text(config_file(self.config, self.tracker.run_id), CONFIG_FILE)
        self._describe()
        stack.enter_context(told_to_children(self.found, self.tracker))
        for name in self.found.carry_best(checkpoints) if self.found else []:
            if checkpoints == self.tracker.artifacts / "checkpoints":
                self.tracker.log_artifact(f"checkpoints/{name}")

    def _describe(self, best: BestEvaluation | None = None) -> None:
        from lightning_glue.training.describe import NOTE, note

        self.tracker.set_tags({NOTE: note(self.config, self.data, self.tracker.run_id, best)})

    def fit(self, checkpoints: Path | None, more: Sequence[pl.Callback] = (), *, shows: bool = True) -> BestEvaluation:
        """Train, from the checkpoint that was found if any, and leave the best weights in ``module`` of process 0.

        The last step is always followed by an evaluation.

        Args:
            shows: evaluations and progress on the terminal.

        Raises:
            Stopped: the processes agreed to stop.
            Diverged: the weights are no longer numbers.
        """
        from lightning_glue.model.roberta import drops_layers
        from lightning_glue.training.checkpoints import Checkpoints
        from lightning_glue.training.lightning_internals import keep_signal_handlers

        module, data = self.module, self.data
        callbacks = [*more, *make_callbacks(self.config, checkpoints, self.preemption, shows=shows)]
        interval = evaluation_interval(self.config, len(data.train_dataloader()))
        dropping = drops_layers(module.model)
        trainer = make_trainer(self.config, callbacks, self.tracker, interval, some_unused=dropping)
        keep_signal_handlers(trainer)
        trainer.fit(module, data, ckpt_path=self.found.path if self.found else None)
        saving = callbacks[-1]
        assert isinstance(saving, Checkpoints)
        if saving.stop:
            raise Stopped(saving.stop)
        if module.diverged:
            raise Diverged(module.diverged, self.config.lr)
        if trainer.is_global_zero:
            module.load_state_dict(saving.best_weights())
        return saving.best

    def conclude(self, best: BestEvaluation) -> None:
        """In process 0: the best model as a fairseq directory, figures, predictions, the best metrics.

        A request to stop is acted on between two of them, and between two batches of the predictions.
        """
        from lightning_glue.model.roberta import HEAD
        from lightning_glue.training import figures

        task, tracker = self.module.task, self.tracker
        self._tag_majority(best)
        tracker.log_metrics({f"best/{name}": value for name, value in best.values.items()}, step=best.step)
        self._describe(best)
        if self.config.tracking.checkpoints:
            self._export(best)
        self.preemption.check()
        drawn = {"learning_curves.png": figures.learning_curves(task, tracker.history)}
        for split, evaluation in best.evaluations.items():
            drawn |= figures.evaluation_figures(task, split, evaluation)
        tracker.log_figures(drawn)
        self.preemption.check()
        if self._analyses:
            self._write_errors(best)
            self.preemption.check()
        if self.config.trainer.predict:
            head = self.module.model.classification_heads[HEAD]  # the one module that every way through the model calls
            head.register_forward_pre_hook(lambda *_: self.preemption.check())
            with tracker.artifact_folder("predictions") as folder:
                self.write_predictions(folder)

    def _tag_majority(self, best: BestEvaluation) -> None:
        """Say what saying the most frequent class would score, rounded as what a run logs is."""
        import numpy as np

        from lightning_glue.tracking.registry import MAJORITY
        from lightning_glue.training.metrics import majority_value

        level = majority_value(self.module.task, best.evaluations[self.module.task.dev[0].name].targets)
        self.tracker.set_tags({MAJORITY: repr(float(np.float32(level)))})

    @property
    def _analyses(self) -> bool:
        """Whether errors are looked into; nobody looks at those of a search's trials, whose models are not kept."""
        return self.config.tracking.errors and self.config.tracking.checkpoints

    def _write_errors(self, best: BestEvaluation) -> None:
        from lightning_glue.training.errors import write_errors

        with self.tracker.artifact_folder("errors") as folder:
            model, tokenizer = self.module.model, self.pretrained.tokenizer
            self.tracker.set_tags(write_errors(self.config, model, tokenizer, self.data, best, folder))

    def _export(self, best: BestEvaluation) -> None:
        from lightning_glue.data.labels import fairseq_symbols
        from lightning_glue.export.fairseq import export
        from lightning_glue.tracking import model_card
        from lightning_glue.tracking.artifacts import EXPORT_DIGEST
        from lightning_glue.training.card_facts import of_training
        from lightning_glue.training.devices import resolve_devices
        from lightning_glue.training.errors import fitted_temperature
        from lightning_glue.utils.digests import file_sha256

        task, tokenizer = self.module.task, self.pretrained.tokenizer
        symbols = fairseq_symbols(task, self.data.prepared.directory)
        kept = settings(self.config, self.data)
        if self._analyses and (temperature := fitted_temperature(task, best)) is not None:
            kept["temperature"] = temperature
        with self.tracker.artifact_folder("fairseq") as folder:
            model = self.module.model.cpu()
            export(model, task, tokenizer, symbols, best.step, folder, kept)
            minutes = self.tracker.minutes * resolve_devices(self.config.trainer).world
            facts = of_training(self.config, self.module, self.data, best, self.tracker.run_id, minutes)
            model_card.write(folder, facts, "fairseq")
            self.tracker.set_tags({EXPORT_DIGEST: file_sha256(folder / "checkpoint_best.pt")})

    def write_predictions(self, folder: Path) -> None:
        """Leaderboard files of the task's test splits, and of AX for a model of MNLI."""
        from lightning_glue.data.binarize import prepare_configured
        from lightning_glue.inference.submission import write_submissions
        from lightning_glue.training.devices import resolve_devices, resolve_precision

        accelerator = resolve_devices(self.config.trainer).accelerator
        task, model = self.module.task, self.module.model.to(accelerator)
        test_sets = [(task, self.data.prepared)]
        if task.name == "MNLI":
            ax = get_task("AX")
            test_sets.append((ax, prepare_configured(ax, self.config.data, self.pretrained.tokenizer)))
        for test_task, prepared in test_sets:
            write_submissions(
                model,
                test_task,
                prepared,
                folder,
                eval_tokens=self.data.eval_tokens,
                max_tokens=self.data.max_tokens,
                precision=resolve_precision(self.config.trainer, accelerator),
            )


def train(config: Config, caller: Caller | None = None, *, register: bool = False) -> Training:
    """One training, from raw files to a tracked, reloadable model.

    Args:
        register: the best model, once the run is finished.

    Raises:
        UserError: nothing can be trained with this configuration on this machine.
        Diverged: the weights ceased to be numbers.
        SystemExit: it was asked to stop, and did so in order.
    """
    from lightning_glue.tracking.watcher import watch

    caller = caller or Caller()
    if not is_distributed_child():
        watch()  # it gets ready meanwhile
    with quick_imports():
        import pytorch_lightning as pl

    prepare_process(config)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    found = caller.find(config)
    tracker = make_tracker(config)
    tracker.parent = caller.parent
    training = Training(config, *build(config, caller.warm), tracker, found, register)
    caller.built(training)
    training.check(caller.checkpoints)
    training.carry_out(caller)
    return training


def make_tracker(config: Config) -> MLflowTracker:
    from lightning_glue.tracking.logger import MLflowTracker

    return MLflowTracker(config.tracking.uri, config.experiment, config.run_name, config.tracking.journal)


@contextmanager
def checkpoint_folder(config: Config, tracker: MLflowTracker) -> Iterator[Path]:
    """The run's artifact folder for checkpoints, or one that is thrown away."""
    from lightning_glue.training.resume import scratch

    if config.tracking.checkpoints:
        yield tracker.artifacts / "checkpoints"
        return
    with scratch(Path(config.tracking.journal)) as folder:
        yield folder


def settings(config: Config, data: GlueDataModule) -> dict[str, Any]:
    """What decides a run's score besides its weights, as plain values: the defaults of whatever loads the model again.

    Keys are those of the configuration, with the length and the precision in force; ``GLUE_DIR`` stands in place of
    ``data.glue_dir`` where the folder came from the environment. ``sha256`` has the digests of the dev files.
    """
    from lightning_glue.training.devices import resolve_devices, resolve_precision

    kept: dict[str, Any] = {
        "data.source": config.data.source,
        "data.on_bad_row": config.data.on_bad_row,
        "data.max_tokens": data.max_tokens,
        "data.eval_tokens": config.data.eval_tokens,
        "trainer.precision": resolve_precision(config.trainer, resolve_devices(config.trainer).accelerator),
        "sha256": {split.name: data.prepared.splits[split.name].sha256 for split in data.task.dev},
    }
    if config.data.source == "glue" and config.data.glue_dir:
        inherited = config.data.glue_dir == os.environ.get("GLUE_DIR")
        folder = os.path.abspath(os.path.expanduser(config.data.glue_dir))
        kept["GLUE_DIR" if inherited else "data.glue_dir"] = folder
    return kept
