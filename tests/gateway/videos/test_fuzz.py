"""A short run of `benchmarks.serving.api_fuzz`: nothing is answered that OpenAPI does not say."""

from __future__ import annotations

from benchmarks.serving.api_fuzz import own


async def test_nothing_undescribed() -> None:
    report = await own(cases=120, seed=7)
    assert report.cases > 60
    assert not report.found, report.found
