"""The export: every number of a metric is set as a gauge, and set again each time."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from serve_app.metrics import export
from serve_app.metrics.export import Exporter
from serve_app.metrics.metric import Counter, Gauge, Histogram


class FakeGauge:
    """A gauge of Ray that remembers what it was set to."""

    made: dict[str, FakeGauge]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.tag_keys = tag_keys
        self.numbers: list[tuple[float, dict[str, str]]] = []

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        assert {*tags} == {*self.tag_keys} and all(isinstance(one, str) for one in tags.values())
        self.numbers.append((value, dict(tags)))


def test_without_a_ray_nothing_is_exported() -> None:
    before = threading.active_count()
    export.start("decoder")
    assert threading.active_count() == before and not export._started


def test_every_number_is_a_gauge_that_is_set_again() -> None:
    made: dict[str, FakeGauge] = {}

    def make(name: str, description: str, tag_keys: tuple[str, ...]) -> FakeGauge:
        assert name not in made, "a second gauge of one name"
        made[name] = FakeGauge(name, description, tag_keys)
        return made[name]

    counter = Counter("a_total", "A.", ["gateway"], {"colour": ("red", "blue")})
    gauge = Gauge("b", "B.", ["gateway"])
    histogram = Histogram("c_seconds", "C.", ["gateway"], (1,))
    exporter = Exporter((counter, gauge, histogram), make)
    assert exporter.export() == 0 and not made
    counter.inc(colour="red")
    histogram.observe(0.25)
    assert exporter.export() == 5
    counter.inc(colour="red")
    gauge.set(3)
    assert exporter.export() == 6
    assert made["a_total"].numbers == [(1, {"colour": "red"}), (2, {"colour": "red"})]
    assert made["b"].numbers == [(3, {})]
    assert made["c_seconds_bucket"].numbers == 2 * [(1, {"le": "1"}), (1, {"le": "+Inf"})]
    assert made["c_seconds_sum"].numbers == 2 * [(0.25, {})] and made["c_seconds_count"].numbers == 2 * [(1, {})]
