"""What the tracking store adds to a model card: how long the run took, and how its seeds scatter."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.tracking import model_card
from lightning_glue.tracking.model_card import Facts
from lightning_glue.utils.paths import local_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_ASKED = ("task.name", "model.name", "optimizer.lr", "data.batch_size", "trainer.max_epochs", "trainer.max_steps")


def completed(facts: Facts, client: MlflowClient, run: Run) -> tuple[Facts, dict[str, dict[str, float]]]:
    """The facts with the run's cost, and the scores by seed of the runs that differ from it in their seed alone.

    Raises:
        MlflowException, OSError: the store is away.
    """
    from lightning_glue.tracking.stored_runs import scored_run

    scored = scored_run(run, "")
    if scored is None:
        return facts, {}
    return replace(facts, minutes=scored.minutes, scores=facts.scores or scored.best), seeds_of(client, run)


def seeds_of(client: MlflowClient, run: Run) -> dict[str, dict[str, float]]:
    """Scores of the best evaluation by seed, this run's among them: of runs with its recipe and its data.

    One request, for the finished runs of its experiment that have the commonest keys in common with it.
    """
    from lightning_glue.tracking.comparison import Group, recipe_key, scored_splits
    from lightning_glue.tracking.stored_runs import scored_run, search

    own = scored_run(run, "")
    if own is None:
        return {}
    same = [f"params.`{key}` = '{run.data.params[key]}'" for key in _ASKED if "'" not in run.data.params.get(key, "'")]
    found = search(client, [run.info.experiment_id], " and ".join(["attributes.status = 'FINISHED'", *same]))
    key, data = recipe_key(own, {}), scored_splits(own)
    mates = [one for one in (scored_run(other, "") for other in found) if one]
    alike = [one for one in mates if recipe_key(one, {}) == key and scored_splits(one) == data]
    seeds = {one.seed: one.best for one in Group(own.task, "", alike).seeds} | {own.seed: own.best}
    return dict(sorted(seeds.items()))


def facts_of(client: MlflowClient, run: Run, export: str) -> Facts | None:
    """What the card in a run's artifact folder ``export`` was made of; None where it has none."""
    store = local_folder(run.info.artifact_uri)
    if store:
        return model_card.read(store / export)
    with tempfile.TemporaryDirectory(prefix="lightning-glue-") as folder, suppress(Exception):  # any store's error
        client.download_artifacts(run.info.run_id, f"{export}/{model_card.FACTS}", folder)
        return model_card.read(next(path.parent for path in Path(folder).rglob(model_card.FACTS)))
    return None
