"""Training and evaluation of one shape: lightning-glue, fairseq-hydra-train and Hugging Face's Trainer.

    GLUE_DIR=... ROBERTA_BPE_DIR=... python benchmarks/train.py [--tasks RTE SST-2] [--shape base] [--rounds 2]

Every side trains the same number of steps from the same (random) weights, with the recipe's batch and its own
sampler, then evaluates the same dev rows, in a process of its own; the sides take turns. Dropout is on. The bf16 sides
take part where the processor multiplies bf16 matrices itself; elsewhere they are slower than float32. "Products alone"
multiplies matrices of the shapes of our steps and does nothing else: what no change around the products can exceed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import BASE, ENVIRONMENT, MINILM, describe_machine, matmul_rate
from peers import SIDES
from records import keep

from lightning_glue import config as configuration
from lightning_glue.tasks import Split, Task, get_task
from lightning_glue.training.devices import cpu_has_bf16

LENGTHS = 0.05  # what the sides' examples may differ in length on average
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
SHAPES = {"base": BASE, "minilm": MINILM}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["RTE", "SST-2"], help="default: RTE SST-2")
    parser.add_argument("--shape", choices=list(SHAPES), default="base", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=12, help="timed in a round, after as many (default: %(default)s)")
    parser.add_argument("--dev", type=int, default=128, help="dev rows (default: %(default)s)")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), help="default: all this processor has")
    return parser.parse_args()


def write_rows(task_name: str, rows: dict[str, int | None], seed: int, folder: Path) -> Path:
    """A GLUE folder with as many rows of each split (None: all), drawn at random."""
    task = get_task(task_name)
    source = Path(os.environ["GLUE_DIR"]) / task.directory
    (folder / task.directory).mkdir(parents=True)
    for split in task.splits:
        if split.name in rows:
            lines = (source / split.file_name).read_text(encoding="utf-8").rstrip("\n").split("\n")
            header = [lines.pop(0)] if split.header else []
            chosen = random.Random(seed).sample(lines, rows[split.name] or len(lines))
            text = "".join(f"{line}\n" for line in [*header, *chosen])
            (folder / task.directory / split.file_name).write_text(text, encoding="utf-8")
    return folder


def mean_length(task: Task, split: Split, directory: Path) -> float:
    from lightning_glue.data.datamodule import load_split

    return float(load_split(task, split, directory, 512).lengths.mean())


def multiplied(shape: dict[str, int]) -> int:
    """Parameters of the matrix products of an encoder."""
    width, inner = shape["encoder_embed_dim"], shape["encoder_ffn_embed_dim"]
    return shape["encoder_layers"] * (4 * width * width + 2 * width * inner)


def make_start(task: Task, shape: dict[str, int], steps: int, dev: int, folder: Path) -> dict[str, float]:
    """Rows, and random weights of a shape; real tokens an example has on average, by kind."""
    import torch

    from lightning_glue.data import binarize, sources
    from lightning_glue.data.labels import read_label_symbols
    from lightning_glue.data.tokenizer import load_tokenizer
    from lightning_glue.export.fairseq import export
    from lightning_glue.model.pretrained import Pretrained
    from lightning_glue.model.roberta import build_model

    train = task.splits[0]
    torch.manual_seed(0)
    tokenizer = load_tokenizer("gpt2", os.environ.get("ROBERTA_BPE_DIR"))
    size = configuration.compose([], task=task.name).data.batch_size
    rows = write_rows(task.name, {"train": None, "dev": dev}, 0, folder / "glue")
    prepared = binarize.prepare(task, rows, tokenizer, sources.cache_dir())
    (folder / "bin").symlink_to(prepared.directory)
    symbols = read_label_symbols(prepared.directory)
    lengths = {
        "train": mean_length(task, train, prepared.directory),
        "eval": mean_length(task, task.dev[0], prepared.directory),
    }
    for seed in itertools.count():  # rows that are as long on average, their labels in the same order by frequency
        few = write_rows(task.name, {"train": steps * size, "dev": None}, seed, folder / f"few-{seed}")
        made = binarize.prepare(task, few, tokenizer, folder / "cache").directory
        as_long = abs(mean_length(task, train, made) / lengths["train"] - 1) < LENGTHS / 2
        if as_long and read_label_symbols(made) == symbols:
            break
    (few / task.directory / "dev.tsv").write_bytes((rows / task.directory / "dev.tsv").read_bytes())
    (folder / "few").symlink_to(binarize.prepare(task, few, tokenizer, folder / "cache").directory)
    model = build_model(Pretrained(shape, None, tokenizer, ""), task.num_outputs, {"dropout": 0.1})
    export(model, task, tokenizer, symbols, 0, folder / "start")
    return lengths


def measure(side: str, task: str, steps: int, folder: Path) -> dict[str, Any]:
    """Run one side in a process of its own."""
    environment = {**ENVIRONMENT, "GLUE_DIR": str(folder / "glue"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("peers.py")), side, task, str(folder), str(steps)]
    with tempfile.TemporaryDirectory() as home:
        result = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith('{"side"')]
    if result.returncode or not lines:
        sys.exit(f"{side} failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return json.loads(lines[-1])


def check_same_work(results: dict[str, list[dict[str, Any]]], train: int, dev: int, length: float) -> None:
    """Exit unless every side saw as many examples, as long ones, and computed the same loss before training."""
    losses = {SIDES[name].precision: runs[0]["loss"] for name, runs in results.items()}
    expected = losses["fp32" if "fp32" in losses else "bf16"]
    for name, runs in results.items():
        for run in runs:
            if (run["train_examples"], run["eval_examples"]) != (train, dev):
                sys.exit(f"{name} saw {run['train_examples']} and {run['eval_examples']} examples, not {train}, {dev}")
            if abs(run["real_tokens"] / train / length - 1) > LENGTHS:
                sys.exit(f"{name}: {run['real_tokens'] / train:.1f} real tokens an example, not {length:.1f}")
            if abs(run["loss"] - expected) > TOLERANCE[SIDES[name].precision]:
                sys.exit(f"{name}: loss {run['loss']:.5f} before training, not {expected:.5f}")


def print_table(
    results: dict[str, list[dict[str, Any]]], lengths: dict[str, float], rates: dict[str, float], parameters: int
) -> dict[str, float]:
    """Print speeds; ours over each of the others, by ``<train or eval>: <ours> / <theirs>``."""

    def speed(side: str, kind: str) -> float:
        return statistics.median(run[f"{kind}_examples"] / run[f"{kind}_seconds"] for run in results[side])

    peers = [name for name in results if not SIDES[name].ours]
    found: dict[str, float] = {}
    for kind in ("train", "eval"):
        print(f"\n{kind}: examples/s (range) | times " + " | times ".join(peers) + " | share of the matmul rate")
        for side, runs in results.items():
            values = [run[f"{kind}_examples"] / run[f"{kind}_seconds"] for run in runs]
            ratios = " | ".join(f"{speed(side, kind) / speed(peer, kind):5.2f}" for peer in peers)
            flops = (6 if kind == "train" else 2) * parameters * lengths[kind]
            share = speed(side, kind) * flops / rates[SIDES[side].precision]
            if SIDES[side].ours:
                found |= {f"{kind}: {side} / {peer}": speed(side, kind) / speed(peer, kind) for peer in peers}
                found[f"{kind}: {side}, share of the matmul rate"] = share
            print(f"{side:<28}{speed(side, kind):7.2f} ({min(values):.2f}-{max(values):.2f}) | {ratios} | {share:.0%}")
    return found


def compare(task: Task, args: argparse.Namespace) -> dict[str, float]:
    """Measure all sides in turn on one task and print the tables; the ratios."""
    size, shape = configuration.compose([], task=task.name).data.batch_size, SHAPES[args.shape]
    precisions = {"fp32", "bf16"} if cpu_has_bf16() else {"fp32"}
    sides = args.sides or [name for name, side in SIDES.items() if side.precision in precisions]
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as temporary:
        lengths = make_start(task, shape, args.steps, args.dev, Path(temporary))
        for _ in range(args.rounds):
            for side in sides:
                results[side].append(measure(side, task.name, args.steps, Path(temporary)))
    check_same_work(results, args.steps * size, args.dev, lengths["train"])
    trained = f"{args.steps} steps of {size} examples, {lengths['train']:.1f} real tokens each"
    print(f"\n{task.name}, {args.shape}: {trained}; {args.dev} dev rows of {lengths['eval']:.1f}; {args.rounds} rounds")
    padded = {side: runs[0]["padded_tokens"] / runs[0]["real_tokens"] for side, runs in results.items()}
    print("tokens of a batch with padding to real ones: ", end="")
    print(", ".join(f"{side} {value:.2f}" for side, value in padded.items()))
    dtypes = {"fp32": "float32", "bf16": "bfloat16"}
    measured = {SIDES[side].precision for side in sides}  # a processor without bf16 takes minutes for its rate
    rates = {precision: matmul_rate(dtypes[precision]) for precision in measured}
    return print_table(results, lengths, rates, multiplied(shape))


def main() -> None:
    args = parse_arguments()
    if "GLUE_DIR" not in os.environ:
        sys.exit("set GLUE_DIR: this benchmark runs on real rows")
    tasks = [get_task(name) for name in args.tasks]
    print(describe_machine())
    ratios: dict[str, float] = {}
    for task in tasks:
        ratios |= {f"{task.name} {args.shape} {name}": value for name, value in compare(task, args).items()}
    keep(ratios)


if __name__ == "__main__":
    main()
