"""``lightning_glue.serve`` beside plain ``mlflow models serve`` of the same registered model, under load.

    GLUE_DIR=... python benchmarks/serve.py [ROUNDS [ROWS]]

A short training of all-MiniLM-L6-v2 on SST-2 registers a model, which both servers load from the same store, with
their defaults (MLflow's in this environment, with one worker). Sentences of SST-2's training split, ROWS to a request,
are sent by ``load.py``, a process of its own with 1, 8 and 64 clients that each wait for an answer before they ask
again. Both servers are up all the time and loaded in turn, with the same requests. None may be refused or lost; labels
must be the same, and probabilities to 1e-5.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from common import describe_machine, versions
from predict import sentences
from records import keep

REQUESTS = {1: 100, 8: 400, 64: 1000}  # by the number of clients
STEPS = 40  # enough for labels of both kinds
_TOLERANCE = 1e-5  # of a probability: sums in another order
_START_SECONDS = 300
PORTS = {"lightning-glue": 5071, "mlflow": 5072}


def train(folder: Path) -> str:
    """Register a model in the store of ``folder``; its address there."""
    source = "glue" if os.environ.get("GLUE_DIR") else "sample"
    command = ["-m", "lightning_glue.train", "--task", "SST-2", "--model", "minilm", "--gpus", "0", "--data", source]
    command += [f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS}", "optimizer.lr=1e-4"]
    subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)
    return f"models:/glue-sst-2{'' if source == 'glue' else '-sample'}@champion"


@contextmanager
def server(command: list[str], port: int, folder: Path) -> Iterator[None]:
    """A server in a session of its own, from its first answer on; it is stopped with all that it started."""
    log = folder / f"{port}.log"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # mlflow looks for uvicorn there
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PATH": path}, stdout=file, stderr=file, start_new_session=True
        )
    try:
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"{' '.join(command)} does not answer:\n{log.read_text()}")
                time.sleep(0.5)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def load(port: int, clients: int, bodies: list[bytes]) -> dict[str, Any]:
    """What ``load.py`` found."""
    command = [sys.executable, str(Path(__file__).with_name("load.py")), str(port), str(clients)]
    return json.loads(subprocess.run(command, input=b"\n".join(bodies), capture_output=True, check=True).stdout)


def predictions(result: dict[str, Any], count: int) -> tuple[list[str], np.ndarray]:
    """Labels and probabilities (rows, classes) of ``count`` requests, all of which must have been answered."""
    rows = [row for place in range(count) for row in result["answers"][str(place)]["predictions"]]
    labels = [row["label"] for row in rows]
    return labels, np.array([[value for name, value in row.items() if name != "label"] for row in rows])


def describe(results: list[dict[str, Any]], rows: int) -> str:
    """A side's rounds: the median round's speed, latencies of all, and what became of the requests."""
    latencies = np.array([value for one in results for value in one["latencies"].values()]) * 1000
    speed = statistics.median(one["sent"] / one["seconds"] for one in results)
    sent, lost, answered = (sum(map(count, results)) for count in (
        lambda one: one["sent"], lambda one: one["lost"], lambda one: len(one["answers"])
    ))  # fmt: skip
    clients = statistics.median(one["cpu"] / one["seconds"] for one in results)
    return (
        f"{speed:7.1f} requests/s  {speed * rows:8.1f} rows/s   p50 {np.percentile(latencies, 50):7.1f} ms   "
        f"p99 {np.percentile(latencies, 99):7.1f} ms   sent {sent}, answered {answered}, "
        f"refused {sent - lost - answered}, lost {lost}; the clients {clients:.0%} of a core"
    )


def compare(clients: int, rounds: int, rows: int, texts: list[str]) -> float | None:
    """Load both in turn and print a line for each; ours over theirs in requests a second, None where answers differ."""
    requests = [texts[i : i + rows] for i in range(0, len(texts), rows)]
    bodies = [json.dumps({"dataframe_split": {"columns": ["text"], "data": [[text] for text in one]}}).encode()
              for one in requests]  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PORTS}
    for _ in range(rounds):
        for name, port in PORTS.items():
            found[name].append(load(port, clients, bodies))
    print(f"\n{clients} clients, {len(requests)} requests a round", flush=True)
    for name, results in found.items():
        print(f"  {name:15} {describe(results, rows)}", flush=True)
    ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in zip(*found.values())]
    ratio = statistics.median(ratios)
    print(f"  ratio {ratio:.2f}x", end="")
    if any(len(one["answers"]) < len(requests) for results in found.values() for one in results):
        print("; requests were refused or lost")
        return None
    (labels, shares), (their_labels, their_shares) = (
        predictions(results[-1], len(requests)) for results in found.values()
    )
    farthest = float(np.abs(shares - their_shares).max())
    differ = sum(a != b for a, b in zip(labels, their_labels))
    print(
        f"; {differ} of {len(labels)} labels differ ({labels.count('1')} are 1), probabilities by up to {farthest:.1e}"
    )
    return ratio if differ == 0 and farthest < _TOLERANCE else None


def main() -> None:
    given = [*sys.argv[1:], *("3", "1")[len(sys.argv) - 1 :]]
    rounds, rows = map(int, given)
    print(
        describe_machine(),
        versions("mlflow", "uvicorn", "fastapi"),
        f"{rounds} rounds, {rows} rows a request",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
        model = train(folder)
        mlflow = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
        ours = [sys.executable, "-m", "lightning_glue.serve", model, "--gpus", "0"]
        texts = sentences(max(REQUESTS.values()) * rows)
        with (
            server([*ours, "--port", str(PORTS["lightning-glue"])], PORTS["lightning-glue"], folder),
            server([*mlflow, "--port", str(PORTS["mlflow"])], PORTS["mlflow"], folder),
        ):
            found = {
                clients: compare(clients, rounds, rows, texts[: count * rows]) for clients, count in REQUESTS.items()
            }
    ratios = {f"{number} clients: serve / mlflow": ratio for number, ratio in found.items() if ratio is not None}
    if len(ratios) < len(found):
        sys.exit("the two did not do the same")
    keep(ratios)


if __name__ == "__main__":
    main()
