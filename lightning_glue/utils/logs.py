"""The one logger, ``lightning_glue``: what is to be said besides results, on stderr, one line each, by process 0.

Everything below it goes the same way: ``logging.getLogger(__name__)`` in any module of the package. A library's user
silences or redirects it with ``logging.getLogger("lightning_glue")`` as any other logger.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress

from lightning_glue.errors import UserError
from lightning_glue.utils.launch import launch
from lightning_glue.utils.redact import hide_secrets

NAME = "lightning_glue"


class _Lines(logging.Formatter):
    """``warning: ...`` and ``error: ...``; plain text below that."""

    def format(self, record: logging.LogRecord) -> str:
        text = hide_secrets(super().format(record))
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


class _Stderr(logging.Handler):
    """To ``sys.stderr`` as it is at that moment, unless the root logger writes to the terminal itself."""

    def emit(self, record: logging.LogRecord) -> None:
        terminal = (sys.stderr, sys.__stderr__, sys.stdout, sys.__stdout__)
        if any(getattr(other, "stream", None) in terminal for other in logging.getLogger().handlers):
            return
        with suppress(OSError, ValueError):  # nobody reads it any more
            print(self.format(record), file=sys.stderr, flush=True)


def _speaks(_: logging.LogRecord) -> bool:
    try:
        return launch().leader
    except UserError:  # what launched it is the error that will be said
        return True


def _mask(record: logging.LogRecord) -> bool:
    """Take the passwords out of a record, for the handlers of others too."""
    record.msg, record.args = hide_secrets(record.getMessage()), ()
    return True


def _make() -> logging.Logger:
    logger = logging.getLogger(NAME)
    handler = _Stderr()
    handler.setFormatter(_Lines())
    handler.addFilter(_speaks)
    logger.addHandler(handler)
    logger.addFilter(_mask)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    return logger


log = _make()
