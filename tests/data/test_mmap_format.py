from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data.indexed_dataset import MMapIndexedDataset, make_builder
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_glue.data import mmap_format
from lightning_glue.errors import UserError

items = st.lists(st.lists(st.integers(0, 60000), min_size=1, max_size=8), min_size=1, max_size=20)


@given(items, st.sampled_from([40000, 65499, 65500, 100000]))
@settings(max_examples=50, deadline=None)
def test_bytes_equal_fairseqs_builder(tmp_path_factory: pytest.TempPathFactory, rows: list, vocabulary: int) -> None:
    folder = tmp_path_factory.mktemp("indexed")
    builder = make_builder(str(folder / "theirs.bin"), "mmap", vocabulary)
    rows = [[value % vocabulary for value in row] for row in rows]
    for row in rows:
        builder.add_item(torch.IntTensor(row))
    builder.finalize(str(folder / "theirs.idx"))
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    mmap_format.write(folder / "ours", np.concatenate(rows).astype(np.int32), lengths, vocabulary)
    for ending in ("bin", "idx"):
        assert (folder / f"ours.{ending}").read_bytes() == (folder / f"theirs.{ending}").read_bytes()
    ids, read_lengths = mmap_format.read(folder / "theirs")
    assert ids.tolist() == [value for row in rows for value in row]
    assert read_lengths.tolist() == lengths.tolist()
    assert [item.tolist() for item in MMapIndexedDataset(str(folder / "ours"))] == rows


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    mmap_format.write(tmp_path / "x", np.arange(6, dtype=np.int32), np.array([2, 4]), 100)
    data = tmp_path / "x.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"x\.bin holds 11 bytes, its index says 12"):
        mmap_format.read(tmp_path / "x")
    (tmp_path / "x.idx").write_bytes(b"something else entirely")
    with pytest.raises(UserError, match=r"x\.idx is no fairseq mmap index"):
        mmap_format.read(tmp_path / "x")
    with pytest.raises(UserError, match=r"y\.idx is missing"):
        mmap_format.read(tmp_path / "y")
