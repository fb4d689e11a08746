"""A disk of its own for a test: a file system in a file, which can fill up and lose its power."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@cache
def refused() -> str | None:
    """Why this machine mounts no file system from a file; None where it does."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with Disk(Path(folder), megabytes=16):
                return None
        except (OSError, subprocess.CalledProcessError) as error:
            return f"a file system in a file cannot be mounted here: {error}"


class Disk:
    """``folder`` is a file system of ``megabytes``, as long as the block runs."""

    def __init__(self, place: Path, megabytes: int) -> None:
        self.folder, self._image, self._ballast = place / "disk", place / "disk.img", place / "disk" / "ballast"
        self._bytes = megabytes << 20

    def __enter__(self) -> Disk:
        with open(self._image, "wb") as file:
            file.truncate(self._bytes)
        _call("mkfs.ext4", "-q", "-m", "0", str(self._image))
        self.folder.mkdir()
        self._mount()
        return self

    def _mount(self) -> None:
        _call("mount", "-o", "loop", str(self._image), str(self.folder))

    def __exit__(self, *_: object) -> None:
        with suppress(subprocess.CalledProcessError):
            _call("umount", "-l", str(self.folder))

    def settle(self) -> None:
        """Bring all that is written so far to the disk."""
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            _call("sync", "-f", str(self.folder))
        finally:
            os.close(handle)

    def power_cut(self, end_processes: Callable[[], None]) -> None:
        """Keep only what had reached the disk; what the kernel still held in memory is lost."""
        after = self._image.with_name("after.img")
        end_processes()
        shutil.copyfile(self._image, after)
        _call("umount", "-l", str(self.folder))
        after.replace(self._image)
        self._mount()

    def fill(self, left: int) -> None:
        """Leave ``left`` bytes."""
        with open(self._ballast, "wb", buffering=0) as file:
            for size in (1 << 20, 4096, 512):
                with suppress(OSError):
                    while True:
                        file.write(b"\0" * size)
        if left:
            os.truncate(self._ballast, max(0, self._ballast.stat().st_size - left))

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)
