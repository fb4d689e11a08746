"""Which engine gives the slots, and what must be the same wherever they are."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.project import ROOT

from lightning_glue.errors import UserError
from lightning_glue.execution import ray_guard
from lightning_glue.execution.engines import open_engine
from lightning_glue.execution.joining import Files, check_folder, check_same, describe


def test_nothing_imports_ray_with_the_local_engine() -> None:
    code = """
import sys
from pathlib import Path
from lightning_glue.execution.engines import open_engine
from lightning_glue.execution.place import Division
import lightning_glue.tune, lightning_glue.tuning.search, lightning_glue.tuning.controller
with open_engine("local", None) as engine:
    assert engine.groups(Division(workers=2), "x:y", Path())
assert not [name for name in sys.modules if name == "ray" or name.startswith("ray.")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(
    ("name", "address", "message"),
    [
        ("rai", None, "unknown --engine 'rai'; did you mean 'ray'?"),
        ("local", "auto", "--address auto is that of a Ray cluster; add --engine ray"),
        ("ray", None, "pip install 'lightning-glue[ray]'"),
    ],
)
def test_an_engine_that_cannot_be_is_one_line(
    name: str, address: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(UserError) as raised:
        open_engine(name, address)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_difference_names_the_node_and_both_values(tmp_path: Path) -> None:
    for folder in ("ours", "theirs"):
        (tmp_path / folder / "RTE").mkdir(parents=True)
        (tmp_path / folder / "RTE" / "train.tsv").write_text(f"{folder}\n")
        (tmp_path / folder / "RTE" / "dev.tsv").write_text("the same\n")
    ours, theirs = (describe(Files(("RTE",), str(tmp_path / folder))) for folder in ("ours", "theirs"))
    check_same(ours, dict(ours), "n2")
    with pytest.raises(UserError) as raised:
        check_same(ours, theirs, "n2")
    named = f"node n2 has RTE/train.tsv {theirs['RTE/train.tsv']}, but {ours['RTE/train.tsv']} is here"
    assert named in str(raised.value)
    with pytest.raises(UserError, match=r"node n2 has torch 2\.0, but .* is here; install the same version"):
        check_same(ours, ours | {"torch": "2.0"}, "n2")
    with pytest.raises(UserError, match="node n2 has no folder .*/none"):
        check_folder(tmp_path / "none", "n2")


def test_a_build_for_the_gpu_is_the_same_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cu130" if name == "torch" else "1")
    assert describe(None)["torch"] == "2.13.0"


def test_the_guard_kills_what_it_was_told_last_when_its_starter_is_killed() -> None:
    sleepers = [subprocess.Popen(["sleep", "600"], start_new_session=True) for _ in range(2)]
    told = [b"%d %d\n" % (sleepers[0].pid, sleepers[1].pid), b"%d\n" % sleepers[1].pid]
    starter = f"""
import subprocess, sys, time
guard = subprocess.Popen([sys.executable, "-S", {ray_guard.__file__!r}], stdin=subprocess.PIPE, bufsize=0)
for line in {told!r}:
    guard.stdin.write(line)
print("told", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"told\n"
        process.kill()
    assert sleepers[1].wait(timeout=20) == -signal.SIGKILL
    assert sleepers[0].poll() is None
    sleepers[0].kill()
    sleepers[0].wait()
