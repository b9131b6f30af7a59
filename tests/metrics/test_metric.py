"""Counters, gauges and histograms of one process."""

from __future__ import annotations

import threading

import pytest

from serve_app.metrics.metric import Counter, Gauge, Histogram

COLOURS = {"colour": ("red", "blue", "other")}


def test_a_counter_adds_by_label() -> None:
    counter = Counter("x_total", "X.", ["gateway"], COLOURS)
    assert counter.value(colour="red") is None and not list(counter.samples())
    counter.inc(colour="red")
    counter.inc(2.5, colour="red")
    counter.inc(colour="blue")
    assert {sample.labels["colour"]: sample.value for sample in counter.samples()} == {"red": 3.5, "blue": 1}


def test_a_counter_begins_at_zero_for_every_label_value() -> None:
    counter = Counter("x_total", "X.", ["gateway"], COLOURS)
    counter.inc(colour="red")
    counter.begin()
    assert {sample.labels["colour"]: sample.value for sample in counter.samples()} == {"red": 1, "blue": 0, "other": 0}
    many = Counter("y_total", "Y.", ["gateway"], {"number": [str(number) for number in range(1000)]})
    many.begin()
    assert not list(many.samples())


def test_label_values_outside_of_the_set_are_other() -> None:
    counter = Counter("x_total", "X.", ["gateway"], COLOURS)
    counter.inc(colour="video_0123")
    assert [sample.labels for sample in counter.samples()] == [{"colour": "other"}]
    strict = Counter("x_total", "X.", ["gateway"], {"colour": ("red",)})
    with pytest.raises(ValueError, match="x_total: label 'colour' has value 'green', expected one of"):
        strict.inc(colour="green")
    for labels in ({}, {"shape": "round"}, {"colour": "red", "shape": "round"}):
        with pytest.raises(ValueError, match="x_total"):
            counter.inc(**labels)


def test_a_gauge_holds_until_it_is_cleared() -> None:
    gauge = Gauge("x", "X.", ["gateway"])
    gauge.set(True)
    gauge.set(7)
    assert [tuple(sample) for sample in gauge.samples()] == [("x", {}, 7.0)]
    gauge.clear()
    assert not list(gauge.samples())


def test_a_histogram_has_cumulative_buckets_and_an_exact_sum() -> None:
    histogram = Histogram("x_seconds", "X.", ["gateway"], (1, 2.5), COLOURS)
    for value in (0.5, 1, 2, 100):
        histogram.observe(value, colour="red")
    samples = {(sample.name, sample.labels.get("le")): sample.value for sample in histogram.samples()}
    assert samples == {
        ("x_seconds_bucket", "1"): 2,  # a bound belongs to its bucket
        ("x_seconds_bucket", "2.5"): 3,
        ("x_seconds_bucket", "+Inf"): 4,
        ("x_seconds_sum", None): 103.5,
        ("x_seconds_count", None): 4,
    }
    assert {sample.labels["colour"] for sample in histogram.samples()} == {"red"}
    assert (histogram.count(colour="red"), histogram.sum(colour="red")) == (4, 103.5)
    assert histogram.count(colour="blue") == 0
    assert {*histogram.series} == {name for name, _ in samples}


def test_threads_lose_no_count() -> None:
    counter = Counter("x_total", "X.", ["gateway"])

    def count() -> None:
        for _ in range(5000):
            counter.inc()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.value() == 20_000
