"""The generated set: official layouts, determinism, no overlap of splits, and labels that can be learnt."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from lightning_glue.data.reader import Rows, read_split
from lightning_glue.data.sample import SAMPLE_VERSION, generate
from lightning_glue.errors import UserError
from lightning_glue.tasks import TASKS, TRAINABLE

# Raise SAMPLE_VERSION together with this digest: caches are named after the version.
DIGESTS = {"1": "75ad1c75f60428659601c9e98b0f43ccd9cb5beee75e7fdb584f2234c978df9f"}

LABEL_NOISE = 0.04


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("sample") / "glue")


def digest(root: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.tsv"), key=lambda path: path.relative_to(root).as_posix()):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def read(root: Path, task: str, split: str) -> Rows:
    return read_split(TASKS[task], TASKS[task].split(split), root)


def first_line(root: Path, name: str) -> list[str]:
    return (root / name).read_text("utf-8").split("\n")[0].split("\t")


def test_same_bytes_everywhere(root) -> None:
    assert {SAMPLE_VERSION: digest(root)} == DIGESTS


def test_seed_changes_every_file(root, tmp_path) -> None:
    other = generate(tmp_path / "other", seed=1)

    names = [path.relative_to(root) for path in root.rglob("*.tsv")]
    assert len(names) == 8 * 3 + 5 + 1  # eight tasks with three files, MNLI with five, AX with one
    assert all((root / name).read_bytes() != (other / name).read_bytes() for name in names)


def test_existing_folder_is_kept(root) -> None:
    before = digest(root)
    with pytest.raises(UserError, match="exists already"):
        generate(root, seed=1)
    assert digest(root) == before


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("SST-2/train.tsv", "sentence label"),
        ("SST-2/test.tsv", "index sentence"),
        ("CoLA/test.tsv", "index sentence"),
        ("MRPC/train.tsv", "Quality #1_ID #2_ID #1_String #2_String"),
        ("MRPC/test.tsv", "index #1_ID #2_ID #1_String #2_String"),
        ("QQP/dev.tsv", "id qid1 qid2 question1 question2 is_duplicate"),
        ("QQP/test.tsv", "id question1 question2"),
        ("QNLI/train.tsv", "index question sentence label"),
        ("RTE/test.tsv", "index sentence1 sentence2"),
        ("WNLI/dev.tsv", "index sentence1 sentence2 label"),
        ("diagnostic/diagnostic.tsv", "index sentence1 sentence2"),
    ],
)
def test_official_headers(root, name, columns) -> None:
    assert [column.replace(" ", "_") for column in first_line(root, name)] == columns.split()


@pytest.mark.parametrize(
    ("name", "fields", "last"),
    [
        ("MNLI/train.tsv", 12, "gold_label"),
        ("MNLI/dev_matched.tsv", 16, "gold_label"),
        ("MNLI/dev_mismatched.tsv", 16, "gold_label"),
        ("MNLI/test_matched.tsv", 10, "sentence2"),
        ("STS-B/train.tsv", 10, "score"),
        ("STS-B/test.tsv", 9, "sentence2"),
    ],
)
def test_wide_headers(root, name, fields, last) -> None:
    header = first_line(root, name)
    assert (len(header), header[-1]) == (fields, last)


def test_cola_has_no_header_and_stars_the_bad_ones(root) -> None:
    rows = [line.split("\t") for line in (root / "CoLA/train.tsv").read_text("utf-8").splitlines()]
    assert {(row[1], row[2]) for row in rows} == {("1", ""), ("0", "*")}


@pytest.mark.parametrize("name", TASKS)
def test_every_file_reads_and_no_texts_come_twice(root, name) -> None:
    task = TASKS[name]
    splits = [read_split(task, split, root) for split in task.splits]
    texts = [pair for rows in splits for pair in zip(*rows.texts, strict=True)]

    assert len(set(texts)) == len(texts)
    assert all(text and text.isascii() for pair in texts for text in pair)
    assert all(rows.dropped == rows.skipped == 0 for rows in splits)
    words = [sum(len(text.split()) for text in pair) for pair in texts]
    low, high = (5, 20) if task.num_texts == 1 else (10, 45)
    assert low <= min(words) <= max(words) <= high


@pytest.mark.parametrize("name", TRAINABLE)
def test_sizes_and_balance(root, name) -> None:
    task = TASKS[name]
    train, dev = (read_split(task, split, root) for split in (task.train, task.dev[0]))
    assert (len(train), len(dev)) == ((300, 60) if name == "WNLI" else (2000, 400))
    if task.is_regression:
        scores = [float(label) for label in train.labels]
        assert min(scores) == 0.0 and max(scores) == 5.0
        assert all(len(label) == 5 for label in train.labels)
        assert all(150 < sum(low <= score <= low + 1 for score in scores) < 800 for low in range(5))
        return
    share = Counter(train.labels).most_common(1)[0][1] / len(train)
    low, high = (0.58, 0.72) if name in ("MRPC", "QQP") else (1 / len(task.labels), 0.58)
    assert low <= share <= high
    assert set(dev.labels) == set(train.labels) == set(task.labels)


def tokens(text: str) -> list[str]:
    words = text.lower().rstrip(".?").split()
    return words + [f"{first} {second}" for first, second in itertools.pairwise(words)]


def bayes_accuracy(train: Iterable[tuple[str, str]], dev: Iterable[tuple[str, str]]) -> float:
    """Accuracy on dev of naive Bayes over words and word pairs."""
    counts: dict[str, Counter[str]] = {}
    for text, label in train:
        counts.setdefault(label, Counter()).update(set(tokens(text)))

    def score(text: str, label: str) -> float:
        seen, total = counts[label], sum(counts[label].values())
        return sum(math.log((seen[token] + 0.1) / total) for token in set(tokens(text)))

    hits = [max(sorted(counts), key=lambda label: score(text, label)) == truth for text, truth in dev]
    return sum(hits) / len(hits)


@pytest.mark.parametrize(("name", "column", "low"), [("SST-2", 0, 0.7), ("MNLI", 1, 0.6), ("RTE", 1, 0.7)])
def test_even_naive_bayes_beats_the_majority(root, name, column, low) -> None:
    task = TASKS[name]
    train, dev = (read_split(task, split, root) for split in (task.train, task.dev[0]))

    accuracy = bayes_accuracy(*(zip(rows.texts[column], rows.labels, strict=True) for rows in (train, dev)))

    assert low < accuracy < 1 - LABEL_NOISE / 2


def overlap(first: str, second: str) -> float:
    one, two = ({*text.lower().rstrip(".?").split()} for text in (first, second))
    return len(one & two) / len(one | two)


def test_stsb_score_follows_the_shared_words(root) -> None:
    rows = read(root, "STS-B", "train")
    shared = [overlap(*pair) for pair in zip(*rows.texts, strict=True)]
    scores = [float(label) for label in rows.labels]
    mean_shared, mean_score = sum(shared) / len(rows), sum(scores) / len(rows)
    covariance = sum((a - mean_shared) * (b - mean_score) for a, b in zip(shared, scores, strict=True))
    norm = math.sqrt(sum((a - mean_shared) ** 2 for a in shared) * sum((b - mean_score) ** 2 for b in scores))

    assert 0.4 < covariance / norm < 0.95


def test_mrpc_cannot_be_read_off_one_sentence_or_the_overlap(root) -> None:
    train, dev = read(root, "MRPC", "train"), read(root, "MRPC", "dev")
    majority = Counter(dev.labels).most_common(1)[0][1] / len(dev)
    assert bayes_accuracy(zip(train.texts[1], train.labels), zip(dev.texts[1], dev.labels)) < majority + 0.05

    means = [
        sum(values) / len(values)
        for label in "01"
        if (values := [overlap(a, b) for a, b, found in zip(*train.texts, train.labels, strict=True) if found == label])
    ]
    assert all(0.3 < mean < 0.8 for mean in means)
