"""The pages of MLflow's UI that show trainings, and how to get to them from a terminal."""

from __future__ import annotations

from pathlib import Path

from lightning_glue.utils.hints import serve_pages
from lightning_glue.utils.paths import sqlite_file
from lightning_glue.utils.redact import hide_secrets

LOCAL = "http://127.0.0.1:5000"  # where ``mlflow ui`` listens
_VIEW = "workflowType=machine_learning"  # else MLflow 3 opens a view of traces, which has no trainings


def experiment_page(address: str, experiment_id: str) -> str:
    """Address of the table of an experiment's runs."""
    return f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs?{_VIEW}"


def run_page(address: str, experiment_id: str, run_id: str) -> str:
    """Address of a run's own page."""
    return f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?{_VIEW}"


def how_to_look(uri: str, experiment_id: str, run_id: str) -> dict[str, str]:
    """What to type and to open in order to see a run beside the others, with what each is for.

    Args:
        uri: of the tracking store.
        experiment_id: empty where the store has not said it yet.
    """
    uri = hide_secrets(uri)
    steps: dict[str, str] = {}
    address = uri
    if not uri.startswith(("http://", "https://")):
        default = sqlite_file(uri) == Path.cwd() / "mlflow.db"
        address = LOCAL
        steps[serve_pages(*([] if default else ["--backend-store-uri", uri]))] = f"serve the runs on {LOCAL}"
    if not experiment_id:
        return steps or {address: "compare runs"}
    steps[experiment_page(address, experiment_id)] = "compare runs"
    steps[run_page(address, experiment_id, run_id)] = "this run"
    return steps
