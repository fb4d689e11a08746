"""Serve a fine-tuned model over HTTP: ``python -m lightning_glue.serve models:/glue-rte@champion``."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from lightning_glue.errors import UserError
from lightning_glue.utils.addresses import is_loopback
from lightning_glue.utils.console import Parser, run_main
from lightning_glue.utils.quick_imports import quick_imports

TOKEN = "LIGHTNING_GLUE_SERVE_TOKEN"
_STOP_SECONDS = 60  # for what was accepted to be answered


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.serve",
        description="Serve a fine-tuned model with MLflow's scoring protocol: POST /invocations; GET /ping, /health, "
        "/version, /metrics.",
        epilog=f"With {TOKEN} in the environment, predictions and metrics need it as Authorization: Bearer TOKEN.",
    )
    parser.add_argument("model", metavar="MODEL", help="run id, models:/name@alias, directory, *.pt or *.ckpt")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=5001, help="default: %(default)s")
    parser.add_argument("--gpus", metavar="N", choices=("0", "1"), help="0: CPU; 1: one GPU (default: if there is one)")
    parser.add_argument("--precision", metavar="NAME", default="32-true",
                        choices=("auto", "32-true", "bf16-mixed", "16-mixed"),
                        help="32-true (default), bf16-mixed, 16-mixed, or auto: the run's")  # fmt: skip
    parser.add_argument("--calibrated", action="store_true", help="probabilities with the run's fitted temperature")
    parser.add_argument("--max-rows", metavar="N", type=int, default=1024, help="of a request (default: %(default)s)")
    parser.add_argument("--max-body", metavar="BYTES", type=int, default=4 << 20, help="default: %(default)s")
    parser.add_argument("--max-queue", metavar="ROWS", type=int, default=4096, help="that wait (default: %(default)s)")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=30.0, help="default: %(default)s")
    parser.add_argument("--allow-anyone", action="store_true", help="let everybody in who reaches --host")
    args = parser.parse_args()
    for name in ("max_rows", "max_body", "max_queue", "timeout"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name):g}; expected more than 0")
    return args


def check_access(host: str, token: str, allow_anyone: bool) -> None:
    """Raise UserError where others than this machine would reach a server that asks nobody for a token."""
    if not (token or allow_anyone or is_loopback(host)):
        raise UserError(
            f"--host {host} lets everybody in who can reach this machine, with no token; set {TOKEN}, or give "
            "--allow-anyone where that is meant"
        )


def main() -> None:
    args = parse_arguments()
    token = os.environ.get(TOKEN, "")
    check_access(args.host, token, args.allow_anyone)
    from lightning_glue.tracking.server import check_address

    check_address(args.host, args.port)
    from lightning_glue.pipeline.loading import load_model

    device = None if args.gpus is None else ("cuda" if args.gpus == "1" else "cpu")
    model = load_model(args.model, None, device, calibrated=args.calibrated)
    with quick_imports():
        import uvicorn

        from lightning_glue.inference.http_server import Limits, make_app, warm_up
        from lightning_glue.inference.scorer import Scorer
        from lightning_glue.utils.console import no_bars

    scorer = Scorer(model, args.precision)
    warm_up(scorer)
    app = make_app(scorer, Limits(args.max_body, args.max_rows, args.timeout, args.max_queue), token)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn raises again what it stopped for, once it has stopped
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=args.host,
            port=args.port,
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
    )
    print(f"serving {model.task.name} ({model.fine_tuned.path}) on http://{args.host}:{args.port}", flush=True)
    with no_bars():
        server.run()
    print("stopped", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
