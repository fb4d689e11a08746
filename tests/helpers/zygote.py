"""Commands of the program without the seconds in which its libraries are imported.

:func:`install` makes :class:`subprocess.Popen`, and so :func:`subprocess.run`, fork ``python -m lightning_glue...``,
MLflow's server, fairseq's commands and scripts that begin with :data:`FORKED` off a process that has imported the
third-party packages, nothing of the project. What runs is the command itself in a process of its own: arguments,
environment, folder, open files, session, signals, command line in ``ps``, exit code. What a command starts in turn is
forked from spares, which are children of its own, and what it becomes by ``exec`` is run where it is.
All other programs are executed as ever, and so is everything within :func:`executed`.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

PACKAGES = (
    "hydra", "mlflow.store.tracking.sqlalchemy_store", "optuna", "pytorch_lightning", "tokenizers",
    "fairseq.models.roberta", "mlflow.cli", "flask", "fastapi", "uvicorn", "graphene",
)  # fmt: skip
MODULES = ("lightning_glue", "helpers", "mlflow", "uvicorn", "fairseq_cli")  # that are forked with all below them
ADDRESS = "LIGHTNING_GLUE_ZYGOTE"  # where it listens, for the processes of pytest-xdist
BECOMES = str(Path(__file__).resolve().parents[2] / "lightning_glue" / "utils" / "processes.py")  # another command
FORKED = "# forked\n"  # begins a script of ``python -c`` that needs no interpreter of its own
# What a command starts: a watcher, its server, or the processes of DDP or of a search; a fork costs 60 ms here.
SPARES = {"tune": 5, "glue": 5, "worker": 1, "train": 1, "server": 1, "mlflow": 2, "evaluate": 0, "watcher": 0}
_TITLE = 4096  # bytes of the command line in ps
_Popen = subprocess.Popen
_Request = dict[str, Any]


def preload() -> None:
    import logging

    gc.disable()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.INFO)
    for name in PACKAGES:
        importlib.import_module(name)
    logging.disable(logging.NOTSET)
    root.handlers[:], root.level = handlers, level  # fairseq configures it
    gc.collect()
    gc.freeze()  # the children do not copy what they never touch
    gc.enable()


def send(connection: socket.socket, request: _Request, files: list[int]) -> None:
    socket.send_fds(connection, [json.dumps(request).encode()], files)


def receive(connection: socket.socket) -> tuple[_Request | None, list[int]]:
    """The request and its open files; None: nobody will ask any more."""
    data, files, _, _ = socket.recv_fds(connection, 1 << 20, 64)
    return (json.loads(data) if data else None), files


class Zygote:
    """The process that forks. Its child returns from :meth:`serve` with what it has to become."""

    def __init__(self, listener: socket.socket, life: int) -> None:
        self.listener, self.life = listener, life
        self.clients: list[socket.socket] = []
        self.children: dict[int, socket.socket] = {}
        self.wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake)

    def serve(self, at_once: bool) -> tuple[_Request, list[int]] | None:
        if at_once:
            preload()
        loaded = at_once
        while True:
            ready, _, _ = select.select([self.listener, self.life, self.wake, *self.clients], [], [])
            if self.life in ready:
                return None
            if self.wake in ready:
                self.reap()
            if self.listener in ready:
                self.clients.append(self.listener.accept()[0])
            for client in [one for one in self.clients if one in ready]:
                if not loaded:
                    preload()
                    loaded = True
                request, files = receive(client)
                if request is None:
                    self.clients.remove(client)
                elif found := self.fork(request, files):
                    return found

    def fork(self, request: _Request, files: list[int]) -> tuple[_Request, list[int]] | None:
        teller, *rest = files
        child = os.fork()
        if not child:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return request, rest
        for file in rest:
            os.close(file)
        self.children[child] = socket.socket(fileno=teller)
        self.children[child].sendall(array.array("q", [child]).tobytes())
        return None

    def reap(self) -> None:
        os.read(self.wake, 4096)
        while self.children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if not child:
                return
            teller = self.children.pop(child)
            with suppress(OSError):  # who has asked is gone
                teller.sendall(array.array("q", [status]).tobytes())
            teller.close()


def set_title(command: list[str]) -> None:
    """What ``ps`` shows: the memory of the arguments, which the zygote was given more of than it needs."""
    start, end = (int(x) for x in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    text = b"\0".join(part.encode() for part in command)[: end - start - 1]
    ctypes.memmove(start, text + b"\0" * (end - start - len(text)), end - start)


def become(request: _Request, files: list[int]) -> NoReturn:
    """Run a module as the interpreter would."""
    if request["session"]:
        os.setsid()
    keep = [fcntl.fcntl(file, fcntl.F_DUPFD, 512) for file in files]  # out of the way of the targets
    os.closerange(0, 512)
    for target, given in zip(request["targets"], keep):
        os.dup2(given, target)
    os.closerange(512, 1024)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    tempfile.tempdir = None  # which TMPDIR says
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False, buffering=1 if os.isatty(1) or unbuffered else -1)
    sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1, errors="backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.path[:1] = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    install(Spares(spares(request["command"])).start)
    execute = os.execvp
    os.execvp = lambda file, arguments: main(arguments[1:]) if is_ours(arguments) else execute(file, arguments)  # type: ignore[assignment]
    main(request["command"])


def spares(command: list[str]) -> int:
    """Of a command; what it starts beyond them is executed as ever."""
    more = int(command[command.index("--procs") + 1]) if "--procs" in command[:-1] else 0
    return SPARES.get(command[1].rpartition(".")[2], 2 * (command[0] != "-m")) + more


def main(command: list[str]) -> NoReturn:
    """Run what follows the name of the interpreter, and end."""
    sys.orig_argv = [sys.executable, *command]
    set_title(sys.orig_argv)
    how, what, *arguments = command
    sys.argv = [how, *arguments]
    if how == "-m":
        leave(status_of(lambda: runpy.run_module(what, run_name="__main__", alter_sys=True)))
    if how == BECOMES:
        sys.argv = command
        leave(status_of(lambda: runpy.run_path(how, run_name="__main__")))
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    leave(status_of(lambda: exec(compile(what, "<string>", "exec"), module.__dict__)))


def status_of(main: Callable[[], object]) -> int:
    try:
        main()
        return 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    return 1


def leave(status: int) -> NoReturn:
    """What the interpreter does at its end, but for tearing down the modules: after a fork that takes seconds."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 120
    os._exit(status & 0xFF)


class Spares:
    """Forks kept for what a command starts: children of the command itself, which end with it."""

    def __init__(self, count: int) -> None:
        self.waiting: list[tuple[int, socket.socket]] = []
        for _ in range(count):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            child = os.fork()
            if child:
                theirs.close()
                self.waiting.append((child, ours))
                continue
            os.closerange(0, theirs.fileno())  # or a reader of the command's output would wait for this process
            os.closerange(theirs.fileno() + 1, 1024)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: for the command
            set_title(["spare"])
            request, files = receive(theirs)
            if request is None:
                os._exit(0)
            become(request, files)

    def start(self, request: _Request, files: list[int]) -> tuple[int, int | None] | None:
        if not self.waiting:
            return None
        child, connection = self.waiting.pop()
        send(connection, request, files)
        connection.close()
        return child, None


class Client:
    """A process of pytest: asks the zygote."""

    def __init__(self, address: str) -> None:
        self.address, self.connection, self.lock = address, None, threading.Lock()

    def start(self, request: _Request, files: list[int]) -> tuple[int, int | None] | None:
        if "LIGHTNING_GLUE_PARENT" in request["environment"]:  # it would not be our child
            return None
        ours, theirs = socket.socketpair()
        with self.lock:
            if self.connection is None:
                self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self.connection.connect(self.address)
            send(self.connection, request, [theirs.fileno(), *files])
        theirs.close()
        teller = (
            ours.detach()
        )  # a number, not an object: a Popen outlives its own destruction until its process has ended
        return read_number(teller), teller


def read_number(teller: int) -> int:
    data = os.read(teller, 8)  # written at once
    if len(data) < 8:
        raise ChildProcessError("the zygote has died")
    (number,) = array.array("q", data)
    return number


_source: Callable[[_Request, list[int]], tuple[int, int | None] | None] | None = None


def is_ours(arguments: object) -> bool:
    """Whether it is ``python -m`` of one of :data:`MODULES`, or ``python -c`` of a script that asks for it.

    Or :data:`BECOMES`, which becomes one of these.
    """
    if not isinstance(arguments, list) or [*map(str, arguments[:1])] != [sys.executable] or len(arguments) < 3:
        return False
    how, what = map(str, arguments[1:3])
    if how == BECOMES:
        return is_ours(arguments[3:])
    return what.partition(".")[0] in MODULES if how == "-m" else how == "-c" and what.startswith(FORKED)


class ForkingPopen(_Popen):
    """Starts the program's commands from a zygote or a spare."""

    _teller: int | None = None  # of the exit status, where it is no child of ours

    def _execute_child(  # type: ignore[no-untyped-def]
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
        start_new_session, process_group,
    ) -> None:  # fmt: skip
        if _source and is_ours(args) and preexec_fn is None and not shell:
            targets = [0, 1, 2, *pass_fds]
            files = [given if given != -1 else target for given, target in zip((p2cread, c2pwrite, errwrite), targets)]
            environment = os.environ if env is None else env
            request = {
                "command": [os.fsdecode(part) for part in args[1:]], "cwd": os.path.abspath(os.fsdecode(cwd or ".")),
                "environment": {os.fsdecode(name): os.fsdecode(value) for name, value in environment.items()},
                "session": start_new_session, "targets": targets,
            }  # fmt: skip
            if started := _source(request, [*files, *pass_fds]):
                self.pid, self._teller = started
                self._child_created = True
                self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
                return
        super()._execute_child(
            args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
            start_new_session, process_group,
        )  # fmt: skip

    def _internal_poll(self, _deadstate: int | None = None, *rest: Any, **options: Any) -> int | None:
        if self._teller is None:
            return super()._internal_poll(_deadstate, *rest, **options)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None and self._try_wait(os.WNOHANG)[0]:
                    self._handle_exitstatus(self._told)
            finally:
                self._waitpid_lock.release()
        return self.returncode

    def _try_wait(self, flags: int) -> tuple[int, int]:
        if self._teller is None:
            return super()._try_wait(flags)
        if flags & os.WNOHANG and not select.select([self._teller], [], [], 0)[0]:
            return 0, 0
        self._told = read_number(self._teller)
        os.close(self._teller)
        return self.pid, self._told


def install(source: Callable[[_Request, list[int]], tuple[int, int | None] | None]) -> None:
    global _source
    _source = source
    subprocess.Popen = ForkingPopen  # type: ignore[misc]


@contextmanager
def executed() -> Iterator[None]:
    """Within, the program's commands are executed as everything else is."""
    global _source
    before, _source = _source, None
    try:
        yield
    finally:
        _source = before


def install_shared(at_once: bool) -> None:
    """Install the zygote of this run of the tests; pytest-xdist's processes find the same.

    It imports its packages at once, or when it is first asked: a single file of tests may start nothing.
    """
    if ADDRESS not in os.environ:
        os.environ[ADDRESS] = listen(at_once)
    install(Client(os.environ[ADDRESS]).start)


def listen(at_once: bool) -> str:
    """Start a zygote, which ends with this process; returns its address."""
    folder = tempfile.mkdtemp(prefix="zygote-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = str(Path(folder) / "socket")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(64)
    life, _ours = os.pipe()  # closed at our end
    _Popen(
        [sys.executable, __file__, str(listener.fileno()), str(life), str(int(at_once)), "-" * _TITLE],
        pass_fds=[listener.fileno(), life], stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    os.close(life)
    return address


if __name__ == "__main__":
    found = Zygote(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])).serve(sys.argv[3] == "1")
    if found:
        become(*found)
    os._exit(0)  # Triton would complain of each object that was put aside from the collector
