"""A short run of `benchmarks.serving.api_fuzz`: every answer is one that OpenAPI lists."""

from __future__ import annotations

from benchmarks.serving.api_fuzz import own


async def test_nothing_undescribed() -> None:
    report = await own(cases=80, seed=7)
    assert report.cases > 40
    assert not report.found, report.found
