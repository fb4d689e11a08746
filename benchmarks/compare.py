"""Training steps of two commits, taken in turn: what a change to the step costs or brings.

    GLUE_DIR=... python benchmarks/compare.py main~1 [AFTER] [--task RTE] [--model minilm] [--pairs 60] [key=value ...]

AFTER is the working tree unless it is said. Both sides train on the same batches from the same weights, each in a
process of its own that waits while the other takes a step: what else the machine does falls on both. Printed are
after/before in wall and in processor time, as medians over the pairs with their quartiles, and whether the losses are
the same. A machine that changes its speed within a second widens the quartiles, not the median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import BASE, ENVIRONMENT, describe_machine, of_shape

from lightning_glue.utils.openmp import SPINS

ROOT = Path(__file__).resolve().parents[1]
_WARM_UP = 3  # steps of each side before the first pair: oneDNN makes its kernels


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="BEFORE", help="a commit")
    parser.add_argument("after", metavar="AFTER", nargs="?", help="a commit; default: the working tree")
    parser.add_argument("--task", default="RTE", help="default: %(default)s")
    parser.add_argument("--model", default="minilm", help="default: %(default)s; base: roberta.base's shape at random")
    parser.add_argument("--pairs", type=int, default=60, help="of steps (default: %(default)s)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    args.overrides = overrides
    if args.after and "=" in args.after:
        args.after, args.overrides = None, [args.after, *args.overrides]
    return args


def step_in_turn(args: argparse.Namespace) -> None:
    """A training whose steps each wait for a line on standard input and answer with one."""
    import time

    from lightning_glue import config as configuration
    from lightning_glue.utils.quick_imports import quick_imports

    steps = args.pairs + _WARM_UP
    config = configuration.compose(
        ["trainer.gpus=0", f"trainer.max_steps={steps}", "trainer.max_epochs=1000",
         *(of_shape(BASE) if args.model == "base" else []), *args.overrides],
        task=args.task, model="minilm" if args.model == "base" else args.model,
        data="glue" if os.environ.get("GLUE_DIR") else "sample",
    )  # fmt: skip
    with quick_imports():
        import pytorch_lightning as pl
        import torch

    from lightning_glue.training.build import Warm, build
    from lightning_glue.training.devices import resolve_precision
    from lightning_glue.training.run import prepare_process

    class Turns(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            sys.stdin.readline()
            self.began = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
            loss = float(outputs["loss"])
            wall, processor = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
            print(json.dumps([wall, processor, loss]), file=answers, flush=True)

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    prepare_process(config)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print("imported", file=answers, flush=True)
    pl.seed_everything(1, verbose=False)
    module, data, _ = build(config, Warm())
    pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, precision=resolve_precision(config.trainer, "cpu"),
        accumulate_grad_batches=config.trainer.accumulate, callbacks=[Turns()], logger=False, limit_val_batches=0,
        use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    ).fit(module, data)  # fmt: skip


def start(checkout: Path) -> subprocess.Popen[str]:
    """A side that has imported what it needs: it looks meanwhile whether the machine is free."""
    # Each would look how busy the machine is while the other one starts: one may spin then, and the other sleep.
    waits = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(SPINS)}
    environment = {**waits, **ENVIRONMENT, "PYTHONPATH": str(checkout)}
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--side", str(checkout)]
    side = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _answer(side)
    return side


def _answer(side: subprocess.Popen[str]) -> str:
    assert side.stdout and side.stderr
    answer = side.stdout.readline()
    if not answer:
        sys.exit(f"a side ended:\n{side.stderr.read()[-2000:]}")
    return answer


def step(side: subprocess.Popen[str]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and loss of the side's next step."""
    assert side.stdin
    side.stdin.write("\n")
    side.stdin.flush()
    wall, processor, loss = json.loads(_answer(side))
    return wall, processor, loss


def compare(before: Path, after: Path, pairs: int) -> None:
    sides = [start(before), start(after)]
    try:
        for side in sides:
            for _ in range(_WARM_UP):
                step(side)
        seen = []
        for number in range(pairs):
            order = sides if number % 2 else sides[::-1]
            answers = {side.pid: step(side) for side in order}
            seen.append([answers[side.pid] for side in sides])
    finally:
        for side in sides:
            side.kill()
            side.communicate()
    for place, name in enumerate(("wall time", "processor time")):
        ratios = [b[place] / a[place] for a, b in seen]
        low, middle, high = statistics.quantiles(ratios, n=4)
        per_step = [statistics.median(one[side][place] for one in seen) * 1000 for side in (0, 1)]
        print(f"{name}: after/before {middle:.4f} (quartiles {low:.3f} to {high:.3f}); "
              f"{per_step[0]:.1f} and {per_step[1]:.1f} ms a step")  # fmt: skip
    differences = [abs(b[2] - a[2]) for a, b in seen]
    same = sum(difference == 0 for difference in differences)
    print(f"losses: {same} of {pairs} the same to the last bit, the largest difference {max(differences):.2g}")


def main() -> None:
    args = parse_arguments()
    if args.side:
        step_in_turn(args)
        return
    print(describe_machine())
    print(f"{args.task}, {args.model}, {' '.join(args.overrides)} {args.pairs} pairs of steps: "
          f"{args.before} before, {args.after or 'the working tree'} after", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        checkouts: list[Path] = []
        for commit in (args.before, args.after):
            checkouts.append(Path(folder) / f"{len(checkouts)}" if commit else ROOT)
            if commit:
                command = ["git", "worktree", "add", "-q", "--detach", str(checkouts[-1]), commit]
                subprocess.run(command, cwd=ROOT, check=True)
        try:
            compare(checkouts[0], checkouts[1], args.pairs)
        finally:
            for checkout in checkouts:
                if checkout != ROOT:
                    subprocess.run(["git", "worktree", "remove", "--force", str(checkout)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
