"""The page of a run's errors."""

from __future__ import annotations

import re

import numpy as np

from lightning_glue.inference.error_analysis import Rows, analyse
from lightning_glue.tasks import Task
from lightning_glue.tracking.error_page import error_page


def test_whatever_comes_from_data_is_escaped_and_nothing_is_loaded() -> None:
    evil = "</td><script>alert(1)</script>&<img src=http://x>"
    task = Task(evil, (evil, "b"), ("accuracy",), None, (), ())
    rows = Rows(
        task, [2, 3], [[evil, "a"]], np.array([3, 4]), np.array([[0.0, 3], [2, 0]]), np.array([0, 1]), np.ones(2)
    )
    split = analyse(rows, lambda outputs, targets: 0.5, 1.5)
    analysis = {"task": evil, "metric": evil, "temperature": 1.5, "splits": {evil: split},
                "phenomena": [{"phenomenon": evil, "rows": 1, "matthews": 0.0}]}  # fmt: skip
    page = error_page(analysis, evil)
    assert "<script" not in page
    assert "<img" not in page
    assert not re.search(r"(src|href)=", page.replace("src=http://x&gt;", ""))
    assert page.count("&lt;script&gt;") > 5
    assert "ECE" in page
