"""Real runs that the tests of a benchmark's results share, and folders of benchmarks built by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import lightning_glue as lg

TINY: dict[str, Any] = {"model": "tiny", "data": "sample", "gpus": 0, "overrides": ["optimizer.lr=3e-3"]}


@dataclass(frozen=True)
class Trained:
    """Attributes: folder: with mlflow.db. mnli: a run of MNLI. rte: two runs that start from its model."""

    folder: Path
    rte: tuple[lg.Run, lg.Run]
    mnli: lg.Run

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"


@pytest.fixture(scope="session")
def trained(
    cache: Path, bpe_dir: Path, new_store: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    folder, before = tmp_path_factory.mktemp("benchmark"), Path.cwd()
    new_store(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBERTA_BPE_DIR", str(bpe_dir))
        patch.chdir(folder)
        mnli = lg.fit("MNLI", max_steps=2, **TINY)
        rte = [lg.fit("RTE", max_steps=8, init_from=mnli, seed=seed, **TINY) for seed in (1, 2)]
        yield Trained(folder, (rte[0], rte[1]), mnli)
    os.chdir(before)


def write_benchmark(folder: Path, tasks: list[str], seeds: list[int], **more: Any) -> Path:
    """benchmark.json and an empty ledger."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"format": 1, "id": "b0", "name": "hand-made", "model": "tiny", "tasks": tasks, "seeds": seeds,
             "experiment": "e", "uri": None, "transfer": False, "keep": "all", "data": "sample"}  # fmt: skip
    (folder / "benchmark.json").write_text(json.dumps(asked | more))
    (folder / "ledger.jsonl").touch()
    return folder
