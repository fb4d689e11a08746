"""What is looked for before there is a run, and that nothing of it is left but the answer."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.data.batching import TrainSampler, split_batch
from lightning_glue.data.datamodule import Batch
from lightning_glue.errors import OutOfMemory, UserError
from lightning_glue.training import auto_batch, preflight
from lightning_glue.training.build import build
from lightning_glue.training.devices import Devices
from lightning_glue.training.module import GlueModule


def compose(*overrides: str) -> Config:
    given = ["trainer.gpus=0", "data.batch_size=8", *overrides]
    return configuration.compose(given, task="WNLI", model="tiny", data="sample")


@pytest.fixture
def configured(bpe_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    return compose(f"data.bpe_dir={bpe_dir}", "trainer.precision=32-true")


def random_numbers() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_a_trial_changes_nothing(configured: Config) -> None:
    """Weights, modes and random numbers are bit for bit what they were; dropout has drawn meanwhile."""
    module, data, _ = build(configured)
    module.model.encoder.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    rows = preflight.longest_batch(data, 2, padded=False)
    part = data.splits["train"][preflight.longest_part(rows, data.splits["train"], 1)]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = random_numbers()
    for precision in ("32-true", "bf16-mixed", "64-true"):
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        trainer = configuration.flatten(configured) | {"trainer.precision": precision}
        preflight.probe(module, part, configuration.unflatten(trainer))
        assert random_numbers() == expected
    after = module.state_dict()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    assert [one.training for one in module.modules()] == modes
    assert all(parameter.grad is None for parameter in module.parameters())


def longest(config: Config) -> tuple[GlueModule, Batch]:
    module, data, _ = build(config)
    rows = preflight.longest_batch(data, 2, padded=False)
    return module, data.splits["train"][preflight.longest_part(rows, data.splits["train"], 1)]


def test_a_cpu_with_memory_for_twice_the_most_is_not_tried(configured: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = longest(configured)
    most = preflight.most_bytes(module, batch)
    assert preflight.surely_fits(module, batch, configured) == (2 * most <= preflight.memory_left())
    two = compose(f"data.bpe_dir={configured.data.bpe_dir}", "trainer.procs=2", "trainer.precision=32-true")
    double = compose(f"data.bpe_dir={configured.data.bpe_dir}", "trainer.precision=64-true")
    for left, config, fits in ((2, configured, True), (3, two, False), (4, two, True), (3, double, False)):
        monkeypatch.setattr(preflight, "memory_left", lambda left=left: left * most)
        assert preflight.surely_fits(module, batch, config) is fits
    monkeypatch.setattr(preflight, "memory_left", lambda: 2 * most - 1)
    assert not preflight.surely_fits(module, batch, configured)
    monkeypatch.setattr(preflight, "resolve_devices", lambda _: Devices("cuda", 1))  # there memory is dear, time is not
    monkeypatch.setattr(preflight, "memory_left", lambda: 100 * most)
    assert not preflight.surely_fits(module, batch, configured)


PEAK = """
import re, sys
from pathlib import Path
from lightning_glue import config as configuration
from lightning_glue.training import preflight
from lightning_glue.training.build import build
given = ["trainer.gpus=0", "trainer.precision=32-true", "data.batch_size=64", "data.max_tokens=128", *sys.argv[1:]]
config = configuration.compose(given, task="MRPC", model="tiny", data="sample")
module, data, _ = build(config)
train = data.splits["train"]
batch = train[preflight.longest_part(preflight.longest_batch(data, 1, padded=False), train, 1)]
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
preflight.probe(module, batch, config)
print(peak() - before, preflight.most_bytes(module, batch))
"""


@pytest.mark.torture
@pytest.mark.parametrize("stock", [False, True])
def test_the_most_is_more_than_a_process_takes(bpe_dir: Path, cache: Path, tmp_path: Path, stock: bool) -> None:
    shape = {"encoder_layers": 2, "encoder_embed_dim": 256, "encoder_ffn_embed_dim": 1024, "encoder_attention_heads": 8}
    options = [f"data.bpe_dir={bpe_dir}", *(f"++model.architecture.{key}={value}" for key, value in shape.items())]
    options += ["++model.architecture.encoder_layerdrop=0.01"] * stock  # which fairseq's own forward computes
    command = [sys.executable, "-c", PEAK, *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    took, most = map(int, result.stdout.split())
    assert 20 << 20 < took < most < 6 * took


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3),
    st.integers(-1, 9).filter(bool), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_longest_batch_is_the_longest_that_the_sampler_forms(
    lengths: list[int], batch_size: int, pool: int, epochs: int, steps: int, padded: bool
) -> None:
    sizes = np.array(lengths)
    splits = {"train": SimpleNamespace(lengths=sizes)}
    data = SimpleNamespace(splits=splits, batch_size=batch_size, seed=3, pool=pool)

    def need(rows: np.ndarray) -> int:
        return int(sizes[rows].max() * len(rows) if padded else sizes[rows].sum())

    sampler = TrainSampler(sizes, batch_size, seed=3, pool=pool)
    formed = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        formed += [batch.indices for batch in sampler]
    formed = formed[: steps if steps > 0 else None]
    found = preflight.longest_batch(data, epochs, steps, padded=padded)
    assert need(found) == max(map(need, formed))
    parts = split_batch(found, sizes, 2)
    first = preflight.longest_part(found, splits["train"], 2)
    assert sizes[first.indices].max() == sizes[found].max() and len(first.indices) == max(
        len(part.indices) for part in parts
    )


def test_a_batch_that_does_not_fit_is_said_with_what_to_do(configured: Config) -> None:
    def lacks(accumulate: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(OutOfMemory, match=r"8 examples at once.*CUDA out of memory.*trainer.accumulate=2 or") as found:
        auto_batch.fitting(configured, 1, lacks, fixed=False)
    assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match="of the model"):  # what is no lack of memory is said as it is
        auto_batch.fitting(configured, 1, lambda _: (_ for _ in ()).throw(ValueError("of the model")), fixed=False)


def test_micro_batches_are_halved_until_they_fit(bpe_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = compose(f"data.bpe_dir={bpe_dir}", "trainer.auto_batch=true", "trainer.val_check_interval=3")
    tried = []

    def attempt(accumulate: int) -> None:
        tried.append(accumulate)
        if accumulate < 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    assert auto_batch.fitting(config, 1, attempt, fixed=False) == 4
    assert tried == [1, 2, 4]
    found = auto_batch.divided(config, 4)
    assert (found.data.batch_size, found.trainer.accumulate, found.trainer.val_check_interval) == (8, 4, 12)
    assert configuration.digest(found) == configuration.digest(config)  # --resume auto finds it again
    assert auto_batch.tags(found, 1) == {"auto_batch.accumulate": "4", "auto_batch.examples_at_once": "2"}
    record = {"config": configuration.recorded(found)}
    assert auto_batch.as_recorded(config, SimpleNamespace(record=record)) == found
    with pytest.raises(OutOfMemory, match="2 examples at once"):  # four processes: one more halving is not possible
        auto_batch.fitting(compose(f"data.bpe_dir={bpe_dir}", "trainer.auto_batch=true", "data.batch_size=6"), 4,
                           lambda _: attempt(0), fixed=False)  # fmt: skip
    with pytest.raises(OutOfMemory, match="set trainer.accumulate=2"):  # a run that goes on keeps its own
        auto_batch.fitting(config, 1, attempt, fixed=True)


LIMITED = """
import resource, sys, torch
from pathlib import Path
from lightning_glue import config as configuration
from lightning_glue.training import auto_batch, preflight
from lightning_glue.training.build import build
given = ["trainer.gpus=0", "trainer.auto_batch=true", "trainer.precision=32-true", "data.batch_size=128",
         "data.bpe_dir=" + sys.argv[1], "model.architecture.encoder_ffn_embed_dim=4096"]
config = configuration.compose(given, task="MRPC", model="tiny", data="sample")
torch.set_num_threads(1)
torch.backends.mkldnn.enabled = False  # which has words of its own for it
module, data, _ = build(config)
train = data.splits["train"]
rows = preflight.longest_batch(data, 1, padded=False)
def attempt(accumulate):
    preflight.probe(module, train[preflight.longest_part(rows, train, accumulate)], config)
attempt(64)  # threads and libraries have what they need
size = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]), -1))
print(auto_batch.fitting(config, 1, attempt, fixed=False))
"""


@pytest.mark.torture
def test_a_machine_without_memory_gets_smaller_micro_batches(bpe_dir: Path, cache: Path, tmp_path: Path) -> None:
    """The allocator itself says so, to a process that may have no more."""
    command = [sys.executable, "-c", LIMITED, str(bpe_dir), str(128 << 20)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) > 1
    assert "the longest batch does not fit into memory: trainer.accumulate=" in result.stderr


def test_a_disk_that_is_too_small_is_found_before_the_run(configured: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    module, *_ = build(configured)
    weights = sum(parameter.numel() * 4 for parameter in module.parameters())
    moments = sum(parameter.numel() * 8 for parameter in module.parameters() if parameter.requires_grad)
    assert preflight.checkpoint_bytes(configured, module) == 2 * weights + 2 * (weights + moments)
    preflight.check_folders(configured, module, None)
    assert not Path("mlruns").exists()  # nothing is made
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(UserError, match=r"checkpoints of this run need \d+ MiB below mlruns, and its disk has 1 MiB"):
        preflight.check_folders(configured, module, None)


def test_a_folder_that_cannot_be_written_is_found_before_the_run(configured: Config) -> None:
    module, *_ = build(configured)
    with pytest.raises(UserError, match=r"cannot write below /proc: "):
        preflight.check_folders(configured, module, Path("/proc/nowhere"))


def test_a_divided_configuration_keeps_the_name_of_its_run() -> None:
    config = configuration.compose(["trainer.auto_batch=true"], experiment="demo")
    assert config.run_name.startswith("demo: ")
    assert auto_batch.divided(config, 2 * config.trainer.accumulate).run_name == config.run_name
