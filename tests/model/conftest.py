"""The small BPE for all tests here, but for those that ask for the one given."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bpe_dir(small_bpe: Path) -> Path:
    return small_bpe
