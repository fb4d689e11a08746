"""Passwords of addresses are never shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_glue.utils.redact import hide_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://ann:s3cret@db/runs is away", "postgresql://ann:***@db/runs is away"),
        ("postgresql+psycopg://ann:p@ss/w@db/runs", "postgresql+psycopg://ann:***@db/runs"),
        ("a://u:p@h,b://u2:p2@h2", "a://u:***@h,b://u2:***@h2"),
        ("http://ann:p@w:x@host:5000/p?q=1", "http://ann:***@host:5000/p?q=1"),
        ("grpc://t0ken@host:1", "grpc://***@host:1"),
        ("https://t0ken:@host", "https://t0ken:***@host"),
        ("http://host/?token=abc&x=1", "http://host/?token=***&x=1"),
        ("https://s3/x?X-Amz-Signature=ff&X-Amz-Security-Token=q", "https://s3/x?X-Amz-Signature=***&X-Amz-Security-Token=***"),
        ("--storage 'postgresql://u:p w'", "--storage 'postgresql://u:p w'"),
    ],
)  # fmt: skip
def test_passwords_and_tokens_are_hidden(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://ann@db/runs",
        "http://host:5000/#/experiments/1?startTime=x@y",
        "sqlite:////tmp/a@b/mlflow.db",
        "model.tokenizer=gpt2 data.max_tokens=512",
        "grpc://host:13000",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide_secrets(text) == text


_WORD = st.text("abcdefgh0123456789!$%&()*+,;=~_.-", min_size=6, max_size=20)


@given(
    st.sampled_from(["postgresql", "http", "https", "grpc", "mysql+pymysql", "ftp"]),
    _WORD,
    st.sampled_from(["", ":5432"]),
)
def test_no_password_before_a_host_is_left(scheme: str, password: str, port: str) -> None:
    shown = hide_secrets(f"error: {scheme}://ann:{password}@db.example{port}/runs, again")
    assert password not in shown or password in "***"
    assert shown.endswith(f"@db.example{port}/runs, again")
