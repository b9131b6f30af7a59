from __future__ import annotations

import pytest

from serve_app.errors import without_password


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@db:5432/wan", "postgresql://me:***@db:5432/wan"),
        ("postgresql://me@db:5432/wan", "postgresql://me@db:5432/wan"),
        ("postgresql://me:se@secret@db/wan", "postgresql://me:***@db/wan"),
        ("postgresql://me:se/secret?secret@db/wan", "postgresql://me:***@db/wan"),
        ("postgresql://me@here:secret@db/wan", "postgresql://me@here:***@db/wan"),
        ("postgresql://db/wan?user=me&password=secret&ssl=on", "postgresql://db/wan?user=me&password=***&ssl=on"),
        ("postgresql://db/wan?passfile=secret", "postgresql://db/wan?passfile=***"),
        ("postgres//me:secret@db/wan", "postgres//me:***@db/wan"),
        ("postgresql:/me:secret@db/wan", "postgresql:***@db/wan"),
        ("me@db.internal", "me@db.internal"),
        ("amqps://wan:secret@mq.internal/vhost", "amqps://wan:***@mq.internal/vhost"),
        ("sqlite:////data/jobs.db", "sqlite:////data/jobs.db"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown
