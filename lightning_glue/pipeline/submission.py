"""A leaderboard submission from what a benchmark's models say: eleven files in a zip."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.errors import DataError, UserError
from lightning_glue.pipeline.benchmark_folder import BenchmarkFolder, read_benchmark
from lightning_glue.pipeline.disk import chosen_seeds
from lightning_glue.pipeline.leaderboard import FILES, LeaderboardFile
from lightning_glue.tasks import get_task
from lightning_glue.utils.files import make_folder, new_file

if TYPE_CHECKING:
    from lightning_glue.pipeline.outputs import Outputs

_EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file in the zip: the same predictions make the same bytes
_CHOICES = "seed:<number>, median or ensemble"


@dataclass(frozen=True)
class Written:
    """What is in a submission.

    Attributes:
        files: name to whose predictions it has, for example ``seed 2``.
        absent: name to why it is not there.
    """

    files: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def write_submission(benchmark: Path, chosen: str, out: Path) -> Written:
    """Write the leaderboard's zip from a benchmark's outputs; it appears whole, with the files that there can be.

    Args:
        benchmark: its folder.
        chosen: ``seed:1``; ``median``: of each task the seed whose selection metric is the lower median of those that
            have outputs (AX: MNLI's); ``ensemble``: of all seeds that have outputs.
        out: the zip.

    Raises:
        UserError: an unknown choice, nothing to write, or outputs that are NaN.
    """
    found = read_benchmark(benchmark)
    kind, seed = parse_choice(chosen)
    written, texts = Written(), dict[str, str]()
    members: dict[str, list[int]] = {}
    for name, file in FILES.items():
        task = file.model_task
        if task not in members:
            members[task] = _members(found, task, kind, seed)
        if why := _why_absent(found, file, members[task], kind, seed):
            written.absent[name] = why
            continue
        texts[name] = "".join(_lines(found, file, members[task]))
        written.files[name] = _whose(members[task], kind)
    if not texts:
        raise UserError(f"benchmark {found.name!r}: nothing to submit; {next(iter(written.absent.values()))}")
    make_folder(out.absolute().parent, "--out")
    with new_file(out, "wb") as handle, zipfile.ZipFile(handle, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, text.encode())
    return written


def parse_choice(chosen: str) -> tuple[str, int]:
    """The kind of a choice, and the seed where it names one."""
    kind, _, number = chosen.partition(":")
    if kind == "seed" and re.fullmatch("[0-9]{1,9}", number):
        return kind, int(number)
    if chosen not in ("median", "ensemble"):
        raise UserError(f"--from {chosen!r}; expected {_CHOICES}")
    return chosen, 0


def _members(benchmark: BenchmarkFolder, task: str, kind: str, seed: int) -> list[int]:
    """The seeds whose outputs make a task's predictions; none where there are no outputs."""
    seeds = benchmark.seeds(task) if task in benchmark.tasks else []
    if kind == "seed":
        return [seed] if seed in seeds else []
    return [median_seed(benchmark, task, seeds)] if kind == "median" and seeds else seeds


def median_seed(benchmark: BenchmarkFolder, task: str, seeds: list[int]) -> int:
    """The seed whose selection metric is the lower median; of equal ones the first."""
    from lightning_glue.pipeline.outputs import read_outputs, score

    def value(seed: int) -> float:
        dev = get_task(task).dev[0].name
        found = read_outputs(benchmark.outputs(task, f"seed-{seed}"), [dev])
        if dev not in found:
            raise DataError(
                f"{task}: no outputs of {dev} of seed {seed}, which the median is found by; predict it again"
            )
        return score(found[dev])[get_task(task).selection_metric]

    return min(chosen_seeds({seed: value(seed) for seed in seeds}, "median"))


def _why_absent(benchmark: BenchmarkFolder, file: LeaderboardFile, members: list[int], kind: str, seed: int) -> str:
    task, split = file.model_task, file.split
    if task not in benchmark.tasks:
        return f"{task} is not among the benchmark's tasks"
    if not members:
        if kind == "seed" and seed not in benchmark.asked["seeds"]:
            return f"seed {seed} is not among the benchmark's seeds"
        job = f"{task}/seed-{seed}/predict" if kind == "seed" else f"{task}/seed-{benchmark.asked['seeds'][0]}/predict"
        event = benchmark.last_events().get(job, {})
        state = {"failed": "failed", "done": "was done, but its outputs are gone"}.get(
            event.get("state", ""), "is not done"
        )
        return f"no outputs of {task}: job {job} {state}"
    lacking = [one for one in members if not _path(benchmark, file, one).is_file()]
    if len(lacking) == len(members):
        return f"no {split.file_name} of {file.task.name} was there to predict"
    return f"no outputs of {split.name} of seed {lacking[0]}" if lacking else ""


def _path(benchmark: BenchmarkFolder, file: LeaderboardFile, seed: int) -> Path:
    return benchmark.outputs(file.task.name, f"seed-{seed}") / f"{file.split.name}.npz"


def _whose(members: list[int], kind: str) -> str:
    numbers = ", ".join(map(str, members))
    return f"ensemble of seeds {numbers}" if kind == "ensemble" and len(members) > 1 else f"seed {numbers}"


def _lines(benchmark: BenchmarkFolder, file: LeaderboardFile, members: list[int]) -> list[str]:
    import torch

    from lightning_glue.inference.submission import submission_lines

    outputs = together(benchmark, file, members)
    assert outputs.index is not None
    return submission_lines(file.task, torch.from_numpy(outputs.outputs), outputs.index)


def together(benchmark: BenchmarkFolder, file: LeaderboardFile, members: list[int]) -> Outputs:
    """What the members say together of a leaderboard file's rows; one member says what it says."""
    from lightning_glue.pipeline.ensemble import ensemble
    from lightning_glue.pipeline.outputs import read_outputs

    split = file.split.name
    found = [read_outputs(_path(benchmark, file, seed).parent, [split])[split] for seed in members]
    return ensemble(found) if len(found) > 1 else found[0]
