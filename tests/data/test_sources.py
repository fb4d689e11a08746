"""Sources: the given folder, the cache and downloads from a mirror (a real HTTP server on a local folder)."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from lightning_glue.data import sources
from lightning_glue.data.reader import read_split
from lightning_glue.data.sample import SAMPLE_VERSION
from lightning_glue.data.sources import Remote, bpe_directory, cache_dir, glue_directory, model_archive
from lightning_glue.errors import UserError
from lightning_glue.tasks import TASKS, TRAINABLE
from lightning_glue.utils.files import locked

RTE_HEADER = "index\tsentence1\tsentence2\tlabel\n"
MRPC_HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a mirror that nobody can reach."""
    monkeypatch.setenv("LIGHTNING_GLUE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LIGHTNING_GLUE_MIRROR", "http://no-such-host.invalid")
    return tmp_path / "cache"


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder that a local HTTP server shows as the mirror."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("LIGHTNING_GLUE_MIRROR", f"http://127.0.0.1:{server.server_port}/")
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def publish(mirror: Path, remote: Remote, content: bytes) -> Remote:
    """Put a file on the mirror and return its remote with the right digest."""
    path = mirror / remote.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return dataclasses.replace(remote, sha256=hashlib.sha256(content).hexdigest() if remote.sha256 else None)


def zipped(tmp_path: Path, top: str, files: dict[str, str]) -> bytes:
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{top}/{name}", content)
    return path.read_bytes()


def rte_files() -> dict[str, str]:
    row = "0\ta\tb\tentailment\n"
    return {
        "train.tsv": RTE_HEADER + row,
        "dev.tsv": RTE_HEADER + row,
        "test.tsv": "index\tsentence1\tsentence2\n0\ta\tb\n",
    }


def raw_mrpc(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "msr_paraphrase_train.txt").write_text(f"\ufeff{MRPC_HEADER}1\t1\t2\ta\tb\n0\t3\t4\tc\td\n", "utf-8")
    (folder / "msr_paraphrase_test.txt").write_text(f"\ufeff{MRPC_HEADER}1\t5\t6\te\tf\n", "utf-8")


def test_cache_dir(monkeypatch) -> None:
    monkeypatch.setenv("LIGHTNING_GLUE_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == Path("/one")
    monkeypatch.delenv("LIGHTNING_GLUE_CACHE")
    assert cache_dir() == Path("/two/lightning-glue")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == Path("/home/me/.cache/lightning-glue")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/home/me/.cache/lightning-glue")


def test_sample_is_made_once(cache) -> None:
    root = glue_directory(TASKS["RTE"], "sample", None)

    assert root == cache / f"sample-{SAMPLE_VERSION}"
    (root / "mark").touch()
    assert glue_directory(TASKS["AX"], "sample", "/ignored") == root
    assert (root / "mark").exists()


def test_remains_of_a_killed_process_are_swept(cache) -> None:
    remains = cache / f".sample-{SAMPLE_VERSION}.abc.part"
    (remains / "RTE").mkdir(parents=True)

    glue_directory(TASKS["RTE"], "sample", None)

    assert not remains.exists()


def test_remains_of_another_model_at_work_stay(cache) -> None:
    """``.roberta.large.mnli.<id>.part`` begins like those of roberta.large."""
    folder = cache / "models" / "roberta.large"
    living, dead = (cache / "models" / f".{name}.abc.part" for name in ("roberta.large.mnli", "roberta.large"))
    for part in (living, dead, folder):
        part.mkdir(parents=True)
    for name in ("dict.txt", "model.pt"):
        (folder / name).touch()

    with locked(folder.with_name("roberta.large.mnli")):
        assert model_archive("roberta.large") == folder

    assert (living.exists(), dead.exists()) == (True, False)


def test_unknown_source() -> None:
    with pytest.raises(UserError, match="unknown data.source 'samples'; did you mean 'sample'"):
        glue_directory(TASKS["RTE"], "samples", None)


def test_given_folder(tmp_path, monkeypatch) -> None:
    (tmp_path / "glue" / "RTE").mkdir(parents=True)
    (tmp_path / "glue" / "diagnostic").mkdir()

    assert glue_directory(TASKS["RTE"], "glue", str(tmp_path / "glue")) == tmp_path / "glue"
    assert glue_directory(TASKS["AX"], "glue", str(tmp_path / "glue")) == tmp_path / "glue"
    monkeypatch.chdir(tmp_path)
    assert glue_directory(TASKS["RTE"], "glue", "glue") == tmp_path / "glue"
    with pytest.raises(UserError, match="has no folder SST-2: it has RTE, diagnostic; add it or set data.source="):
        glue_directory(TASKS["SST-2"], "glue", str(tmp_path / "glue"))
    with pytest.raises(UserError, match="it has no task folder at all"):
        glue_directory(TASKS["SST-2"], "glue", str(tmp_path / "glue" / "RTE"))
    with pytest.raises(UserError, match="GLUE_DIR .*nowhere is not a folder"):
        glue_directory(TASKS["SST-2"], "glue", "nowhere")


def test_given_raw_mrpc_is_converted_by_content(tmp_path, cache) -> None:
    folder = tmp_path / "glue" / "MRPC"
    raw_mrpc(folder)
    (folder / "dev_ids.tsv").write_text("#1 ID\t#2 ID\n3\t4\n")
    task = TASKS["MRPC"]

    first = glue_directory(task, "glue", str(tmp_path / "glue"))
    assert first.parent == cache
    assert read_split(task, task.split("dev"), first).texts == (["c"], ["d"])
    assert glue_directory(task, "glue", str(tmp_path / "glue")) == first

    (folder / "dev_ids.tsv").write_text("#1 ID\t#2 ID\n1\t2\n")
    second = glue_directory(task, "glue", str(tmp_path / "glue"))
    assert read_split(task, task.split("dev"), second).texts == (["a"], ["b"])


def test_raw_mrpc_without_ids_says_where_to_put_them(tmp_path) -> None:
    raw_mrpc(tmp_path / "glue" / "MRPC")

    with pytest.raises(UserError, match=r"no-such-host\.invalid.*put dev_ids\.tsv into .*MRPC"):
        glue_directory(TASKS["MRPC"], "glue", str(tmp_path / "glue"))


@pytest.mark.parametrize("name", TRAINABLE)
def test_no_network_names_host_and_alternatives(name) -> None:
    with pytest.raises(UserError) as caught:
        glue_directory(TASKS[name], "glue", None)

    message = str(caught.value)
    assert "\n" not in message
    for part in ("no-such-host.invalid", "GLUE_DIR", "data.source=sample", "LIGHTNING_GLUE_MIRROR", "downloads"):
        assert part in message


def test_zip_task_is_downloaded_into_its_folder_once(tmp_path, mirror, monkeypatch, cache) -> None:
    remote = publish(mirror, sources.TASK_REMOTES["RTE"], zipped(tmp_path, "OtherName", rte_files()))
    monkeypatch.setitem(sources.TASK_REMOTES, "RTE", remote)
    task = TASKS["RTE"]

    root = glue_directory(task, "glue", None)

    assert root == cache / "glue"
    assert [len(read_split(task, split, root)) for split in task.splits] == [1, 1, 1]
    assert not (cache / "downloads" / "RTE.zip").exists()
    (mirror / remote.path).unlink()
    (cache / "downloads" / "RTE.zip").touch()  # its process was killed before it was removed
    assert glue_directory(task, "glue", None) == root
    assert not (cache / "downloads" / "RTE.zip").exists()


def test_tampered_zip_is_refused(tmp_path, mirror) -> None:
    publish(mirror, sources.TASK_REMOTES["RTE"], zipped(tmp_path, "RTE", rte_files()))

    with pytest.raises(UserError, match="expected sha256 6bf86de1"):
        glue_directory(TASKS["RTE"], "glue", None)


def test_ax_and_mrpc_are_downloaded(mirror, monkeypatch) -> None:
    ax = publish(mirror, sources.TASK_REMOTES["AX"], b"index\tsentence1\tsentence2\n0\ta\tb")
    monkeypatch.setitem(sources.TASK_REMOTES, "AX", ax)
    raw_mrpc(mirror / "made")
    raw = [publish(mirror, r, (mirror / "made" / r.name).read_bytes()) for r in sources.MRPC_RAW]
    monkeypatch.setattr(sources, "MRPC_RAW", tuple(raw))
    monkeypatch.setattr(sources, "MRPC_DEV_IDS", publish(mirror, sources.MRPC_DEV_IDS, b"#1 ID\t#2 ID\n3\t4\n"))

    for name, rows in (("AX", [1]), ("MRPC", [1, 1, 1])):
        root = glue_directory(TASKS[name], "glue", None)
        assert [len(read_split(TASKS[name], split, root)) for split in TASKS[name].splits] == rows


def test_bpe_given_cached_and_downloaded(tmp_path, mirror, monkeypatch, cache) -> None:
    remotes = tuple(publish(mirror, remote, remote.name.encode()) for remote in sources.BPE)
    monkeypatch.setattr(sources, "BPE", remotes)

    folder = bpe_directory(None)

    assert folder == cache / "gpt2_bpe"
    assert {r.name: (folder / r.name).read_text() for r in remotes} == {r.name: r.name for r in remotes}
    assert bpe_directory(str(folder)) == folder
    (folder / "vocab.bpe").rename(tmp_path / "vocab.bpe")
    with pytest.raises(UserError, match="ROBERTA_BPE_DIR .* holds no vocab.bpe"):
        bpe_directory(str(folder))
    assert bpe_directory(None) == folder
    assert (folder / "vocab.bpe").read_text() == "vocab.bpe"


def test_model_is_unpacked_and_its_digest_recorded(tmp_path, mirror, cache) -> None:
    source = tmp_path / "roberta.base"
    source.mkdir()
    for name in ("model.pt", "dict.txt", "NOTE"):
        (source / name).write_text(name)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(source, "roberta.base")
    content = (tmp_path / "a.tar.gz").read_bytes()
    publish(mirror, sources.MODELS["roberta.base"], content)

    folder = model_archive("roberta.base")

    assert sorted(path.name for path in folder.iterdir()) == [".sha256sums", "dict.txt", "model.pt"]
    record = cache / "downloads" / "roberta.base.tar.gz.sha256"
    assert record.read_text().strip() == hashlib.sha256(content).hexdigest()
    with pytest.raises(UserError, match="unknown pretrained model 'roberta.bas'; did you mean 'roberta.base'"):
        model_archive("roberta.bas")


def test_file_mirror(tmp_path, monkeypatch) -> None:
    remote = publish(tmp_path / "disk", sources.TASK_REMOTES["RTE"], zipped(tmp_path, "RTE", rte_files()))
    monkeypatch.setitem(sources.TASK_REMOTES, "RTE", remote)
    monkeypatch.setenv("LIGHTNING_GLUE_MIRROR", (tmp_path / "disk").as_uri())

    assert (glue_directory(TASKS["RTE"], "glue", None) / "RTE" / "dev.tsv").is_file()


class Locked(Quiet):
    """Serves those who know the password; ``/away/`` is another host, to which nothing may be told."""

    told: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.told.append((self.path, self.headers.get("Authorization")))
        right = f"Basic {base64.b64encode(b'ann:p@ss/w:rd').decode()}"
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/moved/", "/away/", 1))
            self.end_headers()
        elif self.path.startswith("/away/") or self.headers.get("Authorization") == right:
            self.path = self.path.replace("/away/", "/", 1)
            super().do_GET()
        else:
            self.send_error(401)


@pytest.fixture
def locked_mirror(tmp_path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "mirror"
    folder.mkdir()
    Locked.told.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Locked, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("path", ["", "/moved"])
def test_a_mirror_with_a_password(tmp_path, monkeypatch, locked_mirror, path) -> None:
    folder, host = locked_mirror
    remote = publish(folder, sources.TASK_REMOTES["RTE"], zipped(tmp_path, "RTE", rte_files()))
    monkeypatch.setitem(sources.TASK_REMOTES, "RTE", remote)
    monkeypatch.setenv("LIGHTNING_GLUE_MIRROR", f"http://ann:p%40ss%2Fw%3Ard@{host}{path}/")

    assert (glue_directory(TASKS["RTE"], "glue", None) / "RTE" / "dev.tsv").is_file()
    assert [bool(told) for _, told in Locked.told] == ([True, False] if path else [True])


def test_the_password_of_a_mirror_is_not_shown(tmp_path, monkeypatch, locked_mirror, caplog) -> None:
    folder, host = locked_mirror
    publish(folder, sources.TASK_REMOTES["RTE"], b"something else")
    said = []
    for user, path in (("ann:s3cret", ""), ("ann:p%40ss%2Fw%3Ard", ""), ("s3cret", ""), ("ann:s3cret", "/moved")):
        monkeypatch.setenv("LIGHTNING_GLUE_MIRROR", f"http://{user}@{host}{path}")
        with pytest.raises(UserError) as caught:
            glue_directory(TASKS["RTE"], "glue", None)
        said.append(str(caught.value))
    monkeypatch.setenv("LIGHTNING_GLUE_MIRROR", f"ftp://ann:s3cret@{host}")
    with pytest.raises(UserError, match=r"is 'ftp://ann:\*\*\*@127") as caught:
        glue_directory(TASKS["RTE"], "glue", None)

    assert f"{host} answered 401" in said[0]
    assert f"http://ann:***@{host}/glue/data/RTE.zip was damaged on the way" in said[1]
    for text in (*said, str(caught.value), caplog.text):
        assert "s3cret" not in text
        assert "p%40ss" not in text
        assert "p@ss" not in text


def test_official_addresses(monkeypatch) -> None:
    monkeypatch.delenv("LIGHTNING_GLUE_MIRROR")

    assert sources.TASK_REMOTES["QNLI"].url == "https://dl.fbaipublicfiles.com/glue/data/QNLIv2.zip"
    assert sources.MODELS["roberta.large.mnli"].url == (
        "https://dl.fbaipublicfiles.com/fairseq/models/roberta.large.mnli.tar.gz"
    )
    assert set(sources.TASK_REMOTES) | {"MRPC"} == set(TASKS)


def test_mirror_must_be_an_address(monkeypatch) -> None:
    monkeypatch.setenv("LIGHTNING_GLUE_MIRROR", "mirror.example/files")

    with pytest.raises(UserError, match="LIGHTNING_GLUE_MIRROR is 'mirror.example/files', expected an address"):
        glue_directory(TASKS["RTE"], "glue", None)


def test_given_bpe_files_have_the_published_digests(request: pytest.FixtureRequest) -> None:
    given = request.config.real_bpe
    if given is None:
        pytest.skip("ROBERTA_BPE_DIR is not set: no real BPE files to check")
    for remote in sources.BPE:
        assert hashlib.sha256((given / remote.name).read_bytes()).hexdigest() == remote.sha256
