"""Importing fast leaves nothing behind that behaves otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_glue.utils.quick_imports import Deferred, deferred

AFTERWARDS = """
import sys
from lightning_glue.utils.quick_imports import NEVER_CALLED, quick_imports
with quick_imports():
    import torchmetrics
    from fairseq.criterions import sentence_prediction
    from fairseq.tasks.audio_classification import sklearn_metrics
print(*(name for name in NEVER_CALLED if name in sys.modules))
assert sentence_prediction.f1_score([1, 0, 1], [1, 1, 1]) == sklearn_metrics.f1_score([1, 0, 1], [1, 1, 1]) == 0.8
assert round(sentence_prediction.pearsonr([1, 2, 3], [3, 2, 1])[0], 6) == -1
import scipy.signal, scipy.stats, sklearn.metrics
import transformers
for module in scipy.signal, scipy.stats, sklearn, sklearn.metrics, transformers:
    assert module.__file__ and type(module).__name__ != "Deferred", module
assert transformers.RobertaConfig().hidden_size == 768
assert scipy.signal.windows.hamming(4).shape == (4,)
"""


@pytest.mark.torture
def test_modules_left_out_are_there_when_they_are_called() -> None:
    result = subprocess.run([sys.executable, "-c", AFTERWARDS], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "\n"), result.stderr


BEGINNING = """
import sys
from lightning_glue import config
from lightning_glue.training.run import Caller, train
from lightning_glue.utils.quick_imports import NEVER_CALLED

class Beginning(Caller):
    def find(self, config):  # as the command's, which looks for a run to go on with
        from lightning_glue.training import resume
        return None

    def built(self, training):
        print(*(name for name in NEVER_CALLED if name in sys.modules), file=sys.stderr)
        sys.exit(0)

train(config.compose(["trainer.gpus=0"], task="WNLI", model="tiny", data="sample"), Beginning())
"""


def test_a_training_begins_without_them(small_bpe: Path, cache: Path, tmp_path: Path) -> None:
    """Whatever comes first in a process decides whether the others are quick."""
    environment = {**os.environ, "ROBERTA_BPE_DIR": str(small_bpe)}
    command = [sys.executable, "-c", BEGINNING]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stderr) == (0, "\n"), result.stderr


def test_modules_that_are_there_already_stay() -> None:
    import colorsys
    import concurrent.futures as futures

    with deferred("colorsys", "concurrent.futures"):
        assert sys.modules["colorsys"] is colorsys and sys.modules["concurrent.futures"] is futures


def test_stand_ins_go_away_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import xml

    for name in ("wave", "xml.dom"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(KeyError), deferred("wave", "xml.dom"):
        import wave

        assert isinstance(wave, Deferred) and isinstance(xml.dom, Deferred)
        raise KeyError
    from xml.dom import minidom

    assert "wave" not in sys.modules and minidom.parseString("<a/>").documentElement.tagName == "a"
