"""What must be the same on a node that gives a slot as where the search is run: versions and data."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import lightning_glue
from lightning_glue.errors import UserError
from lightning_glue.tasks import get_task

_PACKAGES = {
    "torch": ("torch",),
    "pytorch-lightning": ("pytorch-lightning",),
    "mlflow": ("mlflow",),
    "fairseq": ("ve-fairseq", "fairseq-fixed", "fairseq"),  # distributions of the same package
}
_ABSENT = "none"


@dataclass(frozen=True)
class Files:
    """The GLUE files of some tasks.

    Attributes:
        folder: that holds them, the same path on every node. None: each node makes them or loads them down, and their
            digests are fixed by the version.
        own: paths of files of one's own, the same on every node.
    """

    tasks: tuple[str, ...]
    folder: str | None
    own: tuple[str, ...] = ()


def describe(files: Files | None) -> dict[str, str]:
    """Versions and digests here, by what they are of.

    Raises:
        DataError: the folder does not hold a task's files.
    """
    found = {"lightning_glue": lightning_glue.__version__, "python": ".".join(platform.python_version_tuple()[:2])}
    for name, distributions in _PACKAGES.items():
        found[name] = _version(distributions)
    return found | (_digests(files) if files else {})


def _version(distributions: tuple[str, ...]) -> str:
    """Without the part behind ``+``: a node may have a build for CUDA and another one for the CPU."""
    for name in distributions:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name).partition("+")[0]
    return _ABSENT


def _digests(files: Files) -> dict[str, str]:
    from lightning_glue.data.sources import glue_directory
    from lightning_glue.utils.digests import known_sha256

    found = {path: (known_sha256(Path(path)) if Path(path).is_file() else _ABSENT)[:12] for path in files.own}
    for task in map(get_task, files.tasks if files.folder else ()):
        folder = glue_directory(task, "glue", files.folder) / task.directory
        for path in sorted(folder.glob("*.tsv")):
            found[f"{task.name}/{path.name}"] = (known_sha256(path) or _ABSENT)[:12]
    return found


def check_same(here: Mapping[str, str], there: Mapping[str, str], node: str) -> None:
    """Raise UserError naming the first difference, the node and both values."""
    for name in sorted(here.keys() | there.keys()):
        ours, theirs = here.get(name, _ABSENT), there.get(name, _ABSENT)
        if ours != theirs:
            mend = "use the same files" if "/" in name else "install the same version"
            raise UserError(f"node {node} has {name} {theirs}, but {ours} is here; {mend} on every node")


def check_folder(folder: Path, node: str) -> None:
    """Raise UserError where a node does not see the folder that the search is run in."""
    if not folder.is_dir():
        raise UserError(
            f"node {node} has no folder {folder}; run the search in a folder of a file system that all nodes share, or "
            "make one of that path on each node"
        )
