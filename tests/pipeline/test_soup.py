"""A soup is the average of those it keeps, and never scores less than the best run alone."""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lightning_glue as lg
from lightning_glue.errors import UserError
from lightning_glue.inference.finetuned import load_fine_tuned
from lightning_glue.pipeline.outputs import read_outputs, score
from lightning_glue.pipeline.soup import greedy_average, greedy_soup, read_soup

from .conftest import Trained

WEIGHTS = st.lists(st.tuples(*[st.integers(-8, 8)] * 3).map(list), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(WEIGHTS, st.integers(0, 99))
def test_members_are_kept_where_the_average_scores_no_worse(rows: list[list[int]], seed: int) -> None:
    """Any function of the weights may be the score."""
    direction = np.random.default_rng(seed).normal(size=3)
    judge = lambda weights: round(float(np.sin(np.asarray(weights, np.float64)) @ direction), 1)
    rows = sorted(rows, key=judge, reverse=True)
    model = torch.nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([rows[0]], dtype=torch.float32)
    others = [(str(i), {"weight": torch.tensor([row], dtype=torch.float32)}) for i, row in enumerate(rows) if i]
    kept = greedy_average(model, others, lambda: judge(model.weight.detach()[0].numpy()))
    members = [rows[0], *(rows[int(name)] for name in kept)]
    np.testing.assert_allclose(model.weight.detach()[0].numpy(), np.mean(members, axis=0), atol=1e-4)
    assert judge(model.weight.detach()[0].numpy()) >= judge(np.float32(rows[0]))


@pytest.mark.torture
def test_a_soup_of_runs(trained: Trained, tmp_path: Path) -> None:
    runs, out = [run.id for run in trained.rte], tmp_path / "outputs" / "RTE" / "soup"
    client = mlflow.MlflowClient(trained.uri)
    tags = {"lineage.start_sha256": "random weights"}
    other = client.create_run(client.get_run(runs[0]).info.experiment_id, tags=tags).info.run_id
    client.log_param(other, "task.name", "RTE")
    client.log_metric(other, "best/dev/accuracy", 0.0)
    soup = greedy_soup([other, *runs], trained.uri, out, export=tmp_path / "soup")
    assert soup.scores["dev/accuracy"] >= max(run.metrics["dev/accuracy"] for run in trained.rte)
    assert set(soup.members) <= set(runs)
    assert soup.left_out[other].startswith("it or the best run did not start from pretrained weights")
    assert read_soup(out) == soup
    found = read_outputs(out)
    assert score(found["dev"]) == soup.scores and "test" in found
    states = [
        load_fine_tuned(Path(run.folder or "")).model.state_dict() for run in trained.rte if run.id in soup.members
    ]
    for name, value in load_fine_tuned(tmp_path / "soup").model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([state[name] for state in states]).mean(0), msg=name)
    assert len(lg.load(tmp_path / "soup").predict(["A man sleeps."], ["Somebody is asleep."]).labels) == 1


@pytest.mark.torture
def test_runs_of_several_tasks_are_no_soup(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a soup of MNLI, RTE; expected runs of one task"):
        greedy_soup([trained.mnli.id, trained.rte[0].id], trained.uri, tmp_path)
