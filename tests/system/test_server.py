"""The server that a team shares: real PostgreSQL, users, artifacts through the server, a training from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from helpers.postgres import Postgres
from helpers.project import ROOT, run
from helpers.servers import free_port
from mlflow.server.auth.client import AuthServiceClient

from lightning_glue.errors import UserError
from lightning_glue.tracking.server import allowed_hosts, check_access, with_driver

ADMIN, MEMBER = "correct horse battery staple", "a member's long password"
FLAGS = ["--task", "WNLI", "--model", "tiny", "--data", "sample", "--gpus", "0", "trainer.max_epochs=1"]


def start(folder: Path, *arguments: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """A server that answers, and its address."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_glue.server", "--port", str(port), "--workers", "1", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            break
        except OSError:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
    return process, f"http://127.0.0.1:{port}"


def stop(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=30)


def status(url: str, user: str = "", password: str = "", host: str = "") -> int:
    request = urllib.request.Request(f"{url}/api/2.0/mlflow/experiments/search?max_results=5")
    if user:
        request.add_header("Authorization", "Basic " + b64encode(f"{user}:{password}".encode()).decode())
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("team")
    database = Postgres()
    process, url = start(
        folder, "--artifacts", str(folder / "store"), "--allowed-hosts", "mlflow.example.org",
        MLFLOW_BACKEND_STORE_URI=database.new_database("tracking"), MLFLOW_AUTH_ADMIN_PASSWORD=ADMIN,
    )  # fmt: skip
    yield url, folder
    assert stop(process) == 0
    database.remove()


@pytest.fixture(scope="module")
def trained(team: tuple[str, Path], cache: Path, bpe_dir: Path) -> subprocess.CompletedProcess[str]:
    """A member of the team trains on a machine of their own."""
    url, folder = team
    os.environ |= {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": ADMIN}
    AuthServiceClient(url).create_user("member", MEMBER)
    own = folder / "laptop"
    own.mkdir()
    os.environ |= {"MLFLOW_TRACKING_USERNAME": "member", "MLFLOW_TRACKING_PASSWORD": MEMBER}
    return run("lightning_glue.train", *FLAGS, cwd=own, MLFLOW_TRACKING_URI=url, ROBERTA_BPE_DIR=str(bpe_dir))


@pytest.fixture(scope="module", autouse=True)
def _forget_user() -> Iterator[None]:
    yield
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        os.environ.pop(name, None)


def test_nobody_gets_in_without_a_password(team: tuple[str, Path]) -> None:
    url, _ = team
    assert status(url) == 401
    assert status(url, "admin", "wrong password") == 401
    assert status(url, "admin", ADMIN) == 200


def test_only_known_names_of_the_server_are_answered(team: tuple[str, Path]) -> None:
    url, _ = team
    assert status(url, "admin", ADMIN, host="mlflow.example.org") == 200
    assert status(url, "admin", ADMIN, host="evil.example.org") == 403


@pytest.mark.torture
def test_a_training_reaches_the_database_and_the_artifact_store(
    team: tuple[str, Path], trained: subprocess.CompletedProcess[str]
) -> None:
    url, folder = team
    client = mlflow.MlflowClient(url)
    (found,) = client.search_runs([client.get_experiment_by_name("glue-wnli-sample").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.artifact_uri.startswith("mlflow-artifacts:")
    assert found.info.run_id in trained.stdout
    assert list((folder / "store").rglob(f"{found.info.run_id}/artifacts/fairseq/checkpoint_best.pt"))
    assert not list((folder / "laptop").rglob("mlflow.db"))
    assert {"checkpoints", "fairseq", "figures"} <= {item.path for item in client.list_artifacts(found.info.run_id)}


@pytest.mark.torture
def test_its_model_is_registered_through_the_server_and_predicts(
    team: tuple[str, Path], trained: subprocess.CompletedProcess[str]
) -> None:
    url, folder = team
    assert "model: glue-wnli-sample version 1, the champion" in trained.stdout
    code = "import mlflow, pandas as pd\n"
    code += "model = mlflow.pyfunc.load_model('models:/glue-wnli-sample@champion')\n"
    code += "print(model.predict(pd.DataFrame({'text': ['Ann ran.'], 'text_pair': ['She ran.']})).to_csv())"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": url, "PYTHONPATH": str(ROOT)}
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert loaded.returncode == 0, loaded.stderr
    assert ",label,probability_0,probability_1" in loaded.stdout


@pytest.mark.torture
def test_a_refused_training_says_so_at_once(team: tuple[str, Path], bpe_dir: Path, cache: Path, tmp_path: Path) -> None:
    refused = run(
        "lightning_glue.train", *FLAGS, cwd=tmp_path, check=False, ROBERTA_BPE_DIR=str(bpe_dir),
        MLFLOW_TRACKING_URI=team[0], MLFLOW_TRACKING_USERNAME="member", MLFLOW_TRACKING_PASSWORD="forgotten",
    )  # fmt: skip
    assert refused.returncode == 2
    assert "cannot be used" in refused.stderr and "401" in refused.stderr
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.torture
def test_alone_it_serves_this_folder_with_no_password(tmp_path: Path) -> None:
    process, url = start(tmp_path)
    assert status(url) == 200
    assert (tmp_path / "mlflow.db").is_file()
    run_id = mlflow.MlflowClient(url).create_run("0").info.run_id
    mlflow.MlflowClient(url).log_text(run_id, "kept", "note.txt")
    assert stop(process) == 0
    (note,) = (tmp_path / "mlruns").rglob("note.txt")
    assert note.read_text() == "kept"
    scored = run(
        "lightning_glue.evaluate", run_id, cwd=tmp_path, check=False
    )  # the database is here, its server is not
    assert (scored.returncode, scored.stderr.count("\n")) == (2, 1)
    assert "set MLFLOW_TRACKING_URI=http://HOST:PORT" in scored.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--db", "postgresql://me:secret@127.0.0.1:1/none"], {"MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN}, "me:***@127.0.0"),
        (["--db", "nonsense"], {"MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN}, "--db is no database URL"),
        (["--db", "sqlite:///team.db"], {"MLFLOW_AUTH_ADMIN_PASSWORD": ""}, "set MLFLOW_AUTH_ADMIN_PASSWORD"),
        (["--artifacts", "/proc/x"], {}, "--artifacts /proc/x cannot be written: "),
    ],
)
def test_what_it_cannot_use_is_one_line(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], said: str
) -> None:
    result = run("lightning_glue.server", *arguments, "--port", str(free_port()), cwd=tmp_path, check=False,
                 **environment)  # fmt: skip
    assert result.returncode == 2
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert "secret" not in result.stderr


def test_a_port_in_use_is_one_line(team: tuple[str, Path], tmp_path: Path) -> None:
    port = team[0].rpartition(":")[2]
    result = run("lightning_glue.server", "--port", port, cwd=tmp_path, check=False)
    assert result.stderr == f"error: 127.0.0.1:{port} cannot be used (Address already in use); choose another --port\n"


def test_addresses() -> None:
    assert with_driver("postgres://a@b/c") == with_driver("postgresql://a@b/c") == "postgresql+psycopg://a@b/c"
    assert with_driver("mysql://a@b/c") == "mysql://a@b/c"
    hosts = allowed_hosts("0.0.0.0", "one.org, two.org").split(",")
    assert {"one.org", "one.org:*", "two.org", "localhost:*"} <= set(hosts)
    assert not {"0.0.0.0", "", ":*"} & set(hosts)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::"])
def test_nobody_else_is_let_in_without_users(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="lets everybody in who can reach this machine"):
        check_access(host, None, False)
    check_access(host, "postgresql://db/mlflow", False)
    check_access(host, None, True)


def test_this_machine_needs_no_users() -> None:
    for host in ("127.0.0.1", "127.8.9.10", "localhost", "::1"):
        check_access(host, None, False)


def test_an_open_server_is_refused_in_one_line(tmp_path: Path) -> None:
    refused = run("lightning_glue.server", "--host", "0.0.0.0", cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --host 0.0.0.0 lets everybody in") and refused.stderr.count("\n") == 1
    assert not (tmp_path / "mlflow.db").exists()
