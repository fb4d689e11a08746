"""Optuna's dashboard on the studies of ``OPTUNA_STORAGE``: ``python -m lightning_glue.dashboard [--port N ...]``.

``optuna-dashboard`` itself takes the address as an argument, where every user of the machine reads its password.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points

from lightning_glue.errors import UserError
from lightning_glue.tracking.client import is_missing
from lightning_glue.tuning.request import DEFAULT_STORAGE
from lightning_glue.utils.console import run_main


def main() -> None:
    found = list(entry_points(group="console_scripts", name="optuna-dashboard"))
    if not found:
        raise UserError("optuna-dashboard is not installed; pip install 'lightning-glue[dashboard]'")
    storage = os.environ.get("OPTUNA_STORAGE") or DEFAULT_STORAGE
    if is_missing(storage) and not {"-h", "--help"} & {*sys.argv}:
        raise UserError(f"{storage}: no studies there yet; a search makes them: python -m lightning_glue.tune")
    program = found[0].load()
    sys.argv = ["optuna-dashboard", storage, *sys.argv[1:]]
    program()


if __name__ == "__main__":
    run_main(main)
