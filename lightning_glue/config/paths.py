"""Where the configuration files lie: those of the program, and recipes of the current folder."""

from __future__ import annotations

from pathlib import Path

from lightning_glue.utils.project import BUILT_IN, CHECKOUT, CONF, ROOT

__all__ = ["BUILT_IN", "CHECKOUT", "CONF", "ROOT", "recipe_roots"]


def recipe_roots() -> list[Path]:
    """The folders that have ``experiments/``, the first to win: the current one, then the program's."""
    return [root for root in dict.fromkeys([Path.cwd(), BUILT_IN]) if (root / "experiments").is_dir()]
