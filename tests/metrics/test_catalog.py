"""Promises of the catalog: names and labels as Prometheus wants them, and a bound on the number of series."""

from __future__ import annotations

import re

import pytest
import yaml

from docs.generate.__main__ import REFERENCE
from serve_app.metrics import catalog
from serve_app.metrics.catalog import METRICS, size_of
from serve_app.metrics.metric import Counter, Histogram, Metric

BY_NAME = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)


@BY_NAME
def test_names(metric: Metric) -> None:
    assert re.fullmatch(r"wan_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == isinstance(metric, Counter)
    assert not isinstance(metric, Histogram) or metric.name.endswith("_seconds")
    assert metric.sentence.endswith(".") and metric.by
    assert all(re.fullmatch("[a-z]+", label) and label != "le" for label in metric.labels)


@BY_NAME
def test_series_of_a_process_are_few(metric: Metric) -> None:
    numbers = len(metric.bounds) + 3 if isinstance(metric, Histogram) else 1
    assert metric.combinations * numbers <= 700


def test_names_are_unique_and_nothing_is_recorded_under_two() -> None:
    names = [name for metric in METRICS for name in metric.series]
    assert len(names) == len(set(names)) > 30
    declared = [one for one in vars(catalog).values() if isinstance(one, Metric)]
    assert [*METRICS] == declared


def test_error_codes_are_those_of_the_reference() -> None:
    words = yaml.safe_load((REFERENCE / "words.yaml").read_text())
    assert [one["code"] for one in words["job_errors"]] == [*catalog.ERROR_CODES]


def test_refusals_are_codes_of_the_api() -> None:
    words = yaml.safe_load((REFERENCE / "words.yaml").read_text())
    assert {*catalog.REFUSALS} - {"other"} <= {one["code"] for one in words["api_errors"]}


def test_sizes() -> None:
    assert [size_of(*size) for size in ((64, 64), (640, 360), (832, 480), (480, 832), (1280, 720), (720, 1280))] == [
        "240p", "360p", "480p", "480p", "720p", "720p",
    ]  # fmt: skip
    assert size_of(1920, 1088) == "larger" and {size_of(10_000, 10_000)} <= {*catalog.SIZES}
