"""What would end a training late, looked for before there is a run: folders, disk, memory for the longest batch."""

from __future__ import annotations

import random
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_glue.config import Config
from lightning_glue.data.batching import MicroBatch, moved, padded_size, split_batch, train_batches
from lightning_glue.errors import UserError
from lightning_glue.training.devices import resolve_devices, resolve_precision
from lightning_glue.training.loss import example_losses
from lightning_glue.utils.launch import is_distributed_child, launch

if TYPE_CHECKING:
    from lightning_glue.data.datamodule import Batch, GlueDataModule, TokenizedSplit
from lightning_glue.training.module import GlueModule

_SPARE = 1 << 26  # bytes for the journal, figures and predictions
_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def check_folders(config: Config, module: GlueModule, checkpoints: Path | None, already: int = 0) -> None:
    """Raise UserError where a folder that the run needs cannot be written, or its disk cannot take the checkpoints.

    Process 0 alone writes. Artifacts of a run in a database are in ``mlruns`` unless MLflow was told otherwise, those
    for a server wait beside the journal.

    Args:
        checkpoints: where they go instead of the run's artifacts.
        already: bytes of checkpoints that a run that goes on has there.
    """
    if is_distributed_child():
        return
    journal, remote = Path(config.tracking.journal), str(config.tracking.uri or "").startswith("http")
    store = journal if remote or not config.tracking.checkpoints else Path("mlruns")
    target = checkpoints or store
    for folder in dict.fromkeys([journal, target]):
        _check_writable(folder)
    needed = checkpoint_bytes(config, module) - already
    place = _nearest(target)
    free = shutil.disk_usage(place).free
    if needed + _SPARE > free:
        raise UserError(
            f"the checkpoints of this run need {_size(needed)} below {target}, and its disk has {_size(free)} free; "
            "free space, lower tracking.keep_best, or choose another disk with tracking.journal or by starting there"
        )


def checkpoint_bytes(config: Config, module: GlueModule) -> int:
    """The most that a run's checkpoints and its export take at any time.

    The best ones hold the weights, the last one Adam's two moments, too. A new file is there whole before the one it
    replaces goes.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())
    last = weights + optimizer_bytes(module)
    export = weights if config.tracking.checkpoints else 0
    return config.tracking.keep_best * weights + 2 * last + export


def optimizer_bytes(module: torch.nn.Module) -> int:
    """Adam's two moments, in float32."""
    return sum(8 * parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _check_writable(folder: Path) -> None:
    place = _nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(
            f"cannot write below {place}: {error.strerror}; get rights or free space there, or see tracking.journal"
        ) from None


def _nearest(folder: Path) -> Path:
    """The folder, or the innermost one around it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 1 << 28 else f"{count / 2**20:.0f} MiB"


def longest_batch(data: GlueDataModule, epochs: int, steps: int = -1, *, padded: bool) -> np.ndarray:
    """The rows of the optimizer step that needs the most memory, of all that the training will form.

    Args:
        steps: optimizer steps; -1: no limit.
        padded: the model pads: the longest example counts for each.
    """
    lengths = data.splits["train"].lengths
    best, most = np.arange(1), -1
    an_epoch = -(-len(lengths) // data.batch_size)
    left = steps if steps > 0 else epochs * an_epoch
    for epoch in range(min(epochs, -(-left // an_epoch))):
        batches = train_batches(lengths, data.batch_size, data.seed, epoch, data.pool)[: left - epoch * an_epoch]
        sizes = np.array([len(batch) for batch in batches])
        ordered, starts = lengths[np.concatenate(batches)], np.cumsum(sizes) - sizes
        sums = np.maximum.reduceat(ordered, starts) * sizes if padded else np.add.reduceat(ordered, starts)
        place = int(sums.argmax())
        if sums[place] > most:
            best, most = batches[place], int(sums[place])
    return best


def longest_part(rows: np.ndarray, train: TokenizedSplit, parts: int) -> MicroBatch:
    """The micro-batch of a step that has the longest example, and as many as any."""
    return split_batch(rows, train.lengths, parts)[0]


def surely_fits(module: GlueModule, batch: Batch, config: Config) -> bool:
    """Whether a batch need not be tried: on the CPU, where that takes seconds, and there is memory for twice the most
    that its forward and backward can take, in all processes of this machine."""
    devices = resolve_devices(config.trainer)
    if devices.accelerator != "cpu":
        return False
    double = resolve_precision(config.trainer, "cpu") == "64-true"
    return 2 * devices.devices * (1 + double) * most_bytes(module, batch) <= memory_left()


def most_bytes(module: GlueModule, batch: Batch) -> int:
    """More than a forward and backward in float32 takes, gradients and the optimizer's state included.

    Counts what a layer keeps for each token, and for each pair of tokens that a head compares; 1.6 to 2.6 times what
    processes were seen to take.
    """
    encoder = module.model.encoder.sentence_encoder
    layer = encoder.layers[0]
    tokens = len(batch["tokens"]) if module.model.runs_unpadded else padded_size(batch)
    kept = 20 * layer.fc1.in_features + 4 * layer.fc1.out_features + 6 * layer.self_attn.num_heads * batch["longest"]
    gradients = optimizer_bytes(module) // 2
    return 4 * tokens * len(encoder.layers) * kept + 2 * gradients + optimizer_bytes(module)


def memory_left() -> int:
    """Bytes that this process may still take: of the machine, of its control group, and by its own limit."""
    import psutil

    left = [psutil.virtual_memory().available]
    folder = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            left.append(int((folder / limit).read_text()) - int((folder / used).read_text()))
        except (OSError, ValueError):  # there is none
            continue
    limit_of_process = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit_of_process != resource.RLIM_INFINITY:
        left.append(limit_of_process - psutil.Process().memory_info().vms)
    return max(0, min(left))


def probe(module: GlueModule, batch: Batch, config: Config) -> None:
    """One forward and backward as in training, of which nothing is left but the module on its device.

    Memory for the optimizer's state is held meanwhile: from the second step on it is taken.

    Raises:
        Exception: the device has no room for it.
    """
    accelerator = resolve_devices(config.trainer).accelerator
    device = torch.device("cuda", launch().local_rank) if accelerator == "cuda" else torch.device("cpu")
    precision = resolve_precision(config.trainer, accelerator)
    dtype = _DTYPES.get(precision)
    with _unchanged(module, device):
        try:
            module.to(device)
            if precision == "64-true":
                module.double()
            moments = torch.empty(optimizer_bytes(module), dtype=torch.uint8, device=device)
            with torch.autocast(device.type, dtype=dtype) if dtype else nullcontext():
                outputs = module(moved(batch, device))
                losses = example_losses(module.task, outputs, batch["targets"].to(device), weighted=True)
                loss = losses.sum() * batch["loss_weight"]
            loss.backward()
            del moments
        finally:
            module.zero_grad(set_to_none=True)
            if precision == "64-true":
                module.float()  # every float32 is a float64: the way there and back changes nothing
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()


@contextmanager
def _unchanged(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Around a trial: random numbers go on as if it had not been, and every part of the module is in its mode again."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    modes = {part: part.training for part in module.modules()}
    try:
        module.train()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
