"""Importing fast leaves nothing behind that behaves otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

AFTERWARDS = """
import sys
from lightning_glue.utils.quick_imports import NEVER_CALLED, quick_imports
with quick_imports():
    import torch
    import torchmetrics
    from fairseq.criterions import sentence_prediction
    from fairseq.tasks.audio_classification import sklearn_metrics
print(*(name for name in NEVER_CALLED if name in sys.modules))
assert sentence_prediction.f1_score([1, 0, 1], [1, 1, 1]) == sklearn_metrics.f1_score([1, 0, 1], [1, 1, 1]) == 0.8
assert round(sentence_prediction.pearsonr([1, 2, 3], [3, 2, 1])[0], 6) == -1
matrix = torchmetrics.ConfusionMatrix(task="multiclass", num_classes=2)
matrix.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
figure, axes = matrix.plot()
assert matrix.plot(ax=axes)[1] is axes and figure.axes[0] is axes
import scipy.signal, scipy.stats, sklearn.metrics
import transformers
import matplotlib.axes, matplotlib.pyplot
for module in (scipy.signal, scipy.stats, sklearn, sklearn.metrics, transformers,
               matplotlib, matplotlib.axes, matplotlib.pyplot):
    assert module.__file__ and type(module).__name__ != "Deferred", module
assert transformers.RobertaConfig().hidden_size == 768
assert scipy.signal.windows.hamming(4).shape == (4,)
"""


@pytest.mark.torture
def test_modules_left_out_are_there_when_they_are_called() -> None:
    result = subprocess.run([sys.executable, "-c", AFTERWARDS], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "\n"), result.stderr


BEGINNING = """
import os, sys
from lightning_glue import config
from lightning_glue.training.run import Caller, train
from lightning_glue.utils.quick_imports import NEVER_CALLED

class Beginning(Caller):
    shows = False

    def find(self, config):  # as the command's, which looks for a run to go on with
        from lightning_glue.training import resume
        return None

    def built(self, training):
        import pytorch_lightning as pl

        class FirstStep(pl.Callback):
            def on_train_batch_end(self, trainer, *_):
                trainer.optimizers[0].state_dict()  # as a checkpoint does
                print(*(name for name in (*NEVER_CALLED, "torch._dynamo") if name in sys.modules), file=sys.stderr)
                os._exit(0)

        self.callbacks = [FirstStep()]

train(config.compose(["trainer.gpus=0"], task="WNLI", model="tiny", data="sample"), Beginning())
"""


def test_a_training_begins_without_them(small_bpe: Path, cache: Path, tmp_path: Path) -> None:
    """Whatever comes first in a process decides whether the others are quick."""
    environment = {**os.environ, "ROBERTA_BPE_DIR": str(small_bpe)}
    command = [sys.executable, "-c", BEGINNING]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stderr) == (0, "\n"), result.stderr
