"""The task of a stored run, from a tag that anybody may have written and that holds no more than MLflow takes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_glue.config.escape import escaped, unescaped
from lightning_glue.tasks import described_task, get_task
from lightning_glue.tracking.own_tasks import TASK, is_known, task_of_run, task_tag, whole_task

DESCRIPTION = {
    "name": "films", "kind": "classes", "text": ["review"], "label": "stars", "index": None, "header": True,
    "separator": ",", "quoting": "none", "label_separator": "|", "dev_share": 0.1, "dev_seed": 1, "bounded": True,
    "files": {name: {"path": "/x.csv", "format": "csv", "sha256": "0"} for name in ("train", "dev")},
    "labels": ["a", "b"], "class_weights": None, "range": None, "metrics": ["f1_macro"],
}  # fmt: skip


def stored(tags: dict[str, str], **params: str) -> Any:
    return SimpleNamespace(info=SimpleNamespace(run_id="r"), data=SimpleNamespace(tags=tags, params=params))


class Store:
    """What fetches a run's configuration."""

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.file = folder / "config.yaml"
        OmegaConf.save(OmegaConf.create({"task": {"description": escaped(description)}}), self.file)

    def download_artifacts(self, run_id: str, name: str, folder: str) -> str:
        assert (run_id, name) == ("r", "config.yaml")
        return str(self.file)


def test_a_tag_has_all_of_a_description_that_fits_and_the_rest_is_fetched(tmp_path: Path) -> None:
    run = stored(task_tag(DESCRIPTION), **{"task.name": "films"})
    assert is_known(run)
    assert task_of_run(run) == described_task(DESCRIPTION) == whole_task(None, run)

    many = {**DESCRIPTION, "labels": [f"the label ${{{i}}} \\${{" for i in range(1500)], "class_weights": [1.0] * 1500}
    run = stored(task_tag(many), **{"task.name": "films"})
    assert len(run.data.tags[TASK]) < 8000
    assert is_known(run)
    short = task_of_run(run)
    assert (len(short.labels), short.selection_metric) == (1500, "dev/f1_macro")
    assert whole_task(Store(tmp_path, many), run) == described_task(many)


def test_a_run_without_the_tag_is_of_a_built_in_task() -> None:
    run = stored({}, **{"task.name": "RTE"})
    assert is_known(run) and task_of_run(run) is whole_task(None, run) is get_task("RTE")
    assert not is_known(stored({}, **{"task.name": "films"}))


@pytest.mark.parametrize(
    "tag", ["", "{", "[]", '{"files": []}', json.dumps({**DESCRIPTION, "name": "../x"}), json.dumps({"files": {}}),
            json.dumps({**DESCRIPTION, "files": {}})],
)  # fmt: skip
def test_a_tag_that_is_no_description_hides_the_run_and_breaks_nothing(tag: str) -> None:
    assert not is_known(stored({TASK: tag}, **{"task.name": "films"}))


@given(st.lists(st.sampled_from([*"\\${}a: '\n", "${"]), max_size=8).map("".join))
def test_no_text_is_an_interpolation(text: str) -> None:
    file = OmegaConf.to_yaml(OmegaConf.create({"labels": escaped([text])}))
    assert OmegaConf.to_container(OmegaConf.create(file), resolve=True) == {"labels": [text]}
    assert unescaped(escaped([text, {"key": text}])) == [text, {"key": text}]
