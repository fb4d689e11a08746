"""The first import of fairseq: without a word of its own, and with one for those who lack it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import platform
import sys

from lightning_glue.errors import UserError
from lightning_glue.utils.console import command

# Of requirements-no-deps.txt. The first is a wheel without torchaudio for the machines it is built for.
DISTRIBUTIONS = ("ve-fairseq==0.12.3", "fairseq-fixed==0.12.3.1")


def import_fairseq() -> None:
    """Import what the model needs of fairseq.

    Raises:
        UserError: it is not installed; says how to.
    """
    if "fairseq.models.roberta" in sys.modules:
        return
    check_fairseq()
    # It configures the root logger and logs about optional packages; a library's user wants neither.
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.INFO)
    try:
        importlib.import_module("fairseq.models.roberta")
    finally:
        logging.disable(disabled)
        root.handlers[:], root.level = handlers, level
    logging.getLogger("fairseq").setLevel(logging.WARNING)


def check_fairseq() -> None:
    """Raise UserError where fairseq is not installed, without importing it."""
    if importlib.util.find_spec("fairseq") is None:
        built_for = sys.platform == "linux" and platform.machine() == "x86_64"
        raise UserError(
            "fairseq is not installed (no package's metadata can bring it without torchaudio); run "
            + command("python", "-m", "pip", "install", "--no-deps", DISTRIBUTIONS[0 if built_for else 1])
        )
