"""Clients of the MLflow tracking store: a server, or a database of this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient


def connect(uri: str | None, retries: int = 0) -> MlflowClient:
    """A client that gives up soon: MLflow's own retries last eight minutes.

    Args:
        uri: None: MLFLOW_TRACKING_URI, else MLflow's default.
        retries: of a call over HTTP; a caller that tries again by itself needs none.
    """
    settings = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": str(sys.stderr.isatty()).lower(),
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri)


def open_store(uri: str | None) -> tuple[MlflowClient, str]:
    """A client for reading, and the address it talks to.

    Raises:
        UserError: an SQLite store that does not exist; MLflow would make an empty one.
    """
    import mlflow

    uri = uri or mlflow.get_tracking_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise UserError(f"no runs: {uri} does not exist; train first, or give --uri or MLFLOW_TRACKING_URI")
    from mlflow.exceptions import MlflowException

    try:
        return connect(uri, retries=2), uri
    except MlflowException as error:
        raise UserError(f"{uri} is no tracking store: {reason(error)}") from None


def reason(error: Exception) -> str:
    """What an error of MLflow's says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
