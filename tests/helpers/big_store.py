"""A tracking store with thousands of runs, written with SQL into a copy of an empty one: MLflow would take minutes.

python tests/helpers/big_store.py EMPTY.db RUNS     # fills it and says how long a report of it takes
"""

from __future__ import annotations

import random
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def add_runs(database: Path, runs: list[Row], experiment: str = "glue-rte") -> None:
    """Write finished runs.

    Args:
        runs: of each ``id``, ``params``, ``tags``, ``metrics``, and optionally ``name``, ``status``, ``minutes``,
            ``start`` (ms), ``data`` (digest by split) and ``rows`` (of every split).
    """
    with closing(sqlite3.connect(database)) as store:
        number = _experiment(store, experiment)
        known: set[tuple[str, str]] = set()
        for run in runs:
            start = run.get("start", 1_700_000_000_000)
            end = start + int(run.get("minutes", 2) * 60_000)
            values = (run["id"], run.get("name", "a run"), "LOCAL", run.get("status", "FINISHED"), start, end, "active",
                      f"/nowhere/{run['id']}", number)  # fmt: skip
            store.execute(
                "insert into runs (run_uuid, name, user_id, source_type, status, start_time, end_time, "
                "lifecycle_stage, artifact_uri, experiment_id) values (?, ?, 'me', ?, ?, ?, ?, ?, ?, ?)", values
            )  # fmt: skip
            for table in ("params", "tags"):
                pairs = [(key, str(value), run["id"]) for key, value in run.get(table, {}).items()]
                store.executemany(f"insert into {table} (key, value, run_uuid) values (?, ?, ?)", pairs)
            metrics = [(key, value, end, 1, 0, run["id"]) for key, value in run["metrics"].items()]
            store.executemany("insert into latest_metrics values (?, ?, ?, ?, ?, ?)", metrics)
            _add_data(store, number, run, known)
        store.commit()


def _experiment(store: sqlite3.Connection, name: str) -> int:
    found = store.execute("select experiment_id from experiments where name = ?", (name,)).fetchone()
    if found:
        return int(found[0])
    made = store.execute(
        "insert into experiments (name, artifact_location, lifecycle_stage) values (?, '/nowhere', 'active')", (name,)
    )
    assert made.lastrowid is not None
    return made.lastrowid


def _add_data(store: sqlite3.Connection, experiment: int, run: Row, known: set[tuple[str, str]]) -> None:
    task = run.get("params", {}).get("task.name", "none")
    for split, digest in run.get("data", {}).items():
        dataset = f"{experiment}-{task}-{split}-{digest}"[:36]
        if (dataset, digest) not in known:
            known.add((dataset, digest))
            profile = f'{{"rows": {run.get("rows", 277)}}}'
            store.execute(
                "insert or ignore into datasets values (?, ?, ?, ?, 'local', '{}', null, ?)",
                (dataset, experiment, f"{task}/{split}", digest, profile),
            )
        store.execute(
            "insert into inputs values (?, 'DATASET', ?, 'RUN', ?, 0)", (f"{split}{run['id']}"[:36], dataset, run["id"])
        )


def many_runs(count: int, params: int = 60) -> list[Row]:
    """Runs of all kinds: eight tasks, 20 learning rates, seeds; every hundredth is another program's."""
    rng, found = random.Random(0), list[Row]()
    tasks = {"RTE": "dev/accuracy", "CoLA": "dev/matthews", "STS-B": "dev/pearson", "MNLI": "dev_matched/accuracy"}
    more = {f"model.key_{i}": "the same" for i in range(params)}
    for number in range(count):
        task, metric = rng.choice(list(tasks.items()))
        chosen = {"task.name": task, "model.name": "roberta.base", "model.source": "roberta.base", "seed": number % 50,
                  "data.batch_size": 16, "data.source": "glue",
                  "optimizer.lr": f"{1 + number // 50 % 20}e-05"}  # fmt: skip
        if number % 100 == 99:
            chosen = {"epochs": 3}
        found.append({
            "id": f"{number:032x}", "params": more | chosen, "data": {"train": "t", "dev": "d"},
            "start": 10**12 + number,
            "tags": {f"version.{i}": "1" for i in range(25)},
            "metrics": {f"best/{metric}": rng.gauss(0.7, 0.02)} | {f"train/{i}": 0.5 for i in range(15)},
        })  # fmt: skip
    return found


def main() -> None:
    import subprocess

    database = Path(sys.argv[1]).resolve()
    add_runs(database, many_runs(int(sys.argv[2])))
    start = time.perf_counter()
    command = [sys.executable, "-m", "lightning_glue.report", "--uri", f"sqlite:///{database}"]
    subprocess.run([*command, "--out", str(database.parent)], check=True, stdout=subprocess.DEVNULL)
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
