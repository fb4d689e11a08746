"""What is printed, where the file or pipe behind it is full or gone: lost and remembered, and the work goes on."""

from __future__ import annotations

import sys
from typing import Any, TextIO


class LossyStream:
    """A text stream that loses what the system refuses to write, instead of raising.

    Attributes:
        lost: the first refusal; None: everything was written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self.lost = self.lost or error
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.lost = self.lost or error


def outlive_output() -> LossyStream | None:
    """Make stdout and stderr lossy for the rest of this process; returns stdout's, None where there is none."""
    if sys.stderr is not None:
        sys.stderr = LossyStream(sys.stderr)
    if sys.stdout is None:
        return None
    sys.stdout = lossy = LossyStream(sys.stdout)
    return lossy
