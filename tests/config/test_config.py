from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.project import ROOT, run

from lightning_glue import config
from lightning_glue.errors import UserError
from lightning_glue.tasks import TRAINABLE

FAIRSEQ_RECIPES = {  # examples/roberta/config/finetuning: learning rate, batch
    "CoLA": (1e-5, 16),
    "SST-2": (1e-5, 32),
    "MRPC": (1e-5, 16),
    "STS-B": (2e-5, 16),
    "QQP": (1e-5, 32),
    "MNLI": (1e-5, 32),
    "QNLI": (1e-5, 32),
    "RTE": (2e-5, 16),
}


def test_every_task_has_a_recipe_and_every_recipe_a_task() -> None:
    assert set(config.options("task")) == set(TRAINABLE)


@pytest.mark.parametrize("task", sorted(FAIRSEQ_RECIPES))
def test_the_default_recipe_is_fairseqs(task: str) -> None:
    import fairseq
    from omegaconf import OmegaConf

    name = task.lower().replace("-", "_")
    theirs = OmegaConf.load(Path(fairseq.__file__).parent / f"examples/roberta/config/finetuning/{name}.yaml")
    ours = config.compose(task=task, model="roberta.base")
    assert [ours.lr] == list(theirs.optimization.lr)
    assert ours.data.batch_size == theirs.dataset.batch_size
    assert ours.trainer.max_epochs == theirs.optimization.max_epoch
    assert ours.optimizer.betas == [0.9, 0.98]
    assert (ours.optimizer.eps, ours.optimizer.weight_decay) == (1e-6, theirs.optimizer.weight_decay)
    assert (ours.model.dropout, ours.model.attention_dropout) == (theirs.model.dropout, theirs.model.attention_dropout)
    assert ours.trainer.gradient_clip_val == theirs.optimization.clip_norm
    assert (ours.lr, ours.data.batch_size) == FAIRSEQ_RECIPES[task]


def test_overrides_win_over_experiment_and_experiment_over_defaults() -> None:
    settings = config.compose(["optimizer.lr=3e-4", "model.dropout=0"], task="RTE", experiment="paper/roberta_base")
    assert (settings.task.name, settings.model.name) == ("RTE", "roberta.base")
    assert (settings.lr, settings.model.dropout) == (3e-4, 0.0)
    assert config.flatten(settings)["optimizer.lr"] == 3e-4


@pytest.mark.parametrize("name", config.experiments())
def test_every_experiment_composes(name: str) -> None:
    assert config.compose(experiment=name, task=None if name == "demo" else "RTE").task.name in TRAINABLE


def test_small_models_learn_faster() -> None:
    assert config.compose(task="RTE", model="minilm").lr == pytest.approx(1e-4)
    assert config.flatten(config.compose(task="RTE", model="minilm"))["optimizer.lr"] == pytest.approx(1e-4)


def test_glue_dir_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLUE_DIR", "/somewhere")
    assert config.compose().data.glue_dir == "/somewhere"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "sst2"}, "unknown task 'sst2'; did you mean 'SST-2'?"),
        ({"task": "AX"}, "AX has no training data: train --task MNLI"),
        ({"model": "robertabase"}, "unknown model 'robertabase'; did you mean 'roberta.base'?"),
        ({"model": "no/such.pt"}, "model no/such.pt: no such file or directory"),
        ({"data": "glu"}, "unknown data 'glu'; did you mean 'glue'?"),
        ({"experiment": "paper/base"}, "unknown experiment 'paper/base'; did you mean 'paper/roberta_base'?"),
        ({"overrides": ["optimizer.lrr=1"]}, "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ({"overrides": ["lr=1"]}, "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        ({"overrides": ["learning_rate=1"]}, "unknown key 'learning_rate'; did you mean 'optimizer.lr'?"),
        ({"overrides": ["epochs=1"]}, "unknown key 'epochs'; did you mean 'trainer.max_epochs'?"),
        ({"overrides": ["n_gpus=1"]}, "unknown key 'n_gpus'; did you mean 'trainer.gpus'?"),
        ({"overrides": ["trainer.xyz=1"]}, "unknown key 'trainer.xyz'; expected one of: trainer.accumulate, "),
        ({"overrides": ["task=RTEE"]}, "unknown task 'RTEE'; did you mean 'RTE'?"),
        ({"overrides": ["lr"]}, "'lr' is no override; expected key=value"),
        ({"overrides": ["trainer.max_epochs=ten"]}, "trainer.max_epochs=ten; expected a whole number"),
        ({"overrides": ["trainer.precision=fp16"]}, "trainer.precision=fp16"),
        ({"overrides": ["data.batch_size=0"]}, "data.batch_size=0 is too small; expected at least 1"),
        ({"overrides": ["model.dropout=2"]}, "model.dropout=2 is too large; expected at most 1"),
        ({"overrides": ["optimizer.lr=inf"]}, "optimizer.lr=inf; expected a finite number"),
        ({"overrides": ["optimizer.betas=[0.9,nan]"]}, "optimizer.betas=[0.9, nan]; expected a finite number"),
        ({"overrides": ["optimizer.betas=[0.9]"]}, "optimizer.betas=[0.9]; expected two numbers"),
        ({"overrides": ["seed=-1"]}, "seed=-1 is too small; expected at least 0"),
        ({"overrides": ["trainer.max_steps=0"]}, "trainer.max_steps=0; expected at least 1, or -1 for no limit"),
        ({"overrides": ["trainer.val_check_interval=0"]}, "trainer.val_check_interval=0; expected a share"),
        ({"overrides": ["trainer.val_check_interval=1.5"]}, "trainer.val_check_interval=1.5; expected a share"),
        ({"overrides": ["trainer.gpus=two"]}, "trainer.gpus=two; expected auto or a number of GPUs"),
    ],
)
def test_mistakes_name_what_is_valid(arguments: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config.compose(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", ["train", "evaluate", "preprocess"])
def test_help_and_argument_errors_import_nothing_heavy(module: str) -> None:
    code = f"""
import sys
sys.argv = ["{module}", "--help"]
from lightning_glue import {module}
try:
    {module}.main()
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {{"torch", "fairseq", "mlflow", "pytorch_lightning", "hydra", "numpy", "omegaconf"}} & set(sys.modules)
assert heavy <= ({{"numpy"}} if "{module}" == "preprocess" else set()), heavy
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "usage: python -m lightning_glue" in result.stdout


def test_the_command_line_prints_one_line_and_exits_2(tmp_path: Path) -> None:
    result = run("lightning_glue.train", "--task", "sst2", cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: unknown task 'sst2'; did you mean 'SST-2'?\n"
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_option_is_one_line_too(tmp_path: Path) -> None:
    for command, message in {
        ("train", "--bogus"): "unrecognized arguments: --bogus",
        ("tune",): "the following arguments are required: --task",
        ("evaluate",): "the following arguments are required: RUN_ID|PATH",
    }.items():
        result = run(f"lightning_glue.{command[0]}", *command[1:], cwd=tmp_path, check=False)
        assert result.returncode == 2
        assert result.stderr == f"error: {message}; see python -m lightning_glue.{command[0]} --help\n"


def test_make_help_names_every_target() -> None:
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    targets = [
        line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if ": " in line and "##" in line
    ]
    assert len(targets) >= 8
    for target in targets:
        assert f"make {target} " in result.stdout


def test_a_recorded_configuration_is_checked_as_a_composed_one() -> None:
    flat = config.flatten(config.compose())
    assert config.flatten(config.unflatten(flat)) == flat
    for change, message in {
        ("seed", True): "seed=true; expected a number",
        ("trainer.accumulate", None): "trainer.accumulate=None; expected a whole number",
        ("trainer.accumulat", 1): "unknown key 'trainer.accumulat'",
        ("data.eval_tokens", "x"): "data.eval_tokens=x; expected a whole number",
        ("seed", 2**32): "seed=4294967296 is too large; expected at most 4294967295",
    }.items():
        with pytest.raises(UserError, match=f"^{message}$"):
            config.unflatten(flat | dict([change]))
    del flat["trainer.procs"]
    with pytest.raises(UserError, match=r"^trainer\.procs is missing$"):
        config.unflatten(flat)


def test_a_recipe_for_any_task_wants_one() -> None:
    with pytest.raises(UserError, match="experiment paper/roberta_base is for any task; give --task as well"):
        config.compose(experiment="paper/roberta_base")
    assert config.compose(["task=RTE"], experiment="paper/roberta_base").task.name == "RTE"
    assert config.compose(experiment="demo").task.name == "SST-2"


def test_a_folder_that_is_there_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-roberta").mkdir()
    monkeypatch.chdir(tmp_path)
    found = config.compose(model="my-roberta").model
    assert (found.name, found.source) == ("my-roberta", str(tmp_path / "my-roberta"))
