"""Where the configuration files lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CONF = ROOT / "conf"
EXPERIMENTS = ROOT / "experiments"
