"""The benchmarks can be started: what they import is there, also in the programs that they start."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.project import ROOT
from helpers.zygote import FORKED

from lightning_glue.config import compose

IMPORT = """
import importlib, sys
from pathlib import Path

sys.path[:0] = [sys.argv[1]]
names = sorted(path.stem for path in Path(sys.argv[1]).glob("*.py"))
print(*[importlib.import_module(name).__name__ for name in names])
"""


def test_every_benchmark_is_imported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKED + IMPORT, str(ROOT / "benchmarks")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"common", "records", "tracking", "train"} <= {*done.stdout.split()}


@pytest.mark.parametrize("model", ["minilm", "tiny"])
def test_a_shape_is_taken_by_every_model(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    common = importlib.import_module("common")
    config = compose(common.of_shape(common.BASE), model=model)
    assert (config.model.source, dict(config.model.architecture)) == ("random", common.BASE)


@pytest.mark.parametrize("shape", ["base", "minilm"])
def test_products_alone_are_those_of_the_shape(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each parameter, where every token is the first of its row: the last layer leaves nothing out."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    train, peers = importlib.import_module("train"), importlib.import_module("peers")
    sizes = train.SHAPES[shape]
    width, inner, layers = (sizes[f"encoder_{name}"] for name in ("embed_dim", "ffn_embed_dim", "layers"))
    layer = SimpleNamespace(fc1=SimpleNamespace(in_features=width, out_features=inner))
    encoder = SimpleNamespace(sentence_encoder=SimpleNamespace(layers=[layer] * layers))
    shapes = peers.linear_shapes(SimpleNamespace(encoder=encoder), 7, 7)
    assert sum(rows * inputs * outputs for rows, inputs, outputs in shapes) == 7 * train.multiplied(sizes)


@pytest.mark.parametrize("precisions", [["fp32"], ["bf16"], ["bf16", "fp32"]])
def test_sides_of_any_precision_are_checked(precisions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    train = importlib.import_module("train")
    run = {"train_examples": 16, "eval_examples": 8, "real_tokens": 160, "loss": 0.7}
    results = {f"lightning-glue {precision}": [dict(run)] for precision in precisions}
    train.check_same_work(results, 16, 8, 10.0)
    results[f"lightning-glue {precisions[0]}"].append({**run, "loss": 0.8})
    with pytest.raises(SystemExit, match="loss 0.80000 before training, not 0.70000"):
        train.check_same_work(results, 16, 8, 10.0)


def test_the_proxy_of_the_tracking_benchmark_begins(tmp_path: Path) -> None:
    code = "import sys; sys.path[:0] = [sys.argv.pop(1)]; import tracking\nexec(tracking._PROXY.format(0.2))"
    command = [sys.executable, "-c", FORKED + code, str(ROOT / "benchmarks"), "9"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline().startswith("http://127.0.0.1:")
    process.kill()
    process.communicate()
