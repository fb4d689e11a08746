"""A training step and an evaluation of roberta.base's shape: fairseq's own forward against the unpadded one.

    GLUE_DIR=... python benchmarks/forward.py [ROUNDS]

Same weights, same batches of RTE (or of the sample), same optimizer; the sides alternate batch by batch. Weights are
random: speed does not depend on them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import BASE, describe_machine, matmul_rate, real_rows
from records import keep

from lightning_glue import config
from lightning_glue.data.batching import MicroBatch, Packed, train_batches
from lightning_glue.data.datamodule import Batch
from lightning_glue.model.pretrained import Pretrained, load_pretrained
from lightning_glue.model.roberta import RobertaModel, build_model, logits, stock_logits, task_loss
from lightning_glue.training import optimizer
from lightning_glue.training.allocator import keep_freed_memory
from lightning_glue.training.devices import cpu_has_bf16

Forward = Callable[[RobertaModel, Packed], torch.Tensor]


@dataclass
class Side:
    """One way to compute. ``pool``: batches among which similar lengths meet."""

    name: str
    forward: Forward
    bf16: bool
    pool: int
    step: list[float] = field(default_factory=list)  # seconds an example
    evaluation: list[float] = field(default_factory=list)
    real_flops: list[float] = field(default_factory=list)  # per second of training


def train_step(side: Side, model: RobertaModel, adam: torch.optim.Optimizer, batch: Batch) -> float:
    model.train()
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=side.bf16):
        outputs = side.forward(model, batch)
    task_loss(outputs, batch["targets"]).mean().backward()
    adam.step()
    adam.zero_grad()
    return time.perf_counter() - start


def evaluate(side: Side, model: RobertaModel, batch: Batch) -> float:
    model.eval()
    start = time.perf_counter()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=side.bf16):
        side.forward(model, batch)
    return time.perf_counter() - start


def same_work(model: RobertaModel, batch: Batch) -> None:
    """Without dropout and in float32 both forwards give the same loss."""
    model.eval()
    with torch.no_grad():
        losses = [task_loss(forward(model, batch), batch["targets"]).mean() for forward in (stock_logits, logits)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def main() -> None:
    keep_freed_memory()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    print(describe_machine(), f"{torch.get_num_threads()} threads")
    start = load_pretrained("minilm", "wordpiece", None, {})
    dropout = {"dropout": 0.1, "attention_dropout": 0.1}
    model = build_model(Pretrained(BASE, None, start.tokenizer, ""), 2, dropout)
    settings = config.compose([], task="RTE").optimizer
    groups = optimizer.parameter_groups(model, settings, 1e-6)
    adam = optimizer.FairseqAdamW(groups, lr=1e-6, betas=(0.9, 0.98), eps=1e-6, fused=True)
    layers = sum(p.numel() for p in model.encoder.sentence_encoder.layers.parameters())
    sides = [
        Side("fairseq's forward, float32, plain shuffle", stock_logits, False, 1),
        Side("unpadded, float32", logits, False, 32),
    ]
    if cpu_has_bf16():
        sides.append(Side("unpadded, bf16-mixed", logits, True, 32))
    with tempfile.TemporaryDirectory() as folder:
        train = real_rows("RTE", Path(folder), start.tokenizer)
    orders = {pool: train_batches(train.lengths, 16, 1, 0, pool) for pool in (1, 32)}
    same_work(model, train[MicroBatch(orders[1][0], 1.0)])
    for number in range(rounds + 1):
        for side in sides:
            batch = train[MicroBatch(orders[side.pool][number], 1.0)]
            seconds, examples = train_step(side, model, adam, batch), len(batch["rows"])
            evaluation = evaluate(side, model, batch)
            if number:  # the first round warms up
                side.step.append(seconds / examples)
                side.evaluation.append(evaluation / examples)
                side.real_flops.append(6 * layers * len(batch["tokens"]) / seconds)
    rates = {bf16: matmul_rate("bfloat16" if bf16 else "float32") for bf16 in {side.bf16 for side in sides}}
    ratios = {}
    for side in sides:
        speed, evaluation = 1 / statistics.mean(side.step), 1 / statistics.mean(side.evaluation)
        share = statistics.mean(side.real_flops) / rates[side.bf16]
        ratios[f"train: {side.name}"] = speed * statistics.mean(sides[0].step)
        ratios[f"evaluate: {side.name}"] = evaluation * statistics.mean(sides[0].evaluation)
        ratios[f"train: {side.name}, share of the matmul rate"] = share
        print(
            f"{side.name:<42} train {speed:6.2f} examples/s ({speed * statistics.mean(sides[0].step):.2f}x)  evaluate "
            f"{evaluation:7.2f} ({evaluation * statistics.mean(sides[0].evaluation):.2f}x)  "
            f"{share:.0%} of this machine's matmul rate, on real tokens"
        )
    keep(ratios)


if __name__ == "__main__":
    main()
