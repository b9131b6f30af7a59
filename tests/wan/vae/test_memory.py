"""A decode that does not fit into memory goes on in smaller tiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.mkldnn.is_available(),
    reason="needs Linux, where a process can be refused memory, and oneDNN, without which a layer takes far more of it",
)


def decode(*limits: float) -> list[dict[str, Any]]:
    """Return reports of processes that may take so many MiB more; a whole picture takes about 106 MiB."""
    # Freed memory goes back at once, and oneDNN caches nothing by shape (up to 20 MiB for a tile's), so that the limit
    # counts and not the habits of allocators and caches.
    habits = {"MALLOC_MMAP_THRESHOLD_": "65536", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **habits}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.short_memory", *map(str, limits)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    """Reports of a decode with little memory, with enough, and with too little for any tile."""
    return decode(85, 400, 17)


def test_what_does_not_fit_is_cut_and_the_next_decode_begins_with_what_did(reports: list[dict[str, Any]]) -> None:
    report = reports[0]
    first, second = report["decodes"]
    assert first["failed"] > 0, "memory was not short"
    assert first["tiles"] > 1
    assert 0 < report["whole"] <= 100, "larger tiles were not tried again"
    assert (second["failed"], second["tiles"]) == (0, first["tiles"])
    assert max(first["off"], second["off"]) <= 1 and report["levels"] > 100


def test_what_fits_is_not_cut(reports: list[dict[str, Any]]) -> None:
    assert reports[1]["decodes"] == [{"tiles": 1, "failed": 0, "off": 0}] * 2


def test_where_not_even_the_smallest_tile_fits_the_decode_fails_and_says_so(reports: list[dict[str, Any]]) -> None:
    for mib in (17, 14, 20):  # enough for the steps before the tiles, which differ by CPU
        report = reports[2] if mib == 17 else decode(mib)[0]
        assert report.get("out_of_memory", "decodes" in report)
        if "not even a tile of" in report.get("error", ""):
            return
    pytest.fail(f"it did not say so: {report}")
