"""The library: what fit, load and search promise, with real trainings of a tiny model."""

from __future__ import annotations

import doctest
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.project import ROOT, torture
from helpers.project import run as run_command

import lightning_glue as lg
from lightning_glue import api
from lightning_glue.inference import text_model
from lightning_glue.training.preemption import Preemption

TINY: dict[str, Any] = {"model": "tiny", "data": "sample", "gpus": 0}
TEXTS = ["A man sleeps.", " It rained all day. ", "x " * 900, ""]
PAIRS = ["Somebody is asleep.", "It was dry.", "y " * 900, "Nothing."]
EXAMPLES = {
    name: text
    for module in (api, text_model)
    for test in doctest.DocTestFinder().find(module)
    for name, text in [(test.name, test)]
    if test.examples
}

SEARCHES = ("lightning_glue.api.Study", "lightning_glue.api.search")  # test_a_search is one, too


def state() -> dict[str, Any]:
    """Of this process, as far as a training touches it."""
    return {
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "filters": list(warnings.filters),
        "levels": {name: logging.getLogger(name).level for name in ("pytorch_lightning", "alembic", "optuna")},
        "environment": {name: value for name, value in os.environ.items() if name[:7] != "PYTEST_"},
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }


@dataclass(frozen=True)
class Trained:
    run: lg.Run
    folder: Path
    before: dict[str, Any]
    after: dict[str, Any]


@pytest.fixture(scope="session")
def bpe_dir(small_bpe: Path) -> Path:
    return small_bpe


@pytest.fixture(scope="module")
def folder(
    cache: Path, bpe_dir: Path, new_store: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Where the runs are: the working directory of this module's tests."""
    found, before = tmp_path_factory.mktemp("library"), Path.cwd()
    new_store(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBERTA_BPE_DIR", str(bpe_dir))
        patch.chdir(found)
        yield found
    os.chdir(before)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Trained:
    import pytorch_lightning  # noqa: F401  what importing alone changes is none of a training's doing

    before = state()
    run = lg.fit("RTE", **TINY, max_steps=2, lr=1e-4, overrides={"optimizer.betas": (0.9, 0.99), "seed": np.int64(3)})
    return Trained(run, folder, before, state())


def test_importing_is_light() -> None:
    code = "import sys, lightning_glue as lg; dir(lg), lg.UserError, lg.Diverged; print(*sys.modules)"
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path, check=True)
    heavy = {"torch", "mlflow", "hydra", "numpy", "optuna", "pydantic", "lightning_glue.api"}
    assert not heavy & set(found.stdout.split())
    assert {"fit", "load", "search", "Run", "ConfigError"} <= set(dir(lg))
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = lg.fitt


def test_a_run_is_finished_and_says_what_came_out(trained: Trained) -> None:
    run = mlflow.MlflowClient(f"sqlite:///{trained.folder / 'mlflow.db'}").get_run(trained.run.id)
    assert run.info.status == "FINISHED"
    said = {name: run.data.params[name] for name in ("optimizer.lr", "optimizer.betas", "seed", "trainer.max_steps")}
    assert said == {"optimizer.lr": "0.0001", "optimizer.betas": "[0.9, 0.99]", "seed": "3", "trainer.max_steps": "2"}
    best = {name.removeprefix("best/"): value for name, value in run.data.metrics.items() if name[:5] == "best/"}
    assert trained.run.metrics == pytest.approx(best)
    assert trained.run.folder and (Path(trained.run.folder) / "checkpoint_best.pt").is_file()
    assert hash(trained.run) and trained.run == trained.run


@pytest.mark.parametrize("part", ["handlers", "filters", "levels", "random"])
def test_the_process_is_as_it_was(part: str, trained: Trained) -> None:
    assert trained.after[part] == trained.before[part]


def test_the_environment_keeps_nothing_of_a_training(trained: Trained) -> None:
    changed = dict(trained.after["environment"].items() - trained.before["environment"].items())
    libraries = ("KMP_", "PYTORCH_", "TORCHINDUCTOR_")  # set by their own imports
    assert not [name for name in changed if not name.startswith(libraries)]
    assert trained.before["environment"].keys() <= trained.after["environment"].keys()


def test_every_way_to_name_a_model_loads_the_same(trained: Trained) -> None:
    assert trained.run.folder
    files = Path(trained.run.folder)
    ways: list[Any] = [
        trained.run, trained.run.id, files, files / "checkpoint_best.pt", files.parent / "checkpoints" / "best.ckpt",
        "models:/glue-rte-sample@champion", "models:/glue-rte-sample/1",
    ]  # fmt: skip
    answers = [lg.load(way).predict(TEXTS, PAIRS) for way in ways]
    for way, answer in zip(ways, answers):
        assert np.array_equal(answer.probabilities, answers[0].probabilities), way
    assert answers[0].probabilities.shape == (4, 2)
    assert answers[0].probabilities.sum(1) == pytest.approx(1)
    assert answers[0].classes == ("entailment", "not_entailment")


def test_a_checkpoint_alone_takes_the_tokenizer_of_its_configuration(trained: Trained, tmp_path: Path) -> None:
    assert trained.run.folder
    alone = tmp_path / "best.ckpt"
    alone.write_bytes((Path(trained.run.folder).parent / "checkpoints" / "best.ckpt").read_bytes())
    expected = lg.load(trained.run).predict(TEXTS, PAIRS)
    assert np.array_equal(lg.load(alone).predict(TEXTS, PAIRS).probabilities, expected.probabilities)


def test_answers_are_those_of_pyfunc(trained: Trained) -> None:
    answer = lg.load(trained.run, device="cpu").predict(TEXTS, PAIRS)
    frame = mlflow.pyfunc.load_model(trained.run.folder).predict(pd.DataFrame({"text": TEXTS, "text_pair": PAIRS}))
    assert list(frame["label"]) == answer.labels
    assert np.array_equal(frame.filter(like="probability_").to_numpy(), answer.probabilities)


def test_labels_are_those_that_evaluate_predicts(trained: Trained, cache: Path) -> None:
    flags = [trained.run.id, "--gpus", "0", "--predict", "predicted", "trainer.precision=32-true"]
    run_command("lightning_glue.evaluate", *flags, cwd=trained.folder)
    (file,) = cache.rglob("RTE/test.tsv")
    rows = [line.split("\t") for line in file.read_text().splitlines()[1:]]
    answer = lg.load(trained.run).predict([row[1] for row in rows], [row[2] for row in rows])
    lines = (trained.folder / "predicted" / "RTE.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[1] for line in lines] == answer.labels


def test_one_text_is_one_example_and_none_is_none(trained: Trained) -> None:
    model = lg.load(trained.run)
    one = model.predict(TEXTS[0], PAIRS[0])
    assert len(one) == 1 and one.labels == model.predict(TEXTS[:1], PAIRS[:1]).labels
    nothing = model.predict([], [])
    assert (len(nothing), nothing.probabilities.shape) == (0, (0, 2))


@pytest.mark.parametrize(
    ("texts", "pairs", "said"),
    [
        (["a"], None, r"RTE: 1 texts an example; expected predict\(texts, pairs\)"),
        (["a", "b"], ["c"], "RTE: 2 and 1 texts"),
        (["a", None], ["c", "d"], r"RTE: texts\[1\] holds None, expected a text"),
        (["a"], [float("nan")], r"RTE: pairs\[0\] holds nan"),
        (["a"], ["half \ud83d"], r"RTE: pairs\[0\] holds half a character"),
        (3, ["a"], "texts is 3; expected a text or a list"),
    ],
)
def test_texts_that_cannot_be_meant_are_named(texts: Any, pairs: Any, said: str, trained: Trained) -> None:
    with pytest.raises(lg.DataError, match=said):
        lg.load(trained.run).predict(texts, pairs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_epoch": 3}, "unknown key 'max_epoch'; did you mean 'max_epochs'"),
        ({"source": "x"}, "'source' names 2 keys"),
        ({"overrides": "seed=1"}, "expected a list"),
        ({"overrides": ["seed"]}, "'seed' is no override"),
        ({"overrides": {"optimizer.lrr": 1}}, "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
        ({"lr": float("nan")}, "expected a finite number"),
        ({"lr": object()}, "optimizer.lr is a object"),
        ({"max_epochs": 0}, "trainer.max_epochs=0 is too small"),
        ({"task": "RTEE"}, "unknown task 'RTEE'; did you mean 'RTE'"),
        ({"task": None}, "no task"),
        ({"model": 7}, "model: 7; expected a name or a path"),
    ],
)
def test_arguments_that_cannot_be_meant_are_named(arguments: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(lg.ConfigError, match=said):
        lg.fit(**{"task": "RTE", **TINY, **arguments})


def test_models_that_are_not_there_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(lg.UserError, match="no checkpoint there"):
        lg.load(tmp_path / "nothing.pt")
    with pytest.raises(lg.TrackingError, match="models:/glue-none@champion"):
        lg.load("models:/glue-none@champion")
    with pytest.raises(lg.TrackingError, match="names no model"):
        lg.load("models:/glue-rte")
    (tmp_path / "x.ckpt").write_bytes(b"nothing")
    with pytest.raises(lg.UserError, match=r"x\.ckpt is damaged or holds more"):
        lg.load(tmp_path / "x.ckpt")
    with pytest.raises(lg.ConfigError, match="expected cpu"):
        lg.load(tmp_path, device="tpu")
    for nothing in (None, 5):
        with pytest.raises(lg.CheckpointError, match=f"{nothing}; expected a name or a path"):
            lg.load(nothing)
    with pytest.raises(lg.UserError, match="trials='x'; expected a number"):
        lg.search("RTE", trials="x")


def test_a_training_that_diverges_in_a_thread_raises_and_touches_no_handler(folder: Path) -> None:
    raised: list[BaseException] = []
    before = state()["handlers"]

    def work() -> None:
        try:
            lg.fit("SST-2", **TINY, max_steps=3, lr=1e30, log_every=1)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        assert state()["handlers"] == before
        thread.join(0.2)
    assert [type(error) for error in raised] == [lg.Diverged]


def test_it_is_silent_unless_asked(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lg.fit("SST-2", **TINY, max_steps=1)
    assert capfd.readouterr() == ("", "")
    lg.fit("SST-2", **TINY, max_steps=1, verbose=True)
    assert "SST-2 (generated sample, not GLUE)" in (said := capfd.readouterr().out)
    assert "dev/accuracy" in said


@pytest.mark.torture
def test_ctrl_c_saves_and_the_run_goes_on(folder: Path) -> None:
    def interrupt() -> None:
        known = set(folder.glob("mlruns/*/*"))
        while not any(
            (run / "artifacts/checkpoints/last.ckpt").exists() for run in {*folder.glob("mlruns/*/*")} - known
        ):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    before = state()["handlers"]
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match='fit.resume="') as stopped:
        lg.fit("SST-2", **TINY, max_epochs=1, checkpoint_every_steps=5)
    assert isinstance(stopped.value, lg.Interrupted) and state()["handlers"] == before
    client, run_id = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}"), stopped.value.run_id
    assert client.get_run(run_id).info.status == "KILLED"
    with pytest.raises(lg.UserError, match="contradicts the run's"):
        lg.fit(resume=run_id, seed=7)
    assert lg.fit(resume=run_id).id == run_id
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_second_ctrl_c_interrupts_at_once_and_does_not_exit() -> None:
    with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
        preemption.exits = False
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.4)  # what comes sooner is the same request
        assert preemption.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


NOTEBOOK = """
import lightning_glue as lg
try:
    lg.fit("RTE", model="tiny", data="sample", gpus=0, procs=2, init_from="nowhere.pt")
except lg.UserError as error:
    print(error)
run = lg.fit("RTE", model="tiny", data="sample", gpus=0, procs=2, max_steps=2)
print(run.id, len(lg.load(run).predict("a", "b")))
"""


@pytest.mark.torture
def test_several_processes_from_a_program_that_cannot_be_started_again(folder: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-"],
        input=NOTEBOOK,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert (found.returncode, found.stderr) == (0, "")
    mistake, done = found.stdout.splitlines()
    assert mistake.startswith("nowhere.pt: no checkpoint there")
    run_id, predicted = done.split()
    run = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").get_run(run_id)
    assert (run.info.status, run.data.params["trainer.procs"], predicted) == ("FINISHED", "2", "1")


@pytest.mark.torture
def test_a_search(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = state()["handlers"]
    study = lg.search("SST-2", trials=1, **TINY, study="ours", max_epochs=1)
    assert capfd.readouterr() == ("", "")
    assert state()["handlers"] == before
    assert (study.name, len(study.trials), study.trials[0].state) == ("ours", 1, "complete")
    run = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").get_run(study.best_run)
    assert run.data.metrics["best/dev/accuracy"] == pytest.approx(study.best_value)
    assert "trainer.max_epochs" not in study.best_params
    with pytest.raises(lg.UserError, match="unknown task 'SST2'"):
        lg.search("SST2")
    with pytest.raises(lg.ConfigError, match="unknown key 'trial'"):
        lg.search("SST-2", trial=3)


@pytest.mark.parametrize("name", [torture(name) if name in SEARCHES else name for name in EXAMPLES])
def test_examples_run_as_they_stand(name: str, folder: Path) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    runner.run(EXAMPLES[name], out=said.append)
    assert not said, "".join(said)


def test_every_public_name_has_an_example() -> None:
    names = {"fit", "load", "search", "Run", "Study"}
    assert set(EXAMPLES) == {f"lightning_glue.api.{name}" for name in names} | {
        "lightning_glue.inference.text_model.Model.predict"
    }
