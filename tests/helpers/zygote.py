"""A process that has imported the libraries and forks for every command: five seconds less for each.

What runs is the command itself, ``python -m <module>``, in a process of its own, with its own arguments, environment,
working directory and exit code. Only third-party packages are there already, nothing of the project.
"""

from __future__ import annotations

import array
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


def preload() -> None:
    import logging

    for name in ("hydra", "mlflow.store.tracking.sqlalchemy_store", "optuna", "pytorch_lightning", "tokenizers"):
        importlib.import_module(name)

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.INFO)
    importlib.import_module("fairseq.models.roberta")  # configures the root logger
    logging.disable(logging.NOTSET)
    root.handlers[:], root.level = handlers, level


def serve(connection: socket.socket) -> dict[str, object] | None:
    """Fork for every request until the connection closes; in a child: what it has to run."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        if not data:
            return None
        child = os.fork()
        if not child:
            for target, given in zip((1, 2), descriptors):
                os.dup2(given, target)
            connection.close()
            for given in descriptors:
                os.close(given)
            return json.loads(data)
        for given in descriptors:
            os.close(given)
        connection.sendall(array.array("q", [child]).tobytes())
        _, status = os.waitpid(child, 0)
        connection.sendall(array.array("q", [os.waitstatus_to_exitcode(status)]).tobytes())


def become(request: dict[str, object]) -> None:
    """Run a module as the interpreter would."""
    module, *arguments = request["command"]
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[:1] = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv, sys.orig_argv = ["-m", *arguments], [sys.executable, "-m", module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Zygote:
    """The test's end."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.connection = ours
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()

    def run(
        self, command: tuple[str, ...], cwd: Path, environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        request = {"command": command, "cwd": str(cwd), "environment": environment}
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            socket.send_fds(self.connection, [json.dumps(request).encode()], [out.fileno(), err.fileno()])
            child = self._number(None)
            try:
                status = self._number(timeout)
            except TimeoutError:
                os.kill(child, signal.SIGKILL)
                self._number(None)
                raise subprocess.TimeoutExpired(command, timeout) from None
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read())
        return subprocess.CompletedProcess(command, status, *texts)

    def _number(self, timeout: float | None) -> int:
        self.connection.settimeout(timeout)
        data = self.connection.recv(8, socket.MSG_WAITALL)
        (number,) = array.array("q", data)
        return number


if __name__ == "__main__":
    preload()
    found = serve(socket.socket(fileno=int(sys.argv[1])))
    if found:
        become(found)
