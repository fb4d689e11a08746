from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lightning_glue.errors import CheckpointError
from lightning_glue.training.checkpoints import RECORD, AtomicCheckpointIO


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Within, the system refuses to write more into a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_cannot_be_written_says_what_there_is_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = {RECORD: {"run_id": "abc"}, "weights": torch.ones(10_000)}
    io, last = AtomicCheckpointIO(), tmp_path / "run" / "last.ckpt"
    with files_of_at_most(1000), pytest.raises(CheckpointError, match="--resume abc starts over: there is none yet$"):
        io.save_checkpoint(checkpoint, last)
    assert list(last.parent.iterdir()) == []
    io.save_checkpoint(checkpoint, last)
    whole = last.read_bytes()
    message = "File too large; free space, then .*--resume abc goes on from the one before, which is whole$"
    with files_of_at_most(1000), pytest.raises(CheckpointError, match=message):
        io.save_checkpoint(checkpoint, last)
    assert last.read_bytes() == whole


def test_where_a_file_has_no_second_name_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on shares of Windows, which no link of this machine shows."""
    from lightning_glue.tracking import mirror
    from lightning_glue.training import checkpoints

    def link(*names: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    (tmp_path / "a").write_text("one")
    checkpoints._link(tmp_path / "a", tmp_path / "b")
    assert mirror._fix(tmp_path / "a", tmp_path / "c") == tmp_path / "c"
    (tmp_path / "a").write_text("other")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "other", "b": "one", "c": "one"}
