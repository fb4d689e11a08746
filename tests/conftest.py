"""Shared parts of the tests: real GLUE and BPE files where they are, generated ones otherwise."""

from __future__ import annotations

import atexit
import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import zygote
from helpers.project import write_small_bpe
from helpers.store import put_store

gc.disable()  # until all is imported, which takes a third less time without
os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small processes on few cores
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # as in the program
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch may do: there is no GPU to run it

_TEST_BPE = "LIGHTNING_GLUE_TEST_BPE"  # where the processes of pytest-xdist find what the next line takes away
_REAL_BPE = os.environ.pop("ROBERTA_BPE_DIR", None) or os.environ.get(_TEST_BPE)
_REAL_GLUE = os.environ.pop("GLUE_DIR", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)
for _name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS"):  # of `make test`
    os.environ.pop(_name, None)


# What takes longest begins first, so that the processes of pytest-xdist end together.
_FIRST = ("torture", "tests", "system", "training", "tuning", "tracking", "data", "model", "export", "utils")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("TORTURE_SEED", str(random.SystemRandom().randrange(10**6)))  # xdist's processes inherit it
    os.environ.setdefault("TORTURE_BEGAN", str(time.time()))
    zygote.install_shared(at_once=config.args_source is pytest.Config.ArgsSource.TESTPATHS)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so would its children
    # Absolute: the tests run the program in temporary folders. Handed on through fixtures, never by accident.
    config.real_bpe = Path(_REAL_BPE).resolve() if _REAL_BPE else None
    config.real_glue = Path(_REAL_GLUE).resolve() if _REAL_GLUE else None
    if _REAL_BPE:
        os.environ[_TEST_BPE] = str(config.real_bpe)
    if _REAL_GLUE:
        os.environ["GLUE_DIR"] = str(config.real_glue)


def pytest_sessionstart(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and session.config.option.markexpr == "torture":
        reporter.write_line(f"TORTURE_SEED={os.environ['TORTURE_SEED']} repeats this run's random faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _minutes():  # not always the same files are left out
        items.sort(key=lambda item: random.Random(f"{os.environ['TORTURE_SEED']} {item.path.name}").random())
        return
    items.sort(key=lambda item: _FIRST.index(name) if (name := item.path.parent.name) in _FIRST else len(_FIRST))


def pytest_collection_finish() -> None:
    """What the tests' modules have imported stays: no collection of garbage goes through it again."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # Triton complains of what outlives the interpreter's last collection
    gc.freeze = lambda: None  # of trainings in this process: what tests leave is garbage
    gc.enable()


def _minutes() -> float:
    """After which no test of ``make torture`` begins; 0: all do."""
    return float(os.environ.get("TORTURE_MINUTES") or 0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if "torch" in sys.modules:  # a model that a fixture draws is the same whatever ran before
        sys.modules["torch"].manual_seed(0)
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU is at hand")
    limit = _minutes()
    if limit and item.get_closest_marker("torture") and time.time() - float(os.environ["TORTURE_BEGAN"]) > 60 * limit:
        pytest.skip(f"TORTURE_MINUTES={limit:g} are over; TORTURE_SEED chooses which files come first")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the whole session, so that each data set is generated and tokenized once."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LIGHTNING_GLUE_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def new_store() -> Callable[[Path], None]:
    return put_store


@pytest.fixture(scope="session")
def real_glue(request: pytest.FixtureRequest) -> Path:
    if request.config.real_glue is None:
        pytest.skip("GLUE_DIR is not set: real GLUE files are not at hand")
    return request.config.real_glue


@pytest.fixture(scope="session")
def glue_dir(request: pytest.FixtureRequest, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real GLUE files, or generated ones."""
    from lightning_glue.data import sample

    return request.config.real_glue or sample.generate(tmp_path_factory.mktemp("glue") / "sample")


@pytest.fixture(scope="session")
def small_bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE in the format of RoBERTa's: a model of it is small as well."""
    return write_small_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="session")
def given_bpe(request: pytest.FixtureRequest, small_bpe: Path) -> Path:
    """RoBERTa's real BPE files, or a small one."""
    return request.config.real_bpe or small_bpe


@pytest.fixture(scope="session")
def bpe_dir(given_bpe: Path) -> Path:
    """Those given; the small one where what is tested looks at no token."""
    return given_bpe
