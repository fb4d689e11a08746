"""The disk that a benchmark takes: said beforehand, and given back once predictions and report exist."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.errors import UserError
from lightning_glue.pipeline.cost import parameters
from lightning_glue.pipeline.graph import ENSEMBLE, FROM_MNLI, REPORT, SOUP, TRAIN, Graph, Node, predict_name
from lightning_glue.pipeline.ledger import Ledger
from lightning_glue.tasks import get_task
from lightning_glue.utils.logs import log
from lightning_glue.utils.paths import local_folder
from lightning_glue.utils.redact import first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from lightning_glue.pipeline.request import Benchmark

EXPORT_TAG = "lightning_glue.export"  # of a run whose exported model was deleted
_EXPORT = "fairseq"  # a run's artifact folder
_SPARE = 1 << 27  # bytes for journals, figures, outputs and reports
_AT_WORK = 7  # models' worth of checkpoints: the best, and Adam's state in the last one, old and new


def work_folder(benchmark: Path, job: str) -> Path:
    """Checkpoints, progress and lock of a job."""
    return benchmark / "work" / job.replace("/", ".")


def read_run(work: Path) -> str:
    """The run that a training has had, as its worker noted; empty where there is none."""
    try:
        return (work / "run").read_text().strip()
    except OSError:
        return ""


def bytes_needed(model: int, trainings: int, at_once: int, *, remote: bool) -> int:
    """The most that is on the disk at any time, besides what is there.

    Args:
        model: bytes of the weights.
        trainings: that are still to be done; each leaves an exported model until the report exists.
        remote: exported models are in a store elsewhere, but for those on their way.
    """
    at_once = min(at_once, trainings)
    return model * ((at_once if remote else trainings) + _AT_WORK * at_once) + _SPARE


def check_disk(benchmark: Benchmark, graph: Graph, left: Iterable[str], at_once: int) -> str:
    """What the benchmark will need, in words.

    Raises:
        UserError: there is not so much.
    """
    trainings = [graph[name] for name in left if graph[name].kind == TRAIN]
    model = 4 * parameters(benchmark.any_config)
    remote = str(benchmark.uri or "").startswith("http")
    needed = bytes_needed(model, len(trainings), at_once, remote=remote)
    keep, tasks = benchmark.request.keep, len({node.task for node in trainings})
    kept = model * (len(trainings) if keep == "all" else tasks)
    free = shutil.disk_usage(benchmark.folder).free
    said = (
        f"disk: {len(trainings)} trainings to do, {size(model)} of weights each, need up to {size(needed)}, "
        f"{size(kept)} once the report exists (keep={keep}); {size(free)} free"
    )
    if needed > free:
        raise UserError(f"{said}; free space, take fewer tasks or seeds, or start in a folder of another disk")
    return said


def size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 28 else f"{count / 2**20:.0f} MiB"


def clear_checkpoints(benchmark: Path, job: str, *, run: bool = False) -> None:
    """Remove what a training went on from; ``run``: it is not gone on with at all."""
    folder = work_folder(benchmark, job)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if run:
        (folder / "run").unlink(missing_ok=True)


def chosen_seeds(values: dict[int, float], keep: str) -> set[int]:
    """The seeds whose models stay, by their selection metric; of equals the first, of an even number the lower."""
    if keep == "all":
        return set(values)
    ordered = sorted(values.values())
    wanted = ordered[-1:] if keep == "best" else ordered[(len(ordered) - 1) // 2 :][:1]
    return set(sorted(seed for seed, value in values.items() if value in wanted)[:1])


def trained(graph: Graph, ledger: Ledger) -> dict[str, dict[int, Node]]:
    """The trainings that are done, by task and seed."""
    done = ledger.done(graph)
    found: dict[str, dict[int, Node]] = {}
    for node in graph.values():
        if node.kind == TRAIN and node.name in done:
            found.setdefault(node.task, {})[node.seed] = node
    return found


def superfluous(graph: Graph, ledger: Ledger, keep: str) -> list[Node]:
    """The trainings whose exported model nothing needs any more."""
    done, found = ledger.done(graph), list[Node]()
    if keep == "all" or REPORT not in done:
        return []
    needed = {name for node in graph.values() if node.name not in done for name in node.needs}
    for task, nodes in trained(graph, ledger).items():
        if any(f"{task}/{kind}" in graph and f"{task}/{kind}" not in done for kind in (ENSEMBLE, SOUP)):
            continue
        kept = chosen_seeds(values(ledger, nodes), keep)
        found += [
            node
            for seed, node in nodes.items()
            if seed not in kept and node.name not in needed and predict_name(task, seed) in done
            and not ledger.entry(node.name).dropped
        ]  # fmt: skip
    return found


def values(ledger: Ledger, nodes: dict[int, Node]) -> dict[int, float]:
    """The selection metric of trainings that are done, by seed."""
    return {
        seed: ledger.metrics(node.name).get(get_task(node.task).selection_metric, float("-inf"))
        for seed, node in nodes.items()
    }


def check_starts(graph: Graph, ledger: Ledger, keep: str) -> None:
    """Raise UserError where a training is to start from a model that was deleted."""
    done = ledger.done(graph)
    for node in graph.values():
        gone = [name for name in node.needs if name in done and ledger.entry(name).dropped]
        if node.kind == TRAIN and node.task in FROM_MNLI and node.name not in done and gone:
            raise UserError(
                f"{node.name} starts from the model of {gone[0]}, which was deleted when the report existed; ask for "
                "all tasks at once, or for another --name, with --keep all"
            )


def tidy(benchmark: Benchmark, graph: Graph, ledger: Ledger) -> None:
    """Delete the exported models that are not kept, then register the best of those that are; each once."""
    keep = benchmark.request.keep
    away, best = superfluous(graph, ledger, keep), _to_register(benchmark, graph, ledger)
    if not away and not best:
        return
    from lightning_glue.tracking.client import open_store
    from lightning_glue.tracking.registry import register

    try:
        client, uri = open_store(benchmark.uri)
        for node in away:
            drop_export(client, uri, ledger.entry(node.name).run_id, keep)
            ledger.append(node.name, "dropped", run_id=ledger.entry(node.name).run_id)
        for node in best:
            name, version, _ = register(client, ledger.entry(node.name).run_id)
            ledger.append(node.name, "registered", model=name, version=str(version))
    except Exception as error:  # a store may be of any kind; the same command tries again
        log.warning("models could not be tidied up (keep=%s): %s", keep, first_line(error))


def _to_register(benchmark: Benchmark, graph: Graph, ledger: Ledger) -> list[Node]:
    """The best training of each task, once the report exists, unless it is registered."""
    if REPORT not in ledger.done(graph):
        return []
    found = []
    for task, nodes in trained(graph, ledger).items():
        there = {seed: node for seed, node in nodes.items() if not ledger.entry(node.name).dropped}
        for seed in chosen_seeds(values(ledger, there), "best"):
            wanted: Any = benchmark.configs.get(task, {}).get("tracking.register")
            if wanted and not ledger.entry(there[seed].name).registered:
                found.append(there[seed])
    return found


def drop_export(client: MlflowClient, uri: str, run_id: str, keep: str) -> None:
    """Delete a run's exported model, here or in a store elsewhere; the run's tag says so."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    address = client.get_run(run_id).info.artifact_uri
    client.set_tag(run_id, EXPORT_TAG, f"deleted, keep={keep}")
    store = local_folder(address)
    if store is None:
        get_artifact_repository(address, tracking_uri=uri).delete_artifacts(_EXPORT)
    elif (store / _EXPORT / "checkpoint_best.pt").is_file() and not (store / _EXPORT).is_symlink():
        shutil.rmtree(store / _EXPORT)
