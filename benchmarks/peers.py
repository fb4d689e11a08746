"""One side of train.py in its own process: ``python benchmarks/peers.py SIDE TASK FOLDER STEPS`` prints a JSON line.

FOLDER holds ``glue/`` (raw rows), ``bin/`` (the same in fairseq's layout), ``few/`` (as many training rows as are
trained on) and ``start/`` (a fairseq checkpoint). A side that groups examples by length does so over all rows, and then
trains on a number of its batches that stand for them: the first ones of an epoch would all be long.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from lightning_glue.data.datamodule import GlueDataModule, TokenizedSplit

CHECKED = 8  # dev rows whose loss before training is compared


def spread(sizes: Sequence[int], count: int) -> list[int]:
    """Indices of ``count`` batches that stand for all: evenly spaced by size, in random order."""
    by_size = sorted(range(len(sizes)), key=sizes.__getitem__)
    chosen = [by_size[int((i + 0.5) * len(sizes) / count)] for i in range(count)]
    return random.Random(0).sample(chosen, count)


@dataclass(frozen=True)
class Side:
    library: str
    precision: str  # fp32 or bf16
    grouped: bool = False  # Hugging Face: batches of similar lengths

    @property
    def ours(self) -> bool:
        return self.library == "ours"


SIDES = {
    "fairseq-hydra-train": Side("fairseq", "fp32"),
    "HF Trainer": Side("huggingface", "fp32"),
    "HF Trainer grouped": Side("huggingface", "fp32", grouped=True),
    "HF Trainer bf16 grouped": Side("huggingface", "bf16", grouped=True),
    "lightning-glue fp32": Side("ours", "fp32"),
    "lightning-glue bf16": Side("ours", "bf16"),
    "products alone fp32": Side("products", "fp32"),
    "products alone bf16": Side("products", "bf16"),
}


OURS: dict[str, Literal["32-true", "bf16-mixed"]] = {"fp32": "32-true", "bf16": "bf16-mixed"}
EPOCHS = 2  # over the same rows


@dataclass
class Stopwatch:
    """What was seen and how long it took, from the first step's start to the last one's end, in the last of two epochs.

    In the first one oneDNN makes a kernel for each shape that it meets, of which a training of some thousand steps has
    no more.
    """

    warm_up: int  # steps
    loss: float = 0.0
    started: int = 0
    examples: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0
    begin: float = 0.0
    end: float = 0.0
    evaluation: list[float] = field(default_factory=list)
    evaluated: int = 0

    def start(self) -> None:
        """A step begins."""
        if self.started == self.warm_up:
            self.evaluation, self.evaluated = [], 0
            self.begin = time.perf_counter()
        self.started += 1

    def saw(self, examples: int, real: int, padded: int) -> None:
        self.examples, self.real_tokens = self.examples + examples, self.real_tokens + real
        self.padded_tokens += padded

    def stop(self) -> None:
        self.end = time.perf_counter()

    def report(self, side: str) -> None:
        seen = {
            "side": side,
            "loss": self.loss,
            "train_examples": self.examples / EPOCHS,
            "train_seconds": self.end - self.begin,
            "eval_examples": self.evaluated,
            "eval_seconds": self.evaluation[-1] - self.evaluation[0],
            "real_tokens": self.real_tokens / EPOCHS,
            "padded_tokens": self.padded_tokens / EPOCHS,
        }
        print("\n" + json.dumps(seen), flush=True)


def run_fairseq(side: Side, task: str, folder: Path, steps: int, watch: Stopwatch) -> None:
    """The tutorial's command and config, on the CPU, of the shape of ``start/``; timers around the trainer's own."""
    import fairseq
    import torch
    from fairseq.trainer import Trainer
    from fairseq_cli.hydra_train import cli_main

    train_step, valid_step = Trainer.train_step, Trainer.valid_step

    def timed_train_step(self: Any, samples: list[dict[str, Any]], raise_oom: bool = False) -> Any:
        if not watch.started:
            rows = self.task.dataset("valid")
            self.model.eval()
            with torch.no_grad():
                loss, count, _ = self.criterion(self.model, rows.collater([rows[i] for i in range(CHECKED)]))
            watch.loss = float(loss) / count
        watch.start()
        result = train_step(self, samples, raise_oom)
        for sample in samples:
            tokens = sample["net_input"]["src_tokens"]
            watch.saw(len(tokens), int(sample["ntokens"]), tokens.numel())
        watch.stop()
        return result

    def timed_valid_step(self: Any, sample: dict[str, Any], raise_oom: bool = False) -> Any:
        watch.evaluation.append(time.perf_counter())
        result = valid_step(self, sample, raise_oom)
        watch.evaluated += len(sample["net_input"]["src_tokens"])
        watch.evaluation.append(time.perf_counter())
        return result

    Trainer.train_step, Trainer.valid_step = timed_train_step, timed_valid_step
    config = Path(fairseq.__file__).parent / "examples/roberta/config/finetuning"
    name = {"SST-2": "sst_2", "STS-B": "sts_b"}.get(task, task.lower())
    options = {
        "task.data": (folder / "few").resolve(),
        "checkpoint.restore_file": folder / "start" / "checkpoint_best.pt",
        "checkpoint.no_save": True,
        "common.fp16": False,
        "common.cpu": True,
        "optimization.max_epoch": EPOCHS,
    }
    sys.argv = ["fairseq-hydra-train", "--config-dir", str(config), "--config-name", name]
    sys.argv += [f"{key}={value}" for key, value in options.items()]
    sys.argv += [f"++model.{key}={value}" for key, value in shape_of(folder).items()]
    cli_main()


def fine_tuned(folder: Path) -> Any:
    from lightning_glue.inference.finetuned import load_fine_tuned

    return load_fine_tuned(folder / "start").model


def shape_of(folder: Path) -> dict[str, int]:
    """Of the model in ``start/``, by fairseq's names."""
    encoder = fine_tuned(folder).encoder.sentence_encoder
    layer = encoder.layers[0]
    return {
        "encoder_layers": len(encoder.layers),
        "encoder_embed_dim": layer.fc1.in_features,
        "encoder_ffn_embed_dim": layer.fc1.out_features,
        "encoder_attention_heads": layer.self_attn.num_heads,
    }


def hugging_face_model(folder: Path, outputs: int) -> Any:
    """RobertaForSequenceClassification with the weights of ``start/``."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    from lightning_glue.model.huggingface import to_huggingface

    start, shape = fine_tuned(folder), shape_of(folder)
    vocabulary = len(start.encoder.sentence_encoder.embed_tokens.weight)
    config = RobertaConfig(vocab_size=vocabulary, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5,
                           pad_token_id=1, bos_token_id=0, eos_token_id=2, hidden_size=shape["encoder_embed_dim"],
                           num_hidden_layers=shape["encoder_layers"],
                           num_attention_heads=shape["encoder_attention_heads"],
                           intermediate_size=shape["encoder_ffn_embed_dim"])  # fmt: skip
    config.num_labels = outputs
    model = RobertaForSequenceClassification(config)
    model.load_state_dict(to_huggingface(start.state_dict(), shape["encoder_layers"], vocabulary))
    return model


def grouped_rows(rows: list[dict[str, Any]], size: int, steps: int) -> list[dict[str, Any]]:
    """The rows of ``steps`` batches that Trainer's own sampler makes of similar lengths."""
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    lengths = [len(row["input_ids"]) for row in rows]
    order = list(LengthGroupedSampler(size, lengths=lengths, generator=torch.Generator().manual_seed(1)))
    batches = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    chosen = spread([sum(lengths[i] for i in batch) for batch in batches], steps)
    return [rows[i] for batch in chosen for i in batches[batch]]


def hugging_face_rows(split: TokenizedSplit) -> list[dict[str, Any]]:
    """A labelled split as Trainer takes it."""
    assert split.targets is not None
    ids = [split.tokens[s : s + n].tolist() for s, n in zip(split.starts, split.lengths)]
    return [{"input_ids": x, "labels": int(y)} for x, y in zip(ids, split.targets)]


def hugging_face_batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows padded to the longest of them."""
    import torch

    ids = [torch.tensor(row["input_ids"]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=1)
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": padded, "attention_mask": (padded != 1).long(), "labels": labels}


def run_hugging_face(side: Side, task: str, folder: Path, steps: int, watch: Stopwatch) -> None:
    """Trainer as its documentation has it: dynamic padding; at its best: bf16 and batches of similar lengths."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from lightning_glue import config as configuration
    from lightning_glue.data.datamodule import load_split
    from lightning_glue.tasks import get_task

    known, config = get_task(task), configuration.compose([], task=task)
    rows = {}
    for split in (known.splits[0], known.dev[0]):
        few = split.name == "train" and not side.grouped
        rows[split.name] = hugging_face_rows(load_split(known, split, folder / ("few" if few else "bin"), 512))

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        made = hugging_face_batch(batch)
        if watch.counting:  # type: ignore[attr-defined]
            watch.saw(len(batch), sum(len(row["input_ids"]) for row in batch), made["input_ids"].numel())
        return made

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.stop()

    model = hugging_face_model(folder, known.num_outputs).eval()
    watch.counting = False  # type: ignore[attr-defined]
    with torch.no_grad():
        watch.loss = float(model(**collate(rows[known.dev[0].name][:CHECKED])).loss)
    watch.counting = True  # type: ignore[attr-defined]
    arguments = TrainingArguments(
        "out", use_cpu=True, num_train_epochs=EPOCHS, per_device_train_batch_size=config.data.batch_size,
        learning_rate=config.lr, weight_decay=0.1, adam_beta2=0.98, adam_epsilon=1e-6, warmup_steps=0.06,
        lr_scheduler_type="linear", report_to=[], save_strategy="no", disable_tqdm=True, bf16=side.precision == "bf16",
        train_sampling_strategy="sequential" if side.grouped else "random",  # grouped_rows() keeps to its own order
    )  # fmt: skip
    train, dev = rows["train"], rows[known.dev[0].name]
    if side.grouped:
        train = grouped_rows(train, config.data.batch_size, steps)
    trainer = Trainer(model, arguments, collate, train, dev, callbacks=[Timer()])
    trainer.train()
    watch.counting = False  # type: ignore[attr-defined]
    watch.evaluation.append(time.perf_counter())
    trainer.evaluate()
    watch.evaluation.append(time.perf_counter())
    watch.evaluated = len(dev)


def build_ours(side: Side, task: str, folder: Path, steps: int, watch: Stopwatch) -> tuple[Any, Any, GlueDataModule]:
    """Module, training batches and data of what ``python -m lightning_glue.train`` builds."""
    from lightning_glue import config as configuration
    from lightning_glue.utils.quick_imports import quick_imports

    overrides = ["trainer.gpus=0", f"trainer.max_epochs={EPOCHS}", f"trainer.precision={OURS[side.precision]}"]
    config = configuration.compose(overrides, task=task, model=str(folder / "start" / "checkpoint_best.pt"))
    with quick_imports():
        import pytorch_lightning  # noqa: F401 - as the product imports it
        import torch
    from torch.utils.data import DataLoader

    from lightning_glue.data.batching import MicroBatch, TrainSampler
    from lightning_glue.model.roberta import logits, task_loss
    from lightning_glue.training.build import build
    from lightning_glue.training.run import prepare_process

    prepare_process(config)
    module, data, _ = build(config)
    module.model.load_state_dict(fine_tuned(folder).state_dict())  # with the same head as the others
    dev = data.splits[module.task.dev[0].name]
    batch = dev[MicroBatch(torch.arange(CHECKED).numpy(), 1.0)]
    with torch.no_grad():
        watch.loss = float(task_loss(logits(module.model.eval(), batch), batch["targets"]).mean())
    module.model.train()
    train, size = data.splits["train"], config.data.batch_size
    sampler = TrainSampler(train.lengths, size, seed=1, pool=config.data.length_pool)
    batches = [batch for batch in sampler if len(batch.indices) == size]
    chosen = spread([int(train.lengths[batch.indices].sum()) for batch in batches], steps)
    return module, DataLoader(train, sampler=[batches[i] for i in chosen], batch_size=None), data


def run_ours(side: Side, task: str, folder: Path, steps: int, watch: Stopwatch) -> None:
    """What ``python -m lightning_glue.train`` builds and runs, without tracking."""
    module, loader, data = build_ours(side, task, folder, steps, watch)
    import pytorch_lightning as pl

    from lightning_glue.data.batching import padded_size

    class Timer(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            watch.start()
            watch.saw(len(batch["rows"]), len(batch["tokens"]), padded_size(batch))

        def on_train_batch_end(self, *_: Any) -> None:
            watch.stop()

        def on_validation_start(self, *_: Any) -> None:
            watch.evaluation.append(time.perf_counter())

        def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            watch.evaluated += len(batch["rows"])

        def on_validation_end(self, *_: Any) -> None:
            watch.evaluation.append(time.perf_counter())

    pl.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, precision=OURS[side.precision], callbacks=[Timer()], logger=False,
        use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    ).fit(module, loader, data.val_dataloader())  # fmt: skip


def linear_shapes(model: Any, tokens: int, examples: int) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of the linear layers of our forward, attention's small products left out."""
    *layers, last = model.encoder.sentence_encoder.layers
    width, inner = last.fc1.in_features, last.fc1.out_features
    layer = [(3 * width, width), (width, width), (inner, width), (width, inner)]
    all_tokens = [(tokens, inputs, outputs) for _ in layers for outputs, inputs in layer]
    first = [(width, width), *layer[1:]]  # of the last layer, which has keys and values of the rest
    return [*all_tokens, (tokens, width, 2 * width), *((examples, inputs, outputs) for outputs, inputs in first)]


def run_products(side: Side, task: str, folder: Path, steps: int, watch: Stopwatch) -> None:
    """The matrix products of our steps and nothing else: no loop, no casts, no optimizer; what a step cannot beat."""
    module, loader, data = build_ours(side, task, folder, steps, watch)
    import torch

    from lightning_glue.data.batching import padded_size
    from lightning_glue.model.unpadded import Rows

    dtype = torch.float32 if side.precision == "fp32" else torch.bfloat16
    weights = [torch.randn(b, a).mul(0.02).to(dtype) for _, a, b in linear_shapes(module.model, 0, 0)]
    numbers = torch.randn(8192, weights[2].shape[0]).to(dtype).flatten()

    def multiply(batch: Any, backward: bool) -> None:
        rows = Rows.of(batch["lengths"], len(batch["tokens"]), batch["longest"])
        shapes = linear_shapes(module.model, len(rows.places), len(batch["rows"]))
        inputs = [numbers[: n * a].view(n, a) for n, a, _ in shapes]
        for x, weight in zip(inputs, weights):
            torch.nn.functional.linear(x, weight)
        for x, weight, (n, _, b) in reversed([*zip(inputs, weights, shapes)] if backward else []):
            gradient = numbers[: n * b].view(n, b)
            gradient @ weight
            gradient.t() @ x

    for _ in range(EPOCHS):
        for batch in loader:
            watch.start()
            watch.saw(len(batch["rows"]), len(batch["tokens"]), padded_size(batch))
            multiply(batch, backward=True)
            watch.stop()
        watch.evaluation.append(time.perf_counter())
        for batch in itertools.chain(*data.val_dataloader()):
            multiply(batch, backward=False)
            watch.evaluated += len(batch["rows"])
        watch.evaluation.append(time.perf_counter())


def main() -> None:
    name, task, folder, steps = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    side, watch = SIDES[name], Stopwatch(warm_up=steps)
    if side.library in ("fairseq", "huggingface"):
        import torch  # noqa: F401 - before this project says how its threads wait
    runs = {"fairseq": run_fairseq, "huggingface": run_hugging_face, "ours": run_ours, "products": run_products}
    runs[side.library](side, task, folder, steps, watch)
    watch.report(name)


if __name__ == "__main__":
    main()
