"""Downloads against a real local HTTP server that misbehaves on purpose, and the unpacking of archives."""

from __future__ import annotations

import hashlib
import io
import logging
import multiprocessing
import os
import pty
import re
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lightning_glue.data.download import download, extract_tar, extract_zip
from lightning_glue.errors import UserError
from lightning_glue.utils.files import locked, new_folder

BODY = bytes(range(256)) * 1200  # 300 kB
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server:
    """Serves ``body``; ``plan`` says what to do with the next requests: ok, drop, short, 500, corrupt, shift."""

    def __init__(self) -> None:
        self.body = BODY
        self.plan: list[str] = []
        self.ranges = True
        self.etag: str | None = None
        self.requests: list[str | None] = []  # the Range header of each request
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.bin"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.requests.append(wanted)
        action = self.plan.pop(0) if self.plan else "ok"
        if action.isdigit():
            handler.send_error(int(action))
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        if handler.headers.get("If-Range") not in (None, self.etag):
            start = 0
        if start >= len(self.body):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.body)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        self.send(handler, start, action)

    def send(self, handler: BaseHTTPRequestHandler, start: int, action: str) -> None:
        body = self.body[start:]
        handler.send_response(206 if start else 200)
        if start:
            first = start + 1 if action == "shift" else start
            handler.send_header("Content-Range", f"bytes {first}-{len(self.body) - 1}/{len(self.body)}")
        if self.etag:
            handler.send_header("ETag", self.etag)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if action == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if action == "drop":
            body = body[: len(body) // 2]
        handler.wfile.write(body)
        if action == "drop":
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


@pytest.fixture
def fetch(server: Server, tmp_path: Path) -> Callable[..., Path]:
    def fetch(sha256: str | None = SHA256, **options: object) -> Path:
        return download(server.url, tmp_path / "deep" / "file.bin", sha256, delay=0.001, **options)

    return fetch


def leftovers(path: Path) -> list[str]:
    expected = (path.name, f".{path.name}.lock")
    return sorted(other.name for other in path.parent.iterdir() if other.name not in expected)


def test_plain_download(server, fetch, caplog) -> None:
    with caplog.at_level(logging.INFO):
        target = fetch(label="the file")

    assert target.read_bytes() == BODY
    assert leftovers(target) == []
    assert caplog.messages == ["downloading the file", "downloaded the file (0.3 MB)"]
    assert fetch() == target
    assert server.requests == [None]  # the second call had nothing to do


def test_progress_bar_on_a_terminal(server, tmp_path) -> None:
    ours, theirs = pty.openpty()
    code = (
        "import sys, pathlib; from lightning_glue.data.download import download\n"
        "download(sys.argv[1], pathlib.Path('f'), None, label='the file')"
    )
    command = [sys.executable, "-c", code, server.url]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=theirs, stdout=subprocess.PIPE) as process:
        assert process.communicate(timeout=20) == (b"", None)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)

    assert (process.returncode, (tmp_path / "f").read_bytes()) == (0, BODY)
    assert "the file" in shown and "307.2/307.2 kB" in shown


def test_dropped_connections_are_resumed(server, fetch) -> None:
    server.plan = ["drop", "drop"]

    target = fetch()

    assert target.read_bytes() == BODY
    half, three_quarters = len(BODY) // 2, len(BODY) * 3 // 4
    assert server.requests == [None, f"bytes={half}-", f"bytes={three_quarters}-"]


def test_part_of_an_earlier_run_is_resumed(server, fetch) -> None:
    server.plan = ["drop"]
    with pytest.raises(UserError, match="ended after 153600 of 307200 bytes"):
        fetch(attempts=1)

    assert fetch().read_bytes() == BODY
    assert server.requests == [None, "bytes=153600-"]


def test_server_that_ignores_range_starts_over(server, fetch) -> None:
    server.plan, server.ranges = ["drop"], False

    assert fetch().read_bytes() == BODY
    assert server.requests == [None, "bytes=153600-"]


def test_wrong_content_range_is_not_appended(server, fetch) -> None:
    server.plan = ["drop", "shift"]

    assert fetch().read_bytes() == BODY
    assert server.requests == [None, "bytes=153600-", None]


def test_a_part_goes_where_the_file_was_put_by_hand(server, fetch, tmp_path) -> None:
    server.plan, server.etag = ["drop"], '"one"'
    with pytest.raises(UserError):
        fetch(attempts=1)
    target = tmp_path / "deep" / "file.bin"
    assert leftovers(target) == ["file.bin.part", "file.bin.part.tag"]
    target.write_bytes(BODY)

    assert fetch() == target
    assert leftovers(target) == []


def test_complete_part_needs_only_its_name(server, fetch, tmp_path) -> None:
    part = tmp_path / "deep" / "file.bin.part"
    part.parent.mkdir()
    part.write_bytes(BODY)
    assert fetch().read_bytes() == BODY
    assert server.requests == [f"bytes={len(BODY)}-"]

    (tmp_path / "deep" / "file.bin").unlink()
    part.write_bytes(BODY + b"too long")
    assert fetch().read_bytes() == BODY
    assert leftovers(tmp_path / "deep" / "file.bin") == []


def test_server_errors_are_retried_and_bounded(server, fetch) -> None:
    server.plan = ["500", "503"]
    assert fetch().read_bytes() == BODY

    fetch().unlink()
    server.plan = ["500"] * 9
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+ answered 500 .*3 attempts\); ask a friend"):
        fetch(attempts=3, advice="ask a friend")
    assert server.plan == ["500"] * 6


def test_missing_file_is_not_retried(server, fetch) -> None:
    server.plan = ["404"]

    with pytest.raises(UserError, match="answered 404"):
        fetch()
    assert len(server.requests) == 1


def test_corrupted_once_is_fetched_again(server, fetch) -> None:
    server.plan = ["corrupt"]

    assert fetch().read_bytes() == BODY
    assert server.requests == [None, None]


def test_wrong_digest_names_both_and_leaves_nothing(server, fetch, tmp_path) -> None:
    with pytest.raises(UserError, match=f"expected sha256 {'0' * 64}, found {SHA256}"):
        fetch("0" * 64)

    assert len(server.requests) == 2
    assert not (tmp_path / "deep" / "file.bin").exists()
    assert leftovers(tmp_path / "deep" / "file.bin") == []


def test_damaged_existing_file_is_named(server, fetch) -> None:
    fetch().write_bytes(b"rotten")

    with pytest.raises(UserError, match=rf"file\.bin has sha256 \w+, expected {SHA256}; delete it"):
        fetch()


def test_first_digest_is_trusted_and_kept(server, fetch) -> None:
    target = fetch(None)
    assert target.with_name("file.bin.sha256").read_text() == f"{SHA256}\n"

    target.unlink()
    server.body = BODY[::-1]
    with pytest.raises(UserError, match=f"expected sha256 {SHA256}"):
        fetch(None)
    assert not target.exists()


def test_without_digest_a_changed_file_is_not_mixed(server, fetch) -> None:
    server.plan, server.etag = ["drop"], '"one"'
    with pytest.raises(UserError):
        fetch(None, attempts=1)
    server.body, server.etag = BODY[::-1], '"two"'

    assert fetch(None).read_bytes() == BODY[::-1]
    assert server.requests == [None, "bytes=153600-"]


def test_without_digest_and_tag_nothing_is_resumed(server, fetch) -> None:
    server.plan = ["drop"]

    assert fetch(None).read_bytes() == BODY
    assert server.requests == [None, None]


def test_no_server_and_no_such_host(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"  # bound but not listening: refused
        with pytest.raises(UserError, match=f"cannot download from {host}: Connection refused"):
            download(f"http://{host}/x", tmp_path / "x", None, attempts=2, delay=0.001)
    with pytest.raises(UserError, match=r"cannot download from no-such-host\.invalid: .*1 attempts\); use a mirror"):
        download("http://no-such-host.invalid/x", tmp_path / "x", None, advice="use a mirror")


def test_unwritable_place(tmp_path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UserError, match="cannot write below .*file"):
        download("http://127.0.0.1:9/x", tmp_path / "file" / "x", None)


def _download_in_process(url: str, target: Path, barrier: object) -> None:
    barrier.wait()
    download(url, target, SHA256, delay=0.001)


def test_two_processes_download_once(server, tmp_path) -> None:
    server.plan = ["drop"]
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    target = tmp_path / "file.bin"
    arguments = (server.url, target, barrier)
    processes = [context.Process(target=_download_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)

    assert [process.exitcode for process in processes] == [0, 0]
    assert target.read_bytes() == BODY
    assert server.requests == [None, "bytes=153600-"]


def test_lock_excludes_other_threads(tmp_path) -> None:
    entered = threading.Event()

    def enter() -> None:
        with locked(tmp_path / "x"):
            entered.set()

    with locked(tmp_path / "x"):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.1)
    thread.join(5)
    assert entered.is_set()


def test_new_folder_is_all_or_nothing(tmp_path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []

    with new_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    with pytest.raises(UserError, match="out exists already"), new_folder(tmp_path / "out"):
        raise AssertionError("not reached")


def make_zip(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, entries: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


BOTH = pytest.mark.parametrize(("make", "extract"), [(make_zip, extract_zip), (make_tar, extract_tar)])


@BOTH
@pytest.mark.parametrize("top", ["QQP/", "./QQP/", ""])
def test_wanted_members_of_the_top_folder(tmp_path, make, extract, top) -> None:
    entries = {
        f"{top}train.tsv": b"train",
        f"{top}dev.tsv": b"dev",
        f"{top}original/train.tsv": b"no",
        f"{top}readme": b"no",
        "__MACOSX/train.tsv": b"no",
    }
    extract(make(tmp_path / "a", entries), tmp_path / "out", ("train.tsv", "dev.tsv"))

    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tsv")} == {
        "train.tsv": b"train",
        "dev.tsv": b"dev",
    }


@BOTH
@pytest.mark.parametrize("evil", ["../train.tsv", "/train.tsv", "x/../train.tsv"])
def test_paths_that_leave_the_folder_are_not_used(tmp_path, make, extract, evil) -> None:
    with pytest.raises(UserError, match=r"holds no train\.tsv in its top folder"):
        extract(make(tmp_path / "a", {evil: b"evil"}), tmp_path / "sub" / "out", ("train.tsv",))
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


def test_links_in_a_tar_are_not_followed(tmp_path) -> None:
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "a", "w") as archive:
        link = tarfile.TarInfo("top/model.pt")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(link)

    with pytest.raises(UserError, match=r"holds no model\.pt"):
        extract_tar(tmp_path / "a", tmp_path / "out", ("model.pt",))


@BOTH
def test_damaged_archive(tmp_path, make, extract) -> None:
    archive = make(tmp_path / "a", {"top/model.pt": BODY})
    archive.write_bytes(archive.read_bytes()[:150])

    with pytest.raises(UserError, match="a is not a readable archive: .*delete it and run again"):
        extract(archive, tmp_path / "out", ("model.pt",))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_long_download_says_how_far_it_is_where_stderr_is_no_terminal(fetch, caplog, monkeypatch) -> None:
    monkeypatch.setattr("lightning_glue.data.download._LINE_SECONDS", 0.0)
    monkeypatch.setattr("lightning_glue.data.download._CHUNK", 1 << 16)
    with caplog.at_level(logging.INFO):
        fetch(label="the file")
    assert caplog.messages[0] == "downloading the file"
    assert re.fullmatch(r"the file: 0\.[0-3] MB of 0\.3 MB, .* MB/s.*", caplog.messages[-2])
    assert caplog.messages[-1] == "downloaded the file (0.3 MB)"
