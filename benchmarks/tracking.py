"""Time of a training step with tracking on, on a server 200 ms away, against tracking off.

Short trainings with the same batches alternate between both; each step is timed alone. The server and the proxy that
delays it are processes of their own on this machine.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

LATENCY = 0.2  # seconds
TARGET = 1.01
_PROXY = (
    "import sys, time; from helpers.servers import Proxy; "
    "print(Proxy(int(sys.argv[1]), {}).uri, flush=True); time.sleep(1e6)"
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="default: %(default)s")
    parser.add_argument("--pairs", type=int, default=24, help="trainings with and without tracking (default: 24 each)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each (default: 20)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def step_seconds(overrides: list[str], model: str, steps: int, uri: str | None) -> list[float]:
    """Train ``steps`` steps after five more for warming up, with tracking on ``uri`` or without any."""
    import pytorch_lightning as pl

    from lightning_glue import config as configuration
    from lightning_glue.tracking.known_runs import run_tags
    from lightning_glue.tracking.logger import MLflowTracker
    from lightning_glue.training.build import build
    from lightning_glue.training.callbacks import TrainingMonitor

    class Timer(pl.Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_batch_start(self, *_: object) -> None:
            self.ends.append(time.perf_counter())

    config = configuration.compose(
        [f"trainer.max_steps={steps + 6}", *overrides], task="SST-2", model=model, data="sample"
    )
    module, data, _ = build(config)
    timer, monitor = Timer(), TrainingMonitor(config.trainer.log_every)
    tracker = MLflowTracker(uri, "bench-tracking", config.run_name) if uri else None
    if tracker:
        tracker.start(configuration.flatten(config), run_tags(config), config.tracking.system_metrics_seconds)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps + 6,
        callbacks=[timer, monitor],
        logger=tracker or False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    if tracker:
        tracker.finish("FINISHED")
        assert len(tracker.history["train/loss"]) == -(-(steps + 6) // config.trainer.log_every)
    return [end - begin for begin, end in zip(timer.ends[5:], timer.ends[6:])]


def interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(10_000))
    return medians[250], medians[9750]


def main() -> None:
    args = parse_arguments()
    import pytorch_lightning  # noqa: F401 - quiet() comes after it
    from common import describe_machine
    from helpers.servers import MlflowServer
    from records import keep

    from lightning_glue.training.allocator import keep_freed_memory
    from lightning_glue.training.messages import quiet

    quiet()
    keep_freed_memory()
    print(describe_machine())
    overrides = ["trainer.gpus=0", "trainer.max_epochs=100", *args.overrides]
    on: list[float] = []
    off: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        server = MlflowServer(Path(folder))
        server.start()
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
        command = [sys.executable, "-c", _PROXY.format(LATENCY), str(server.port)]
        proxy = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert proxy.stdout
        uri = proxy.stdout.readline().strip()
        if not uri:
            sys.exit("the proxy between training and server did not start")
        try:
            step_seconds(overrides, args.model, 5, uri)  # makes caches, imports and the server warm
            ratios = []
            for pair in range(args.pairs):
                sides: dict[str | None, list[float]] = {}
                for side in random.Random(pair).sample([uri, None], 2):
                    sides[side] = step_seconds(overrides, args.model, args.steps, side)
                on += sides[uri]
                off += sides[None]
                ratios.append(statistics.median(sides[uri]) / statistics.median(sides[None]))
        finally:
            proxy.kill()
            server.kill()
            os.chdir(ROOT)
    print(f"{args.model}: {len(on)} steps on each side, load {os.getloadavg()[0]:.1f} at the end")
    print(f"tracking on, server at {LATENCY * 1000:.0f} ms:  {statistics.median(on) * 1000:.2f} ms a step (median)")
    print(f"tracking off:                {statistics.median(off) * 1000:.2f} ms a step")
    low, high = interval(ratios)
    print(
        f"ratio, median of {len(ratios)} pairs: {statistics.median(ratios):.4f} "
        f"(95 % interval {low:.4f} to {high:.4f}), target below {TARGET}"
    )
    keep({"a step with tracking / without": statistics.median(ratios), "low": low, "high": high})


if __name__ == "__main__":
    main()
