"""A real MLflow server that can be killed and started again, and a proxy that delays and fails."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class MlflowServer:
    """``mlflow server`` on SQLite (or ``store``) and ``artifacts`` below ``folder``; always the same address."""

    def __init__(self, folder: Path, store: str | None = None, artifacts: str = "artifacts") -> None:
        self.folder, self.port, self.artifacts = folder, free_port(), artifacts
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store = store or f"sqlite:///{folder / 'server.db'}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", self.store, "--artifacts-destination", self.artifacts]
        log = self.folder / "server.log"
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # starts in half the time
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        for _ in range(1800):  # a busy machine takes its time
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return
            except (URLError, OSError):
                time.sleep(0.1)
        raise TimeoutError(log.read_text())

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class Proxy:
    """HTTP between a client and the server at ``port``: waits ``delay`` seconds, or answers ``fail`` itself.

    ``rule`` sees method, path and size of each call, and may wait; unless 0, what it returns is the answer.
    """

    def __init__(self, port: int, delay: float = 0.0) -> None:
        self.delay, self.fail = delay, 0
        self.rule: Callable[[str, str, int], int] = lambda method, path, size: 0
        self.calls: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.calls.append(self.path)
                time.sleep(proxy.delay)
                if answered := proxy.fail or proxy.rule(self.command, self.path, len(body)):
                    status, headers, answer = answered, [("Content-Type", "text/plain")], b"failing"
                else:
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                    connection.request(self.command, self.path, body, dict(self.headers))
                    response = connection.getresponse()
                    status, headers, answer = response.status, response.getheaders(), response.read()
                    connection.close()
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

            def log_message(self, *_: object) -> None:
                """Keep the terminal quiet."""

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """A client that is killed in the middle of a call is no error here."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class HostileServer:
    """Answers as MLflow does for one run whose artifact folders list ``names``; every file is ``sent``."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        hostile = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = urllib.parse.urlparse(self.path)
                wanted = urllib.parse.parse_qs(path.query).get("path", [""])[0]
                run = {"run_id": "0" * 32, "artifact_uri": "mlflow-artifacts:/0/run/artifacts", "status": "FINISHED"}
                if self.command == "POST":  # a search for models logged by themselves
                    answer = b"{}"
                elif path.path.endswith("runs/get"):
                    answer = json.dumps({"run": {"info": run, "data": {}}}).encode()
                elif path.path.endswith("/artifacts"):
                    folder = wanted.rstrip("/").endswith("/fairseq")
                    listed = hostile.names if folder else []
                    answer = json.dumps({"files": [{"path": name, "is_dir": False} for name in listed]}).encode()
                else:
                    answer = b"sent"
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                """Keep the terminal quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
