"""Trials per hour of warm workers against a new process for every trial.

    python benchmarks/tune.py [TRIALS]

The same trials, two searches at the same time, one worker with one thread each, so that both meet the same machine.
Real files are used where GLUE_DIR is set.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import optuna
from common import describe_machine
from optuna.trial import FrozenTrial
from records import keep

COMMAND = [
    "--task", "RTE", "--model", "minilm", "--gpus", "0", "--data", "glue" if os.environ.get("GLUE_DIR") else "sample",
    "tune.sampler=random", "tune.pruner=none", "trainer.max_steps=10", "tracking.system_metrics_seconds=null",
    "data.batch_size=16", "trainer.val_check_interval=1.0",
]  # fmt: skip


def search(folder: Path, name: str, trials: int, *extra: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lightning_glue.tune", *COMMAND, "--study", name, "--trials", str(trials)]
    command += ["--storage", f"sqlite:///{folder / name}.db", f"tracking.uri=sqlite:///{folder / name}-runs.db", *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finished(folder: Path, name: str) -> list[FrozenTrial]:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder / name}.db").trials


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    print(describe_machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kinds = {"warm": "tune.warm=true", "cold": "tune.warm=false"}
        for process in [search(folder, name, trials, flag) for name, flag in kinds.items()]:
            if process.wait() != 0:
                sys.exit("a search failed; run its command by hand to see why")
        results = {name: finished(folder, name) for name in kinds}
    work = {name: [(trial.params, trial.value) for trial in results[name]] for name in kinds}
    assert work["warm"] == work["cold"], "the two searches did different work"
    between = {}
    for name, done in results.items():
        starts = sorted(trial.datetime_start for trial in done if trial.datetime_start)
        between[name] = statistics.median((b - a).total_seconds() for a, b in itertools.pairwise(starts[1:]))
        first = statistics.median(trial.user_attrs["first_step_seconds"] for trial in done[1:])
        print(
            f"{name}: {3600 / between[name]:.0f} trials an hour ({between[name]:.2f} s from one to the next); "
            f"from the job to its first optimizer step {first:.2f} s"
        )
    print(f"warm workers run {between['cold'] / between['warm']:.2f} times as many short trials (10 steps, evaluation)")
    keep({"trials of warm workers / cold": between["cold"] / between["warm"]})


if __name__ == "__main__":
    main()
