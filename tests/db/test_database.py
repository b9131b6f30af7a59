from __future__ import annotations

import re

import pytest

from serve_app.db.database import Database
from serve_app.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "shown", "expected"),
    [
        ("postgres//me:secret@db/wan", "postgres//me:***@db/wan", "postgresql://user@host:5432/database"),
        ("postgresql://me:secret@db:port/wan", "postgresql://me:***@db:port/wan", "postgresql://user@host:5432/"),
        ("mysql://me:secret@db/wan", "mysql://me:***@db/wan", "a file of SQLite or a PostgreSQL database"),
        ("sqlite://", "sqlite://", "a file of SQLite or a PostgreSQL database"),
    ],
)
def test_urls_that_name_no_database(url: str, shown: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"store.url has value '{shown}', expected {expected}")):
        Database(url)
