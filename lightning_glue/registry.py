"""Register a run's best model as ``glue-<task>``: ``python -m lightning_glue.registry RUN_ID``."""

from __future__ import annotations

from lightning_glue.errors import UserError
from lightning_glue.tracking.client import open_store
from lightning_glue.tracking.journals import delivered_run
from lightning_glue.tracking.registry import CHAMPION, register
from lightning_glue.utils.console import Parser, run_main
from lightning_glue.utils.redact import first_line


def main() -> None:
    parser = Parser(
        prog="python -m lightning_glue.registry",
        description="Register a run's best model; alias champion goes to the best on the same dev data.",
    )
    parser.add_argument("run_id", metavar="RUN_ID")
    parser.add_argument("--uri", metavar="URI", help="tracking store (default: MLFLOW_TRACKING_URI, else ./mlflow.db)")
    args = parser.parse_args()
    from mlflow.exceptions import MlflowException

    run_id = delivered_run(args.run_id)
    client, _ = open_store(args.uri)
    try:
        name, version, decision = register(client, run_id)
    except (MlflowException, OSError) as error:
        raise UserError(f"run {run_id} cannot be registered: {first_line(error)}") from None
    print(f"{name} version {version} ({decision})")
    print(f'mlflow.pyfunc.load_model("models:/{name}@{CHAMPION}")')


if __name__ == "__main__":
    run_main(main)
