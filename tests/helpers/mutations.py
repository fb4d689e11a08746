"""Chosen lines of the package, each made wrong in a copy, and the test that has to notice: ``make mutate``.

    python tests/helpers/mutations.py [NUMBER ...]

A line that is no longer there, a test that fails as the code is, and one that does not fail with the line made wrong
are errors. Tests run in a copy of the project; nothing here is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lightning_glue"
_IGNORED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "mlruns", "mlflow.db", "shared")


@dataclass(frozen=True)
class Mutation:
    """A line of ``file``, below the package, what it becomes, and the one test that must fail then."""

    file: str
    line: str
    becomes: str
    test: str

    def apply(self, root: Path) -> None:
        """Raises LookupError: the line is not there exactly once."""
        path = root / PACKAGE / self.file
        text = path.read_text()
        count = text.count(self.line)
        if count != 1:
            raise LookupError(f"{PACKAGE}/{self.file} has {count} times {self.line.strip()!r}; expected once")
        path.write_text(text.replace(self.line, self.becomes))


MUTATIONS = [
    Mutation(
        "data/batching.py",
        "    weight = parts / len(batch)\n",
        "    weight = 1 / len(batch)\n",
        "tests/data/test_batching.py::test_processes_share_every_batch_without_loss",
    ),
    Mutation(
        "data/batching.py",
        "    generator = np.random.default_rng([seed, epoch])\n",
        "    generator = np.random.default_rng([seed, 0])\n",
        "tests/data/test_batching.py::test_epochs_differ_and_repeat_exactly",
    ),
    Mutation(
        "training/metrics.py",
        "    return 2 * int(counts[1, 1]) / (true + predicted) if true + predicted else 0.0\n",
        "    return 2 * int(counts[0, 0]) / (true + predicted) if true + predicted else 0.0\n",
        "tests/training/test_metrics.py::test_classification_equals_scikit_learn",
    ),
    Mutation(
        "training/metrics.py",
        "    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]\n",
        "    return np.cumsum(counts)[inverse]\n",
        "tests/training/test_metrics.py::test_regression_equals_scipy",
    ),
    Mutation(
        "tracking/journal.py",
        "    if zlib.crc32(payload, zlib.crc32(data[place : place + 4])) != _length(data, place + 4):\n",
        "    if not payload:\n",
        "tests/tracking/test_journal.py::test_a_value_that_was_changed_is_damage_though_it_can_be_read",
    ),
    Mutation(
        "tracking/journal.py",
        "                file.truncate(before)\n",
        "                pass\n",
        "tests/tracking/test_journal.py::test_a_full_disk_leaves_the_journal_as_it_was",
    ),
    Mutation(
        "training/resume.py",
        "        if found.path and then.get(name) != now.get(name):\n",
        "        if found.path and name not in then:\n",
        "tests/training/test_resume.py::test_resuming_on_other_data_names_the_difference",
    ),
    Mutation(
        "training/resume.py",
        "                if file_sha256(fetched) != expected:\n",
        "                if not expected:\n",
        "tests/training/test_resume.py::test_a_checkpoint_from_elsewhere_that_was_changed_is_refused",
    ),
    Mutation(
        "tuning/slots.py",
        "        return holder is not None and holder.number == trial.number\n",
        "        return holder is not None\n",
        "tests/tuning/test_study.py::test_two_controllers_that_queue_the_same_slot_run_one_trial[journal]",
    ),
    Mutation(
        "tuning/study.py",
        '        attempts = trial.user_attrs.get("attempt", 0) + (reason != _INTERRUPTED)\n',
        '        attempts = trial.user_attrs.get("attempt", 0) + 1\n',
        "tests/tuning/test_study.py::test_an_interruption_costs_no_retry[journal]",
    ),
]


def copied(target: Path) -> Path:
    shutil.copytree(ROOT, target, ignore=_IGNORED, symlinks=True)
    return target


def outcome(root: Path, *tests: str) -> tuple[int, str]:
    """pytest's exit status (0: passed, 1: failed) and what it said, of tests in a copy."""
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-m", "", "-p", "no:cacheprovider", *tests]  # torture, too
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout[-3000:] + done.stderr[-1000:]


def fault(mutation: Mutation, folder: Path) -> str:
    """Why a mutation is not caught as it should be; empty where it is."""
    root = copied(folder)
    mutation.apply(root)
    status, said = outcome(root, mutation.test)
    return "" if status == 1 else f"not caught: pytest says {status}\n{said}"


def main() -> None:
    numbers = [int(text) for text in sys.argv[1:]] or range(1, len(MUTATIONS) + 1)
    faults = 0
    with tempfile.TemporaryDirectory(prefix="lightning-glue-") as folder:
        status, said = outcome(copied(Path(folder, "project")), *(MUTATIONS[number - 1].test for number in numbers))
    if status:
        sys.exit(f"the tests do not pass as the code is (pytest says {status})\n{said}")
    for number in numbers:
        mutation = MUTATIONS[number - 1]
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="lightning-glue-") as folder:
            try:
                why = fault(mutation, Path(folder, "project"))
            except LookupError as error:
                why = str(error)
        faults += bool(why)
        print(
            f"{number:>2} {'caught' if not why else 'FAULT'} {PACKAGE}/{mutation.file}: {mutation.line.strip()}\n"
            f"   -> {mutation.becomes.strip()}\n   {mutation.test} ({time.monotonic() - begin:.0f} s)"
            + (f"\n   {why}" if why else ""),
            flush=True,
        )
    print(f"{len(numbers) - faults} of {len(numbers)} caught")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
