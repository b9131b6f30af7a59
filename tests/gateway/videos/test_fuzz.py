"""A short run of `benchmarks.serving.api_fuzz`: every answer is one that OpenAPI lists."""

from __future__ import annotations

from benchmarks.serving.api_fuzz import own


async def test_nothing_undescribed() -> None:
    report = await own(cases=120, seed=7)
    assert report.cases > 60
    assert not report.found, report.found
