"""The program under test: commands run as a user would, and a byte-pair encoding small enough for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.store import put_store

ROOT = Path(__file__).resolve().parents[2]
_TRACKED = ("lightning_glue.train", "lightning_glue.tune", "lightning_glue.glue")


def write_small_bpe(folder: Path) -> Path:
    """encoder.json, vocab.bpe and dict.txt with the 256 bytes and the most frequent English letter pairs."""
    from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    pairs = ["Ġ t", "h e", "Ġt he", "i n", "r e", "o n", "Ġ a", "e r", "n d", "Ġ s", "a t", "Ġ w", "e s", "Ġ o", "o u"]
    symbols += [pair.replace(" ", "") for pair in pairs]
    (folder / "encoder.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{pair}\n" for pair in pairs), encoding="utf-8")
    # Like the real dict.txt, not in the order of the ids, and one id short: that one becomes <unk>.
    (folder / "dict.txt").write_text("".join(f"{i} {1000 - i}\n" for i in range(len(symbols) - 2, -1, -1)))
    return folder


def run(
    *command: str, cwd: Path, check: bool = True, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m <command>`` in ``cwd`` with a clean environment; show its output on failure.

    A training or a search that is to succeed finds the tables of its database made, where it is to have its own.
    """
    if (
        check
        and command[0] in _TRACKED
        and not {"MLFLOW_TRACKING_URI", "--help"} & {*os.environ, *environment, *command}
    ):
        put_store(cwd)
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    if check and result.returncode != 0:
        pytest.fail(f"{' '.join(command)} exited with {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def torture(*values: object) -> Any:
    """A case of a parametrized test that ``make torture`` alone tries: a cheaper one shows the same."""
    return pytest.param(*values, marks=pytest.mark.torture)
