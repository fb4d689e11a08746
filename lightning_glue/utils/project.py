"""Where the program's own files lie: beside the package in a checkout, inside it once it is installed from a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_INSTALLED = (_PACKAGE / "conf").is_dir()

ROOT = _PACKAGE.parent  # the folder to import the package from
CHECKOUT = None if _INSTALLED else ROOT  # the project's own folder, with its history
BUILT_IN = _PACKAGE if _INSTALLED else ROOT  # the folder that has conf/ and the recipes that come with the program
CONF = BUILT_IN / "conf"
