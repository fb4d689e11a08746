"""Preprocessed arrays to batches of tensors: ``<s> a </s>`` or ``<s> a </s> </s> b </s>``, packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_glue.data import mmap_format
from lightning_glue.data.batching import EvalSampler, MicroBatch, Packed, TrainSampler
from lightning_glue.data.binarize import Prepared, fairseq_names
from lightning_glue.data.labels import LabelOrder, read_label_symbols
from lightning_glue.data.tokenizer import BOS, EOS, SPECIALS
from lightning_glue.errors import DataError, UserError
from lightning_glue.tasks import Split, Task
from lightning_glue.utils.redact import first_line

_AGAIN = "preprocess the data again"


class Batch(Packed):
    """What the model sees, and what becomes of it.

    targets: (examples,) int64 label ids, float32 label / scale for regression, (examples, labels) float32 of 0 and 1
        where an example has any number of labels, or empty (0,) for unlabelled rows.
    rows: (examples,) int64 rows of the split. loss_weight: see MicroBatch.
    """

    targets: torch.Tensor
    rows: torch.Tensor
    loss_weight: float


@dataclass
class TokenizedSplit(Dataset[Batch]):
    """One split in memory; indexed by a :class:`MicroBatch`, it returns the collated batch.

    Attributes:
        tokens: all examples one after the other, (sum of lengths,) int32.
        lengths: (examples,) int64.
        targets: as of :class:`Batch`, None for an unlabelled split.
        truncated: examples cut to the maximum length.
    """

    name: str
    tokens: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray | None
    truncated: int = 0

    def __post_init__(self) -> None:
        self.starts = np.cumsum(self.lengths) - self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, batch: MicroBatch) -> Batch:
        lengths = self.lengths[batch.indices]
        ends = np.cumsum(lengths)
        places = np.repeat(self.starts[batch.indices] - (ends - lengths), lengths) + np.arange(ends[-1])
        targets = np.empty(0, np.int64) if self.targets is None else self.targets[batch.indices]
        return Batch(
            tokens=torch.from_numpy(self.tokens[places].astype(np.int64)),
            lengths=torch.from_numpy(lengths),
            longest=int(lengths.max()),
            targets=torch.from_numpy(targets),
            rows=torch.from_numpy(batch.indices),
            loss_weight=batch.loss_weight,
        )


def _kept_lengths(first: np.ndarray, second: np.ndarray | None, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens kept of each part (``</s>`` included) so that the example fits: the longer part is cut first."""
    if second is None:
        return np.minimum(first, max_tokens - 1), np.empty(0, np.int64)
    room = max_tokens - 2
    kept_first = np.minimum(first, np.maximum(room - second, room - room // 2))
    return kept_first, np.minimum(second, room - kept_first)


def _place(out: np.ndarray, starts: np.ndarray, ids: np.ndarray, lengths: np.ndarray, kept: np.ndarray) -> None:
    """Copy items (``ids``, ``lengths``) to ``out`` at ``starts``, the first ``kept - 1`` ids and the final ``</s>``."""
    column = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    keep = (column < np.repeat(kept - 1, lengths)) | (column == np.repeat(lengths - 1, lengths))
    column = np.minimum(column, np.repeat(kept - 1, lengths))[keep]
    out[np.repeat(starts, kept) + column] = ids[keep]


def join_parts(parts: list[tuple[np.ndarray, np.ndarray]], max_tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Join the one or two texts of every example as fairseq's ``sentence_prediction`` task does.

    Returns:
        tokens (sum of lengths,) int32, lengths (examples,) int64, and how many examples were truncated.
    """
    ids, lengths = zip(*parts)
    first, second = _kept_lengths(lengths[0], lengths[1] if len(parts) == 2 else None, max_tokens)
    pair = len(parts) == 2
    total = 1 + first + (1 + second if pair else 0)
    out = np.empty(int(total.sum()), dtype=np.int32)
    starts = np.cumsum(total) - total
    out[starts] = BOS
    _place(out, starts + 1, ids[0], lengths[0], first)
    if pair:
        out[starts + 1 + first] = EOS
        _place(out, starts + 2 + first, ids[1], lengths[1], second)
    whole = 1 + lengths[0] + (1 + lengths[1] if pair else 0)
    return out, total, int((whole > max_tokens).sum())


def _read_targets(task: Task, directory: Path, name: str) -> np.ndarray:
    """Label ids in the registry's order (fairseq's are by frequency), or scaled scores."""
    if task.is_regression:
        return _read_scores(directory / "label" / f"{name}.label")
    if task.own:
        return _read_own_labels(task, directory / "label" / name)
    symbols = read_label_symbols(directory)
    try:
        order = LabelOrder(task, tuple(symbols))
    except UserError as error:
        raise DataError(f"{directory / 'label' / 'dict.txt'}: {error}; {_AGAIN}") from None
    ours = np.full(len(SPECIALS) + len(symbols), -1, dtype=np.int64)
    ours[len(SPECIALS) :] = order.to_fairseq[: len(symbols)]
    ids, lengths = mmap_format.read(directory / "label" / name)
    ids = ids.reshape(-1, 2)[:, 0] if (lengths == 2).all() else np.full(1, len(ours))
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(ours):
        raise DataError(f"{directory / 'label' / name}.bin holds other ids than its dict.txt; {_AGAIN}")
    targets = ours[ids]
    if (targets < 0).any():
        assert task.train  # whose labels are the dictionary
        row, names = int((targets < 0).argmax()) + 1, fairseq_names(task)
        file = next(split.file_name for split in task.splits if names[split.name] == name)
        raise DataError(f"{task.directory}/{file}: row {row} has a label that no row of {task.train.file_name} has")
    return targets


def _read_own_labels(task: Task, prefix: Path) -> np.ndarray:
    """Ids (examples,) int64, or where an example has any number of labels a 1 for each: (examples, labels) float32."""
    ids, lengths = mmap_format.read(prefix)
    wrong = len(ids) and int(ids.max()) >= len(task.labels)
    if wrong or not (task.multilabel or (lengths == 1).all()):
        raise DataError(f"{prefix}.bin holds other labels than {task.name} has; {_AGAIN}")
    if not task.multilabel:
        return ids.astype(np.int64)
    found = np.zeros((len(lengths), len(task.labels)), dtype=np.float32)
    found[np.repeat(np.arange(len(lengths)), lengths), ids] = 1
    return found


def _read_scores(path: Path) -> np.ndarray:
    try:
        return np.array(path.read_text().split(), dtype=np.float32)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no list of scores ({first_line(error)}); {_AGAIN}") from None


def _read_text(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and lengths of one text of every example: each at least its ``</s>``, none beyond the dictionary."""
    ids, lengths = mmap_format.read(folder / name)
    try:
        size = len(SPECIALS) + (folder / "dict.txt").read_bytes().count(b"\n")
    except OSError as error:
        raise DataError(f"{folder / 'dict.txt'} cannot be read: {error.strerror}; {_AGAIN}") from None
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise DataError(f"{folder / name}.bin holds the id {int(ids.max())}, but dict.txt has {size}; {_AGAIN}")
    if (lengths < 1).any() or (ids[np.cumsum(lengths) - 1] != EOS).any():
        raise DataError(f"{folder / name}.bin has an example without its end; {_AGAIN}")
    return ids, lengths


def load_split(task: Task, split: Split, directory: Path, max_tokens: int) -> TokenizedSplit:
    """Read one split of a folder in fairseq's layout.

    Raises:
        UserError: a file is missing or damaged, or the files do not fit one another.
    """
    name = fairseq_names(task)[split.name]
    parts = [_read_text(directory / f"input{column}", name) for column in range(task.num_texts)]
    targets = _read_targets(task, directory, name) if split.labelled else None
    counts = [len(lengths) for _, lengths in parts] + ([] if targets is None else [len(targets)])
    if len(set(counts)) > 1:
        raise DataError(f"{directory}: {name} has {' and '.join(map(str, counts))} texts and labels; {_AGAIN}")
    tokens, lengths, truncated = join_parts(parts, max_tokens)
    return TokenizedSplit(split.name, tokens, lengths, targets, truncated)


class GlueDataModule(pl.LightningDataModule):
    """Batches of a task's splits.

    Args:
        prepare: makes (or finds) the preprocessed arrays, for which it reads the raw files; called once in a process,
            and not at all where ``prepared`` is set. Processes that make the same arrays wait for one another.
        batch_size: examples per optimizer step over all processes and accumulated micro-batches.
        eval_tokens: tokens, padding included, in an evaluation batch.
        pool: batches among which examples of similar length are sought; 1 is a plain shuffle.
    """

    def __init__(
        self,
        task: Task,
        prepare: Callable[[], Prepared],
        *,
        batch_size: int,
        eval_tokens: int = 2048,
        max_tokens: int = 512,
        accumulate: int = 1,
        pool: int = 1,
        seed: int = 1,
    ) -> None:
        super().__init__()
        self.task, self.prepare = task, prepare
        self.batch_size, self.accumulate, self.pool, self.seed = batch_size, accumulate, pool, seed
        self.eval_tokens, self.max_tokens = eval_tokens, max_tokens
        self._prepared: Prepared | None = None
        self.splits: dict[str, TokenizedSplit] = {}
        self.start = (0, 0)  # epoch and batches done in it, where training is resumed

    @property
    def prepared(self) -> Prepared:
        """The preprocessed arrays, once :meth:`prepare_data` or :meth:`setup` has been called."""
        assert self._prepared, "prepare_data() comes first"
        return self._prepared

    @prepared.setter
    def prepared(self, found: Prepared | None) -> None:
        self._prepared = found

    def prepare_data(self) -> None:
        self._prepared = self._prepared or self.prepare()

    def setup(self, stage: str) -> None:
        if self.splits:
            return
        self.prepare_data()
        for split in self.task.splits:
            if split.name in self.prepared.splits:
                self.splits[split.name] = load_split(self.task, split, self.prepared.directory, self.max_tokens)

    def _processes(self) -> dict[str, int]:
        return {"rank": self.trainer.global_rank, "world": self.trainer.world_size} if self.trainer else {}

    def train_dataloader(self) -> DataLoader:
        train = self.splits["train"]
        sampler = TrainSampler(
            train.lengths,
            self.batch_size,
            seed=self.seed,
            accumulate=self.accumulate,
            pool=self.pool,
            start=self.start,
            **self._processes(),
        )
        return self._loader(train, sampler)

    def _eval_dataloader(self, name: str) -> DataLoader:
        split = self.splits[name]
        return self._loader(split, EvalSampler(split.lengths, self.eval_tokens, **self._processes()))

    def _loader(self, split: TokenizedSplit, sampler: Sampler[MicroBatch]) -> DataLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        # From pinned memory a copy to the device waits for nobody.
        return DataLoader(split, sampler=sampler, batch_size=None, pin_memory=on_gpu)

    def val_dataloader(self) -> list[DataLoader]:
        return [self._eval_dataloader(split.name) for split in self.task.dev]
