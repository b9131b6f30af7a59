from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.storage import Storage


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind."""
    if request.param == "folder":
        return Storage(str(tmp_path / "new" / "videos"))
    storage: Storage = request.getfixturevalue("s3_storage")
    return storage


async def read(storage: Storage, key: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join([chunk async for chunk in storage.stream(key, start, end)])
