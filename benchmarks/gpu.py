"""Training steps on a GPU at MNLI's lengths: fairseq in fp16, Hugging Face's Trainer at its best, and lightning-glue.

    GLUE_DIR=... ROBERTA_BPE_DIR=... python benchmarks/gpu.py [--models base large] [--batch 32] [--full 512]

Sides run one after the other in one process, each over batches of the same rows; the clock stands between two moments
at which the device has nothing left to do. Steps alone, as what they are made of: fairseq's model with its FP16
optimizer; ours kernel by kernel, replayed from CUDA graphs, and with the optimizer within the graph, which the product
does not do. Whole loops: Trainer (bf16, fused Adam, batches of similar lengths, workers that load), and ours with all
its callbacks. Weights are random: speed does not depend on them. ``--device cpu`` runs the same code where there is no
GPU, to check it.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import BASE, describe_machine, matmul_rate, of_shape, real_rows
from peers import hugging_face_batch, hugging_face_rows
from records import keep
from torch import Tensor

from lightning_glue import config
from lightning_glue.data.batching import MicroBatch, train_batches
from lightning_glue.data.datamodule import Batch, TokenizedSplit
from lightning_glue.model.cuda_graphs import GraphedTraining, Shape
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
class Measured:
    """What a side did between two moments at which the device was idle."""

    seconds: float = 0.0
    first: float = 0.0  # of the same steps when everything was new
    steps: int = 0
    examples: int = 0
    tokens: int = 0
    memory: int = 0  # bytes, the most at once beyond what was there before
    loss: float = 0.0


@dataclass
class Traced:
    """Of one step in the mean: kernels run, calls that launch any, waits for the device, share of the time at work."""

    kernels: float = 0.0
    launches: float = 0.0
    waits: float = 0.0
    busy: float = 0.0


@dataclass
class Context:
    """What all sides of a shape share."""

    shape: str
    device: str
    rows: TokenizedSplit
    start: Pretrained
    steps: int
    warmup: int
    rate: float
    table: Path | None = None  # for what the profiler saw

    @cached_property
    def _model(self) -> RobertaModel:
        torch.manual_seed(0)
        dropout = {"dropout": 0.1, "attention_dropout": 0.1}
        return build_model(Pretrained(SHAPES[self.shape], None, self.start.tokenizer, ""), 3, dropout)

    def model(self) -> RobertaModel:
        """A new one each time, with the same weights."""
        return copy.deepcopy(self._model).to(self.device).train()

    @cached_property
    def layers(self) -> int:
        """Parameters of the layers' products."""
        return sum(p.numel() for p in self._model.encoder.sentence_encoder.layers.parameters())


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


def our_step(model: RobertaModel, device: str, *, replays: bool) -> Step:
    """What the Lightning module does in a step with bf16-mixed."""
    groups = optimizer.parameter_groups(model, config.compose([], task="MNLI").optimizer, 1e-6)
    adam = optimizer.FairseqAdamW(groups, lr=1e-6, betas=(0.9, 0.98), eps=1e-6, fused=True)
    graphed = GraphedTraining(model, torch.bfloat16) if replays else None

    def step(batch: Batch) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            outputs = graphed(batch) if graphed else logits(model, batch)
            loss = task_loss(outputs, batch["targets"]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.detach()

    return step


def whole_step(model: RobertaModel) -> Step:
    """The same in one graph, optimizer included: torch's AdamW, whose eps differs from fairseq's, not its work."""
    graphed = GraphedTraining(model, torch.bfloat16)
    adam = torch.optim.AdamW(model.parameters(), 1e-6, (0.9, 0.98), 1e-6, fused=True, capturable=True)
    for parameter, gradient in zip(graphed.parameters, graphed.gradients):
        parameter.grad = gradient
    made: dict[Shape, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]] = {}

    def compute(shape: Shape, inputs: dict[str, Tensor]) -> Tensor:
        outputs = graphed.forward(shape, inputs["tokens"], inputs["lengths"])
        loss = task_loss(outputs, inputs["targets"]).mean()
        graphed.backward(loss, torch.ones_like(loss))
        adam.step()
        return loss.detach()

    def step(batch: Batch) -> Tensor:
        count, key = len(batch["tokens"]), graphed.shape(batch)
        if key not in made:
            inputs = {
                "tokens": key.pad(batch["tokens"]),
                "lengths": batch["lengths"].clone(),
                "targets": batch["targets"].clone(),
            }
            side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                compute(key, inputs)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, pool=graphed.pool):
                loss = compute(key, inputs)
            made[key] = graph, inputs, loss
        graph, inputs, loss = made[key]
        inputs["tokens"][:count].copy_(batch["tokens"])
        inputs["lengths"].copy_(batch["lengths"])
        inputs["targets"].copy_(batch["targets"])
        graph.replay()
        return loss

    return step


def endless(lengths: Any, size: int, pool: int) -> Iterator[Any]:
    epoch = 0
    while True:
        yield from (batch for batch in train_batches(lengths, size, 1, epoch, pool) if len(batch) == size)
        epoch += 1


def on_device(batch: Batch, device: str) -> Batch:
    pinned = {
        name: value.pin_memory() for name, value in batch.items() if isinstance(value, Tensor) and device != "cpu"
    }
    moved = {name: value.to(device, non_blocking=True) for name, value in pinned.items()}
    return {**batch, **moved}  # type: ignore[typeddict-item]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def measure_steps(context: Context, size: int, pool: int, step: Step) -> tuple[Measured, Traced]:
    """Steps of a side over batches of its own order, a second time over; the clock covers collating and the copy to the
    device. The first time everything is made that later steps have: kernels, memory, graphs."""
    order, device = endless(context.rows.lengths, size, pool), context.device
    chosen = [next(order) for _ in range(context.steps)]

    def one(rows: Any) -> tuple[Batch, Tensor]:
        batch = context.rows[MicroBatch(rows, 1.0)]
        return batch, step(on_device(batch, device))

    found, seen = Measured(), []
    for _ in range(2):
        wait(device)
        start = time.perf_counter()
        seen = [one(rows) for rows in chosen]
        wait(device)
        found.first, found.seconds = found.seconds, time.perf_counter() - start
    found.steps, found.loss, found.memory = len(seen), float(seen[-1][1]), memory(device)
    found.examples = sum(len(batch["rows"]) for batch, _ in seen)
    found.tokens = sum(len(batch["tokens"]) for batch, _ in seen)
    again = cycle(chosen)
    return found, trace(lambda: one(next(again)), device, context.table)


def trace(one: Callable[[], Any], device: str, table: Path | None, steps: int = 3) -> Traced:
    """Kernels, launches and waits of a step, as the profiler sees them; what took longest goes into ``table``."""
    from torch.profiler import ProfilerActivity, profile

    if device != "cuda":
        return Traced()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            one()
        wait(device)
    if table:
        averages = seen.key_averages()
        with open(table, "a") as file:
            for by in ("self_cuda_time_total", "self_cpu_time_total"):
                print(averages.table(sort_by=by, row_limit=28, max_name_column_width=90), file=file)
    events = seen.events()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    launches = sum("LaunchKernel" in name or "GraphLaunch" in name for name in names)
    waits = sum("Synchronize" in name for name in names) - 1
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    busy, reached = 0.0, spans[0][0] if spans else 0.0
    for begin, end in spans:
        busy, reached = busy + max(0.0, end - max(begin, reached)), max(reached, end)
    whole = spans[-1][1] - spans[0][0] if spans else 1.0
    return Traced(len(kernels) / steps, launches / steps, waits / steps, busy / whole)


def check_same_work(context: Context) -> None:
    """Without dropout and in float32 both forwards give the same loss, and so do steps replayed, within bf16."""
    model = context.model().eval()
    batch = context.rows[MicroBatch(next(endless(context.rows.lengths, 32, 1)), 1.0)]
    batch = on_device(batch, context.device) if context.device == "cuda" else batch
    with torch.no_grad():
        losses = [task_loss(forward(model, batch), batch["targets"]).mean() for forward in (stock_logits, logits)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    if context.device == "cuda":
        replayed = task_loss(GraphedTraining(model, torch.bfloat16)(batch), batch["targets"]).mean()
        torch.testing.assert_close(replayed.detach(), losses[0], rtol=2e-2, atol=2e-2)


class Moments:
    """The clock of a loop that runs by itself: from the end of step ``warmup`` to that of ``steps`` more."""

    def __init__(self, context: Context, warmup: int) -> None:
        self.context, self.warmup, self.step, self.begin, self.found = context, warmup, 0, 0.0, Measured()

    def saw(self, examples: int, tokens: int) -> None:
        self.step += 1
        if self.begin and self.found.steps < self.context.steps:
            self.found.steps += 1
            self.found.examples, self.found.tokens = self.found.examples + examples, self.found.tokens + tokens
        if self.step in (self.warmup, self.warmup + self.context.steps):
            wait(self.context.device)
            self.found.seconds, self.begin = time.perf_counter() - self.begin, time.perf_counter()
        self.found.memory = memory(self.context.device)


def hugging_face(context: Context, size: int) -> Measured:
    """Trainer with what its documentation says makes it fast on one GPU."""
    import transformers
    from transformers import Trainer, TrainerCallback, TrainingArguments

    shape, rows = SHAPES[context.shape], context.rows
    architecture = transformers.RobertaConfig(
        vocab_size=len(context.start.tokenizer.symbols) + 1, max_position_embeddings=514, type_vocab_size=1,
        num_hidden_layers=shape["encoder_layers"], hidden_size=shape["encoder_embed_dim"],
        num_attention_heads=shape["encoder_attention_heads"], intermediate_size=shape["encoder_ffn_embed_dim"],
    )  # fmt: skip
    architecture.num_labels = 3
    model = transformers.RobertaForSequenceClassification(architecture)
    moments = Moments(context, context.warmup)

    class Timer(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.saw(size, round(size * float(rows.lengths.mean())))

    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=context.warmup + context.steps, per_device_train_batch_size=size,
        learning_rate=1e-6, weight_decay=0.1, adam_beta2=0.98, adam_epsilon=1e-6, report_to=[], save_strategy="no",
        bf16=True, optim="adamw_torch_fused", train_sampling_strategy="group_by_length", dataloader_num_workers=4,
        dataloader_pin_memory=context.device == "cuda", logging_steps=10**6, logging_nan_inf_filter=False,
        max_grad_norm=0.0, disable_tqdm=True, use_cpu=context.device == "cpu", dataloader_drop_last=True,
    )  # fmt: skip
    Trainer(model, arguments, hugging_face_batch, hugging_face_rows(rows), callbacks=[Timer()]).train()
    return moments.found


def lightning_glue(context: Context, size: int, *, replays: bool) -> Measured:
    """What ``python -m lightning_glue.train`` runs, with all its callbacks, less the journal of its run."""
    import pytorch_lightning as pl

    from lightning_glue.training.build import build
    from lightning_glue.training.preemption import Preemption
    from lightning_glue.training.trainer import make_callbacks, make_trainer, prepare_process

    shape = {key: value for key, value in SHAPES[context.shape].items() if key != "max_positions"}
    warmup = context.warmup * (6 if replays else 1)  # most shapes have occurred by then
    options = [
        f"data.batch_size={size}", f"trainer.max_steps={warmup + context.steps}", "trainer.max_epochs=1000",
        f"trainer.cuda_graphs={str(replays).lower()}", f"trainer.gpus={int(context.device == 'cuda')}",
        "optimizer.lr=1e-6", "trainer.precision=bf16-mixed",
    ]  # fmt: skip
    settings = config.compose([*options, *of_shape(shape)], task="MNLI", model="tiny")
    moments = Moments(context, warmup)

    class Timer(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            moments.saw(len(batch["rows"]), len(batch["tokens"]))

    prepare_process(settings)
    module, data, _ = build(settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(settings, [Timer(), *make_callbacks(settings, folder, Preemption(), shows=False)], None)
        trainer.check_val_every_n_epoch = 10**6  # only steps are timed
        trainer.fit(module, data)
    return moments.found


def show(context: Context, name: str, found: Measured, traced: Traced | None, first: list[float]) -> None:
    speed, tokens = found.examples / found.seconds, found.tokens / found.seconds
    first.append(speed)
    more = ""
    if traced and traced.kernels:
        more = (
            f"  {traced.kernels:.0f} kernels, {traced.launches:.0f} launches, {traced.waits:.1f} waits, "
            f"device at work {traced.busy:.0%}, first pass {found.first:.1f} s"
        )
    print(
        f"{context.shape:<6}{name:<44}{speed:9.1f} examples/s ({speed / first[0]:.2f}x) {tokens:10.0f} real tokens/s  "
        f"MFU {6 * context.layers * tokens / context.rate:.1%}  step {1e3 * found.seconds / found.steps:.2f} ms  "
        f"{found.memory / 2**30:.2f} GiB{more}",
        flush=True,
    )


def compare(context: Context, size: int, sides: list[str]) -> dict[str, float]:
    """Measure the sides, and print them; examples a second as shares of the first one's."""
    on_gpu = context.device == "cuda"
    steps: dict[str, tuple[int, Callable[[RobertaModel], Step]]] = {
        "fairseq": (1, lambda model: fairseq_step(model, context.device)),
        "eager": (32, lambda model: our_step(model, context.device, replays=False)),
        "graphs": (32, lambda model: our_step(model, context.device, replays=True)),
        "optimizer": (32, whole_step),
    }
    names = {
        "fairseq": "step: fairseq fp16", "eager": "step: lightning-glue bf16", "graphs": "step: lightning-glue, graphs",
        "optimizer": "step: the same with the optimizer in them", "huggingface": "loop: HF Trainer at its best",
        "loop-eager": "loop: lightning-glue", "loop-graphs": "loop: lightning-glue, graphs",
    }  # fmt: skip
    first: list[float] = []
    ratios: dict[str, float] = {}
    for side in sides:
        if not on_gpu and side in ("graphs", "optimizer"):
            continue
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        traced = None
        if context.table:
            with open(context.table, "a") as file:
                print(f"== {context.shape} {names[side]}, batch {size}", file=file)
        if side in steps:
            pool, make = steps[side]
            found, traced = measure_steps(context, size, pool, make(context.model()))
            if not 0 < found.loss < 10:
                sys.exit(f"{context.shape}: {names[side]} has loss {found.loss}: it does not compute what it should")
        elif side == "huggingface":
            found = hugging_face(context, size)
        else:
            found = lightning_glue(context, size, replays=side == "loop-graphs")
        show(context, f"{names[side]}, batch {size}", found, traced, first)
        ratios[f"{context.shape}, batch {size}: {names[side]} / {names[sides[0]]}"] = first[-1] / first[0]
    return ratios


SIDES = ["fairseq", "eager", "graphs", "optimizer", "huggingface", "loop-eager", "loop-graphs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["base", "large"], help="default: both")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="default: all")
    for name, default in (("batch", 32), ("full", 512), ("steps", 60), ("warmup", 40)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--table", type=Path, help="file for what the profiler saw of each side's steps")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --device cpu --models tiny checks the benchmark itself")
    print(describe_machine(), torch.cuda.get_device_name() if args.device == "cuda" else "no GPU", flush=True)
    bpe = os.environ.get("ROBERTA_BPE_DIR")
    start = load_pretrained("random", "gpt2", bpe, BASE) if bpe else load_pretrained("minilm", "wordpiece", None, {})
    with tempfile.TemporaryDirectory() as folder:
        rows = real_rows("MNLI", Path(folder), start.tokenizer)
    rate = matmul_rate("bfloat16", args.device)
    lengths = rows.lengths
    print(f"bf16 matmul rate {rate / 1e12:.1f} TFLOP/s; {len(lengths)} rows of {np.mean(lengths):.1f} tokens "
          f"(median {statistics.median(lengths.tolist()):.0f}, longest {lengths.max()})", flush=True)  # fmt: skip
    ratios: dict[str, float] = {}
    for shape in args.models:
        context = Context(shape, args.device, rows, start, args.steps, args.warmup, rate, args.table)
        check_same_work(context)
        for size in (args.batch, args.full):
            if size:
                ratios |= compare(context, size, args.sides)
    keep(ratios)


if __name__ == "__main__":
    main()
