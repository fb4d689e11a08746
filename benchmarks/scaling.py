"""How training scales: over DDP processes on the CPU, and with the size of the data.

    GLUE_DIR=... python benchmarks/scaling.py [MODEL [ROUNDS [key=value ...]]]

The keys, such as data.batch_size=64, are for the part with several processes.
Each measurement is a process (or two) of its own, timed over a fixed number of steps after some that are not; the
variants alternate. Tracking and evaluation are off: they have their own benchmark.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_CHILD = "SCALING_STEPS"  # set where this file is to train: steps before the clock starts, and timed ones
WARMUP = 5
VARIANTS = {"1 process x 1 thread": (1, 1), "1 process x 2 threads": (1, 2), "2 processes x 1 thread": (2, 1)}
ROWS = (1024, 10_240, 102_400)  # no batch of 32 is cut short


def train(arguments: Sequence[str], warmup: int, steps: int) -> None:
    """Train as ``lightning_glue.train`` does and print, from each process, the seconds and examples of its steps."""
    from lightning_glue import config as configuration
    from lightning_glue.utils.quick_imports import quick_imports

    model, task, source, *overrides = arguments
    config = configuration.compose(overrides, task=task, model=model, data=source)
    with quick_imports():
        import pytorch_lightning as pl
        from pytorch_lightning.callbacks import Checkpoint

    from lightning_glue.training.build import build
    from lightning_glue.training.run import make_trainer, prepare_process

    class Clock(pl.Callback):
        """Ends the process when the last step is done."""

        examples = 0

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if trainer.global_step > warmup:
                self.examples += len(batch["rows"]) if batch["loss_weight"] else 0
            if trainer.global_step == warmup:
                self.start, self.busy = time.perf_counter(), time.process_time()
            elif trainer.global_step == warmup + steps:
                seconds, busy = time.perf_counter() - self.start, time.process_time() - self.busy
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
                found = {"seconds": seconds, "busy": busy, "examples": self.examples, "peak": peak}
                print(json.dumps(found), flush=True)
                os._exit(0)  # in all processes at the same step

    prepare_process(config)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    module, data, _ = build(config)
    trainer = make_trainer(config, [Clock()], False)  # type: ignore[arg-type]
    trainer.limit_val_batches = 0
    kept = [one for one in trainer.callbacks if not isinstance(one, Checkpoint)]  # type: ignore[attr-defined]
    trainer.callbacks = kept  # type: ignore[attr-defined] # nothing is written at the ends of epochs
    trainer.fit(module, data)


def measure(arguments: Sequence[str], steps: int, threads: int, **environment: str) -> dict[str, float]:
    """Of the steps: seconds, processor seconds and examples of all processes; the highest memory of one in MiB."""
    told = {_CHILD: f"{WARMUP} {steps}", "OMP_NUM_THREADS": str(threads), **environment}
    options = ["trainer.gpus=0", "trainer.max_epochs=10000"]
    command = [sys.executable, __file__, *arguments, *options]
    result = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True)
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"seconds"')]
    if not found:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    together: dict[str, Callable[..., float]] = {"seconds": max, "busy": sum, "examples": sum, "peak": max}
    return {key: how(one[key] for one in found) for key, how in together.items()}


def processes(model: str, rounds: int, steps: int, overrides: Sequence[str]) -> dict[str, float]:
    """Examples/s of RTE with the same batches, cut for one process or for two; the efficiencies."""
    source = "glue" if os.environ.get("GLUE_DIR") else "sample"
    speeds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    worked = set()
    for number in range(rounds):
        for name in list(VARIANTS)[:: 1 if number % 2 else -1]:
            count, threads = VARIANTS[name]
            found = measure([model, "RTE", source, f"trainer.procs={count}", *overrides], steps, threads)
            worked.add(found["examples"])
            speeds[name].append(found["examples"] / found["seconds"])
    assert len(worked) == 1, f"the variants saw different numbers of examples: {worked}"
    for name, measured in speeds.items():
        print(f"{model}, {name:<22} {statistics.median(measured):8.1f} examples/s")
    one, two, ddp = (speeds[name] for name in VARIANTS)
    efficiency = [statistics.median(b / (2 * a) for a, b in zip(one, other)) for other in (ddp, two)]
    print(f"efficiency of the second process {efficiency[0]:.0%}, of the second thread {efficiency[1]:.0%}")
    return {"efficiency of the second process": efficiency[0], "efficiency of the second thread": efficiency[1]}


def write_rows(folder: Path, rows: int) -> None:
    """SST-2 below ``folder``: its first 1024 training rows, again and again, so that only their number differs."""
    from lightning_glue.data import sources
    from lightning_glue.tasks import get_task

    task, glue = get_task("SST-2"), os.environ.get("GLUE_DIR")
    source = sources.glue_directory(task, "glue" if glue else "sample", glue) / task.directory
    (folder / task.directory).mkdir(parents=True)
    for split in task.splits:
        header, *found = (source / split.file_name).read_bytes().splitlines(keepends=True)
        kept = itertools.islice(itertools.cycle(found[: ROWS[0]]), rows) if split == task.train else found
        (folder / task.directory / split.file_name).write_bytes(header + b"".join(kept))


def data_size(model: str, rounds: int, steps: int, folder: Path) -> dict[str, float]:
    """Seconds an example and memory while the data grow, as ratios; the arrays are cached by a run before.

    Plain shuffle: 1024 rows are a single pool of similar lengths, so its batches would have the same shapes in every
    epoch and oneDNN would make fewer kernels for them.
    """
    results: dict[int, list[dict[str, float]]] = {rows: [] for rows in ROWS}
    for rows in ROWS:
        write_rows(folder / str(rows), rows)
    for number in range(rounds + 1):
        for rows, found in results.items():
            there = str(folder / str(rows))
            one = measure([model, "SST-2", "glue", "data.length_pool=1"], steps if number else 1, 1, GLUE_DIR=there)
            if number:
                found.append(one)
    assert len({one["examples"] for found in results.values() for one in found}) == 1, "different numbers of examples"
    for rows, found in results.items():
        took, busy = (
            statistics.median(one[key] / one["examples"] * 1e6 for one in found) for key in ("seconds", "busy")
        )
        peak = statistics.median(one["peak"] for one in found)
        print(
            f"{model}, {rows:7} rows of SST-2: {took:7.1f} us an example, {busy:7.1f} of the processor's, "
            f"{peak:6.0f} MiB at most"
        )
    base, ratios = results[ROWS[0]], {}
    for key, unit in (("seconds", "time an example"), ("busy", "processor's time"), ("peak", "memory")):
        grown = statistics.median(b[key] / a[key] for a, b in zip(base, results[ROWS[-1]]))
        print(f"{ROWS[-1] // ROWS[0]} times the rows: {grown:.3f} times the {unit}")
        ratios[f"{ROWS[-1] // ROWS[0]} times the rows: {unit}"] = grown
    return ratios


def balance(lengths: np.ndarray, batch_size: int, pool: int, world: int) -> float:
    """Real tokens of the busiest process over those of the average one, mean over the batches of an epoch."""
    from lightning_glue.data.batching import split_batch, train_batches

    ratios = []
    for batch in train_batches(lengths, batch_size, 1, 0, pool):
        tokens = [int(lengths[part.indices].sum()) for part in split_batch(batch, lengths, world)]
        ratios.append(max(tokens) / statistics.mean(tokens))
    return statistics.mean(ratios)


def print_balance() -> None:
    """How evenly an epoch of RTE is dealt to processes, with the configuration's batches."""
    from lightning_glue import config as configuration
    from lightning_glue.training.build import build

    source = "glue" if os.environ.get("GLUE_DIR") else "sample"
    config = configuration.compose([], task="RTE", model="minilm", data=source)
    lengths = build(config)[1].splits["train"].lengths
    for world in (2, 4, 8):
        ratio = balance(lengths, config.data.batch_size, config.data.length_pool, world)
        print(f"RTE, batches of {config.data.batch_size} for {world} processes: most tokens / mean {ratio:.3f}")


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "minilm"
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    from common import describe_machine
    from records import keep

    print(describe_machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["LIGHTNING_GLUE_CACHE"] = str(folder / "cache")
        print_balance()
        ratios = processes(model, rounds, 200 if model == "tiny" else 30, sys.argv[3:])
        ratios |= data_size("tiny" if os.environ.get("ROBERTA_BPE_DIR") else model, rounds, 300, folder)
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    keep(ratios)


if __name__ == "__main__":
    if _CHILD in os.environ:
        train(sys.argv[1:], *map(int, os.environ[_CHILD].split()))
    else:
        main()
