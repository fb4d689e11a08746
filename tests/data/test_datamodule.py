"""Batches against fairseq's own ``sentence_prediction`` task on the same folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_glue.data import binarize, sources
from lightning_glue.data.batching import EvalSampler, MicroBatch, padded, padded_size
from lightning_glue.data.binarize import Prepared
from lightning_glue.data.datamodule import GlueDataModule, join_parts, load_split
from lightning_glue.data.tokenizer import EOS, PAD
from lightning_glue.model import pretrained
from lightning_glue.tasks import TASKS


@pytest.fixture(scope="session")
def prepared(cache: Path, bpe_dir: Path) -> dict[str, Prepared]:
    encoder = pretrained.load_tokenizer("gpt2", str(bpe_dir))
    return {
        name: binarize.prepare(TASKS[name], sources.glue_directory(TASKS[name], "sample", None), encoder, cache)
        for name in ("RTE", "SST-2", "STS-B", "MNLI", "QQP")
    }


def fairseq_dataset(name: str, directory: Path, split: str):
    task = TASKS[name]
    config = SentencePredictionConfig(
        data=str(directory),
        num_classes=task.num_outputs,
        init_token=0,
        separator_token=2,
        no_shuffle=True,
        regression_target=task.is_regression,
        seed=1,
    )
    fairseq_task = SentencePredictionTask.setup_task(config)
    return fairseq_task, fairseq_task.load_dataset(split)


@pytest.mark.parametrize("name", ["RTE", "SST-2", "STS-B", "MNLI", "QQP"])
def test_tokens_and_targets_are_those_of_fairseqs_task(name: str, prepared: dict[str, Prepared]) -> None:
    task, directory = TASKS[name], prepared[name].directory
    for split in (task.train, *task.dev):
        fairseq_task, theirs = fairseq_dataset(name, directory, binarize.fairseq_names(task)[split.name])
        ours = load_split(task, split, directory, 512)
        assert len(ours) == len(theirs)
        rows = np.arange(0, len(ours), 7)
        batch = ours[MicroBatch(rows, 1.0)]
        sample = theirs.collater([theirs[int(row)] for row in rows])
        assert torch.equal(padded(batch), sample["net_input"]["src_tokens"])
        assert torch.equal(batch["lengths"], sample["net_input"]["src_lengths"])
        assert len(batch["tokens"]) == int(sample["net_input"]["src_lengths"].sum())
        assert padded_size(batch) == sample["net_input"]["src_tokens"].numel()
        if task.is_regression:
            torch.testing.assert_close(batch["targets"], sample["target"].view(-1).float(), rtol=1e-6, atol=1e-7)
        else:  # ids differ on purpose, labels must not
            nspecial = fairseq_task.label_dictionary.nspecial
            their_labels = [fairseq_task.label_dictionary[int(i) + nspecial] for i in sample["target"].view(-1)]
            assert [task.labels[i] for i in batch["targets"]] == their_labels


texts = st.lists(st.tuples(st.integers(1, 14), st.integers(1, 14)), min_size=1, max_size=6)


@given(texts, st.booleans())
@settings(max_examples=100, deadline=None)
def test_joining_keeps_order_and_cuts_the_longer_text(sizes: list[tuple[int, int]], pair: bool) -> None:
    limit = 12
    columns = list(zip(*sizes))[: 2 if pair else 1]
    parts = []
    for number, column in enumerate(columns):
        items = [[100 * (number + 1) + i for i in range(size - 1)] + [EOS] for size in column]
        parts.append((np.array([i for item in items for i in item]), np.array(column)))
    tokens, lengths, truncated = join_parts(parts, limit)
    start = 0
    for row, length in enumerate(lengths):
        example = tokens[start : start + length].tolist()
        start += length
        whole = [0]
        for number, column in enumerate(columns):
            whole += ([EOS] if number else []) + [100 * (number + 1) + i for i in range(column[row] - 1)] + [EOS]
        assert len(example) == min(len(whole), limit)
        assert (example[0], example[-1]) == (0, EOS)
        if len(whole) <= limit:
            assert example == whole
        elif pair:
            first, second = example.index(EOS), len(example) - example.index(EOS) - 2
            assert max(first, second) - min(first, second) <= 1 or min(first, second) == min(
                column[row] for column in columns
            )
    assert truncated == sum(
        1 + sum(column[row] for column in columns) + (len(columns) - 1) > limit for row in range(len(lengths))
    )


def test_a_batch_is_packed_and_padding_fills_it_to_its_longest(prepared: dict[str, Prepared]) -> None:
    split = load_split(TASKS["RTE"], TASKS["RTE"].dev[0], prepared["RTE"].directory, 512)
    batch = split[MicroBatch(np.array([0, 1, 2]), 0.5)]
    assert batch["tokens"].tolist() == split.tokens[: split.lengths[:3].sum()].tolist()
    assert batch["lengths"].tolist() == split.lengths[:3].tolist()
    assert batch["longest"] == split.lengths[:3].max()
    assert padded(batch).shape == (3, split.lengths[:3].max())
    assert (padded(batch) != PAD).sum() == len(batch["tokens"])
    assert padded_size(batch) == padded(batch).numel()
    assert batch["loss_weight"] == 0.5
    assert batch["rows"].tolist() == [0, 1, 2]


def test_unlabelled_rows_have_no_targets(prepared: dict[str, Prepared]) -> None:
    split = load_split(TASKS["RTE"], TASKS["RTE"].test[0], prepared["RTE"].directory, 512)
    assert split[next(iter(EvalSampler(split.lengths, 100)))]["targets"].numel() == 0


def test_the_module_serves_both_dev_sets_of_mnli(prepared: dict[str, Prepared]) -> None:
    data = GlueDataModule(TASKS["MNLI"], lambda: prepared["MNLI"], batch_size=8)
    data.setup("fit")
    loaders = data.val_dataloader()
    assert [loader.dataset.name for loader in loaders] == ["dev_matched", "dev_mismatched"]
    assert sum(len(batch["rows"]) for batch in loaders[1]) == prepared["MNLI"].splits["dev_mismatched"].rows
    assert os.fspath(data.prepared.directory) == os.fspath(prepared["MNLI"].directory)
