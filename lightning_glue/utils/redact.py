"""What of an address or an error may be shown or recorded: passwords and tokens may not."""

from __future__ import annotations

import re

_HIDDEN = "***"
_DATABASES = r"(?:postgres|mysql|mariadb|mssql|oracle|sqlite)[\w+.-]*"
# A password ends at the last @ before the path; SQLAlchemy takes a slash as part of it.
_PASSWORD = re.compile(rf"({_DATABASES}://[^\s:/@?#]*):(?:(?!://)\S)*@|([a-zA-Z][\w+.-]*://[^\s:/@?#]*):[^\s/?#]*@")
# A name without a password is harmless for a database; in front of a host of another kind it is most likely a token.
_TOKEN = re.compile(rf"(?!{_DATABASES}://)\b([a-zA-Z][\w+.-]*://)[^\s:/@?#]+@")
_PARAMETER = re.compile(
    r"([?&](?:x-amz-)?(?:\w*[-_])?(?:token|key|keyid|password|sslpassword|passwd|pwd|secret|sig|signature|auth|credential)s?=)"
    r"[^&\s#]*",
    re.IGNORECASE,
)


def hide_secrets(text: str) -> str:
    """``text`` with the password of every address in it replaced by ``***``, to be shown or recorded.

    Passwords and tokens before a host, and in parameters named like one, are hidden; user names of databases stay.

    >>> hide_secrets("postgresql://ann:s3cret@db/runs is away")
    'postgresql://ann:***@db/runs is away'
    """
    text = _PASSWORD.sub(lambda found: f"{found[1] or found[2]}:{_HIDDEN}@", text)
    text = _TOKEN.sub(rf"\1{_HIDDEN}@", text)
    return _PARAMETER.sub(rf"\1{_HIDDEN}", text)


def first_line(error: BaseException, most: int = 300) -> str:
    """What an error says, on one line and without passwords; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return hide_secrets(lines[0])[:most] if lines else type(error).__name__
