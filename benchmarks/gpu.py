"""A training step on a GPU at MNLI's lengths: fairseq's model with its FP16 optimizer against the unpadded forward.

    GLUE_DIR=... python benchmarks/gpu.py [--models base large] [--batch 32] [--full 512] [--steps 40] [--device cuda]

The sides alternate step by step in one process. ``--full`` is a batch that fills the chip. Weights are random: speed
does not depend on them. ``--device cpu`` runs the same code where there is no GPU, to check it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import BASE, describe_machine, matmul_rate, real_rows
from torch import Tensor

from lightning_glue import config
from lightning_glue.data.batching import MicroBatch, train_batches
from lightning_glue.data.datamodule import Batch, TokenizedSplit
from lightning_glue.model.pretrained import Pretrained, load_pretrained
from lightning_glue.model.roberta import RobertaModel, build_model, logits, stock_logits, task_loss
from lightning_glue.training import optimizer

LARGE = BASE | {
    "encoder_layers": 24, "encoder_embed_dim": 1024, "encoder_ffn_embed_dim": 4096, "encoder_attention_heads": 16,
}  # fmt: skip
TINY = BASE | {
    "encoder_layers": 2, "encoder_embed_dim": 64, "encoder_ffn_embed_dim": 128, "encoder_attention_heads": 4,
}  # fmt: skip
SHAPES = {"base": BASE, "large": LARGE, "tiny": TINY}
Step = Callable[[Batch], Tensor]


@dataclass
class Side:
    """A way to train. ``batches`` are its own order of the epoch's rows."""

    name: str
    step: Step
    batches: Iterator[Any]
    seconds: list[float] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    memory: int = 0  # bytes a step needs beyond what there was before it
    kernels: int = 0


def fairseq_step(model: RobertaModel, device: str) -> Step:
    """What fairseq's trainer does in a step with ``common.fp16=true`` and the tutorial's config, less its logging."""
    from fairseq.optim.fp16_optimizer import FP16Optimizer
    from omegaconf import OmegaConf

    settings = {
        "common": {
            "bf16": False, "model_parallel_size": 1, "fp16_scale_window": None, "fp16_init_scale": 4,
            "fp16_scale_tolerance": 0.0, "threshold_loss_scale": 1.0, "min_loss_scale": 1e-4,
            "fp16_no_flatten_grads": device == "cpu",  # flat gradients are for CUDA only
        },
        "optimizer": {
            "_name": "adam", "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-6, "weight_decay": 0.1, "lr": [1e-6],
            "use_old_adam": False, "fp16_adam_stats": False, "tpu": False,
        },
        "optimization": {"update_freq": [1]},
        "distributed_training": {"distributed_world_size": 1},
    }  # fmt: skip
    model.half()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = FP16Optimizer.build_optimizer(OmegaConf.create(settings), parameters)

    def step(batch: Batch) -> Tensor:
        adam.zero_grad()
        loss = task_loss(stock_logits(model, batch), batch["targets"]).sum()
        adam.backward(loss)
        adam.multiply_grads(1 / len(batch["targets"]))
        adam.clip_grad_norm(0.0)
        adam.step()
        return loss.detach() / len(batch["targets"])

    return step


def our_step(model: RobertaModel, device: str) -> Step:
    """What the Lightning module does in a step with bf16-mixed."""
    groups = optimizer.parameter_groups(model, config.compose([], task="MNLI").optimizer, 1e-6)
    adam = optimizer.FairseqAdamW(groups, lr=1e-6, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def step(batch: Batch) -> Tensor:
        adam.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            outputs = logits(model, batch)
        loss = task_loss(outputs, batch["targets"]).mean()
        loss.backward()
        adam.step()
        return loss.detach()

    return step


def endless(lengths: Any, size: int, pool: int) -> Iterator[Any]:
    epoch = 0
    while True:
        yield from (batch for batch in train_batches(lengths, size, 1, epoch, pool) if len(batch) == size)
        epoch += 1


def on_device(batch: Batch, device: str) -> Batch:
    moved = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    return {**batch, **moved}  # type: ignore[typeddict-item]


def run_step(side: Side, rows: TokenizedSplit, device: str, record: bool) -> float:
    """The loss; the time covers the copy to the device, as in a training."""
    on_gpu = device == "cuda"
    batch = rows[MicroBatch(next(side.batches), 1.0)]
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    start = time.perf_counter()
    loss = float(side.step(on_device(batch, device)))
    if on_gpu:
        torch.cuda.synchronize()
    if record:
        side.seconds.append(time.perf_counter() - start)
        side.examples.append(len(batch["rows"]))
        side.tokens.append(len(batch["tokens"]))
        side.memory = max(side.memory, torch.cuda.max_memory_allocated() - before if on_gpu else 0)
    return loss


def count_kernels(side: Side, rows: TokenizedSplit, device: str) -> int:
    """Kernels one step launches (on the CPU: operators it calls)."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        run_step(side, rows, device, record=False)
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    return sum(event.device_type == kind for event in seen.events())


def check_same_work(model: RobertaModel, batch: Batch, device: str) -> None:
    """Without dropout and in float32 both forwards give the same loss."""
    model.eval()
    batch = on_device(batch, device)
    with torch.no_grad():
        losses = [task_loss(forward(model, batch), batch["targets"]).mean() for forward in (stock_logits, logits)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    model.train()


def compare(shape: str, args: argparse.Namespace, rows: TokenizedSplit, start: Pretrained, rate: float) -> None:
    def model() -> RobertaModel:
        torch.manual_seed(0)
        dropout = {"dropout": 0.1, "attention_dropout": 0.1}
        return build_model(Pretrained(SHAPES[shape], None, start.tokenizer, ""), 3, dropout).to(args.device)

    theirs, ours = model(), model()
    layers = sum(p.numel() for p in ours.encoder.sentence_encoder.layers.parameters())
    check_same_work(ours, rows[MicroBatch(next(endless(rows.lengths, 32, 1)), 1.0)], args.device)
    step = our_step(ours, args.device)
    sides = [
        Side(
            f"fairseq fp16, batch {args.batch}", fairseq_step(theirs, args.device), endless(rows.lengths, args.batch, 1)
        ),
        Side(f"lightning-glue bf16, batch {args.batch}", step, endless(rows.lengths, args.batch, 32)),
        Side(f"lightning-glue bf16, batch {args.full}", step, endless(rows.lengths, args.full, 32)),
    ]
    for number in range(args.steps + args.warmup):
        losses = [run_step(side, rows, args.device, record=number >= args.warmup) for side in sides]
        if not all(0 < loss < 10 for loss in losses):
            sys.exit(f"{shape}: losses {losses} in step {number}: a side does not compute what it should")
    first = None
    for side in sides:
        side.kernels = count_kernels(side, rows, args.device)
        seconds = sum(side.seconds)
        speed, tokens = sum(side.examples) / seconds, sum(side.tokens) / seconds
        first = first or speed
        print(
            f"{shape:<6}{side.name:<32}{speed:9.1f} examples/s ({speed / first:.2f}x) {tokens:10.0f} real tokens/s  "
            f"MFU {6 * layers * tokens / rate:.0%}  step {1e3 * statistics.median(side.seconds):.1f} ms  "
            f"{side.kernels} kernels  {side.memory / 2**30:.2f} GiB in a step"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["base", "large"], help="default: both")
    for name, default in (("batch", 32), ("full", 512), ("steps", 40), ("warmup", 10)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --device cpu --models tiny checks the benchmark itself")
    print(describe_machine(), torch.cuda.get_device_name() if args.device == "cuda" else "no GPU")
    start = load_pretrained("minilm", "wordpiece", None, {})
    with tempfile.TemporaryDirectory() as folder:
        rows = real_rows("MNLI", Path(folder), start.tokenizer)
    rate = matmul_rate("bfloat16", args.device)
    print(f"bf16 matmul rate {rate / 1e12:.2f} TFLOP/s; {rows.lengths.mean():.1f} tokens an example")
    for shape in args.models:
        compare(shape, args, rows, start, rate)


if __name__ == "__main__":
    main()
