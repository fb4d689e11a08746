"""The official file layout of every task."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator

from lightning_glue.data.sample.events import mnli, mrpc, rte
from lightning_glue.data.sample.pairs import qnli, qqp, stsb, wnli
from lightning_glue.data.sample.sentences import cola, sst2
from lightning_glue.data.sample.vocabulary import Example, Make

_Files = Iterator[tuple[str, list[str]]]  # file name and lines


def _splits(rng: random.Random, make: Make, *sizes: int) -> Iterator[list[Example]]:
    """Yield one list of examples per size; no texts come twice, within a split or across splits."""
    seen: set[tuple[str, ...]] = set()
    for size in sizes:
        examples: list[Example] = []
        while len(examples) < size:
            example = make(rng)
            if example[:-1] not in seen:
                seen.add(example[:-1])
                examples.append(example)
        yield examples


def _table(header: str, rows: Iterable[Iterable[object]]) -> list[str]:
    return [header.replace(" ", "\t"), *("\t".join(map(str, row)) for row in rows)]


def _indexed(make: Make, columns: str, train: int, dev: int, test: int) -> Callable[[random.Random], _Files]:
    """The layout of QNLI, RTE and WNLI: index, two texts, label."""

    def files(rng: random.Random) -> _Files:
        splits = list(_splits(rng, make, train, dev, test))
        for name, examples in zip(("train", "dev"), splits, strict=False):
            rows = ((index, *example) for index, example in enumerate(examples))
            yield f"{name}.tsv", _table(f"index {columns} label", rows)
        yield "test.tsv", _table(f"index {columns}", ((index, *row[:-1]) for index, row in enumerate(splits[2])))

    return files


def _sst2_files(rng: random.Random) -> _Files:
    train, dev, test = _splits(rng, sst2, 2000, 400, 100)
    yield "train.tsv", _table("sentence label", train)
    yield "dev.tsv", _table("sentence label", dev)
    yield "test.tsv", _table("index sentence", ((index, row[0].strip()) for index, row in enumerate(test)))


def _cola_files(rng: random.Random) -> _Files:
    train, dev, test = _splits(rng, cola, 2000, 400, 100)
    for name, examples in (("train", train), ("dev", dev)):
        rows = (f"lg01\t{label}\t{'' if label == '1' else '*'}\t{text}" for text, label in examples)
        yield f"{name}.tsv", list(rows)
    yield "test.tsv", _table("index sentence", ((index, row[0]) for index, row in enumerate(test)))


def _mrpc_files(rng: random.Random) -> _Files:
    numbers = iter(range(100_000, 10**9))
    train, dev, test = _splits(rng, mrpc, 2000, 400, 100)
    for name, examples in (("train", train), ("dev", dev)):
        rows = ((label, next(numbers), next(numbers), one, two) for one, two, label in examples)
        yield f"{name}.tsv", [_MRPC_HEADER.format("Quality"), *_table("", rows)[1:]]
    unlabelled = ((index, next(numbers), next(numbers), one, two) for index, (one, two, _) in enumerate(test))
    yield "test.tsv", [_MRPC_HEADER.format("index"), *_table("", unlabelled)[1:]]


_MRPC_HEADER = "{}\t#1 ID\t#2 ID\t#1 String\t#2 String"


def _qqp_files(rng: random.Random) -> _Files:
    numbers = iter(range(1, 10**9))
    train, dev, test = _splits(rng, qqp, 2000, 400, 100)
    for name, examples in (("train", train), ("dev", dev)):
        rows = ((next(numbers), next(numbers), next(numbers), *example) for example in examples)
        yield f"{name}.tsv", _table("id qid1 qid2 question1 question2 is_duplicate", rows)
    yield "test.tsv", _table("id question1 question2", ((index, *row[:-1]) for index, row in enumerate(test)))


def _stsb_files(rng: random.Random) -> _Files:
    header = "index genre filename year old_index source1 source2 sentence1 sentence2"
    fixed = ("main-captions", "sample", "2019")
    train, dev, test = _splits(rng, stsb, 2000, 400, 100)
    for name, examples in (("train", train), ("dev", dev)):
        rows = ((index, *fixed, f"{index:04d}", "none", "none", *row) for index, row in enumerate(examples))
        yield f"{name}.tsv", _table(f"{header} score", rows)
    rows = ((index, *fixed, f"{index:04d}", "none", "none", *row[:-1]) for index, row in enumerate(test))
    yield "test.tsv", _table(header, rows)


def _mnli_files(rng: random.Random) -> _Files:
    header = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
    header += " sentence1 sentence2"
    names = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
    prompts = iter(range(1, 10**9))
    for name, examples in zip(names, _splits(rng, mnli, 2000, 400, 400, 100, 100), strict=True):
        annotators = 1 if name == "train" else 5
        labels = "" if name.startswith("test") else "".join(f" label{i + 1}" for i in range(annotators)) + " gold_label"
        genres = ("letters", "radio") if name.endswith("mismatched") else ("diary", "travel", "market")
        rows = []
        for index, (premise, hypothesis, label) in enumerate(examples):
            prompt = next(prompts)
            start = (index, prompt, f"{prompt}{label[0]}" if labels else prompt, rng.choice(genres), *"----")
            rows.append((*start, premise, hypothesis, *([label] * (annotators + 1) if labels else ())))
        yield f"{name}.tsv", _table(header + labels, rows)


def _ax_files(rng: random.Random) -> _Files:
    (examples,) = _splits(rng, mnli, 100)
    rows = ((index, *row[:-1]) for index, row in enumerate(examples))
    yield "diagnostic.tsv", _table("index sentence1 sentence2", rows)


WRITERS: dict[str, Callable[[random.Random], _Files]] = {
    "CoLA": _cola_files,
    "SST-2": _sst2_files,
    "MRPC": _mrpc_files,
    "STS-B": _stsb_files,
    "QQP": _qqp_files,
    "MNLI": _mnli_files,
    "QNLI": _indexed(qnli, "question sentence", 2000, 400, 100),
    "RTE": _indexed(rte, "sentence1 sentence2", 2000, 400, 100),
    "WNLI": _indexed(wnli, "sentence1 sentence2", 300, 60, 60),
    "AX": _ax_files,
}
