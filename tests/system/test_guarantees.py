"""What is promised is shown by tests that exist."""

from __future__ import annotations

import re

import pytest
from helpers.mutations import MUTATIONS, PACKAGE
from helpers.project import ROOT

ROWS = [
    line.strip("| ").rpartition(" | ")
    for line in (ROOT / "docs/guarantees.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and "---" not in line and "shown by" not in line
]


def exists(test: str) -> bool:
    file, _, name = test.partition("::")
    path = ROOT / file
    return path.is_file() and (not name or f"\ndef {name.partition('[')[0]}(" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("promise, tests", [(promise, tests) for promise, _, tests in ROWS])
def test_every_promise_names_tests_that_exist(promise: str, tests: str) -> None:
    named = re.findall(r"`(tests/[^`]+)`", tests)
    assert promise and named
    assert [test for test in named if not exists(test)] == []


def test_the_promises_are_found() -> None:
    assert len(ROWS) > 20 and not exists("tests/system/test_guarantees.py::test_no_such_thing")


@pytest.mark.parametrize("number", range(len(MUTATIONS)))
def test_a_line_to_make_wrong_is_there_once_and_its_test_exists(number: int) -> None:
    mutation = MUTATIONS[number]
    text = (ROOT / PACKAGE / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.line) == 1 and mutation.line != mutation.becomes
    assert exists(mutation.test)
