"""The manifests of docs/cluster.md against the schemas of Kubernetes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helpers.project import ROOT

VERSION = "1.34"


def manifests() -> Iterator[dict[str, Any]]:
    text = (ROOT / "docs" / "cluster.md").read_text()
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        yield from yaml.safe_load_all(block)


def as_schemas_know_it(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Itself, or the pods that a RayJob of KubeRay makes, whose own part Kubernetes does not know."""
    if manifest["kind"] != "RayJob":
        return [manifest]
    cluster = manifest["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]} for group in groups]


@pytest.mark.parametrize("manifest", manifests(), ids=lambda manifest: manifest["kind"])
def test_a_manifest_is_one(manifest: dict[str, Any]) -> None:
    for known in as_schemas_know_it(manifest):
        kubernetes_validate.validate(known, VERSION, strict=True)
    broken = {**as_schemas_know_it(manifest)[0], "nonsense": 1}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSION, strict=True)
