"""The kinds of metrics: counters, gauges and histograms that a process keeps for itself.

Recording changes a number in this process and costs microseconds; it never waits and never raises for a value of a
label. `export` sends the numbers on. The label values are closed sets, so the number of series is bounded.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import ClassVar, Literal, NamedTuple

Process = Literal["gateway", "dispatcher", "coordinator", "decoder"]
"""A kind of process that records metrics: a replica of a deployment, or the coordinator of a denoiser group."""

OTHER = "other"
"""The label value that stands for every value outside of a closed set."""

# Combinations of label values up to which a counter begins at 0 when its process starts; one with more begins when it
# is first recorded. A histogram exports a dozen numbers for each combination, so it may have fewer.
_COUNTER_ZEROS = 64
_HISTOGRAM_ZEROS = 4


class Sample(NamedTuple):
    """A number to export: the name of its series, its labels, and the value."""

    name: str
    labels: dict[str, str]
    value: float


class Metric:
    """A metric of this process.

    Args:
        name: the name without the prefix `ray_` that Ray adds. Counters end in `_total`.
        sentence: what it says, with its unit.
        by: the kinds of processes that record it.
        labels: every label with the values that it may have. Others are recorded as `other`, which the set must then
            hold.

    Raises:
        ValueError: at recording, if a label is missing or unknown, or its value is neither in its set nor covered by
            `other`.
    """

    kind: ClassVar[str]

    def __init__(
        self, name: str, sentence: str, by: Sequence[Process], labels: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.name = name
        self.sentence = sentence
        self.by = tuple(by)
        self.labels = {label: tuple(values) for label, values in (labels or {}).items()}
        self._allowed = {label: frozenset(values) for label, values in self.labels.items()}
        self._lock = threading.Lock()

    @property
    def series(self) -> tuple[str, ...]:
        """The names of the series that are exported for it."""
        return (self.name,)

    @property
    def combinations(self) -> int:
        """The most combinations of label values that can occur."""
        return math.prod(len(values) for values in self.labels.values())

    def begin(self) -> None:
        """Begin at 0, so that the first event is an increase."""

    def clear(self) -> None:
        """Forget what was recorded."""
        raise NotImplementedError

    def samples(self) -> Iterator[Sample]:
        """Yield the numbers as they are now."""
        raise NotImplementedError

    def _key(self, given: Mapping[str, str]) -> tuple[str, ...]:
        if len(given) != len(self.labels):
            raise ValueError(f"{self.name} has labels {sorted(given)}, expected {sorted(self.labels)}")
        return tuple(self._value(label, allowed, given) for label, allowed in self._allowed.items())

    def _value(self, label: str, allowed: frozenset[str], given: Mapping[str, str]) -> str:
        value = given.get(label)
        if value in allowed:
            return str(value)
        if value is None or OTHER not in allowed:
            raise ValueError(f"{self.name}: label {label!r} has value {value!r}, expected one of {self.labels[label]}")
        return OTHER

    def _zeros(self, most: int) -> list[tuple[str, ...]]:
        return list(product(*self.labels.values())) if self.combinations <= most else []

    def _named(self, key: tuple[str, ...]) -> dict[str, str]:
        return dict(zip(self.labels, key, strict=True))


class _Numbers(Metric):
    """A metric with one number for each combination of label values."""

    def __init__(
        self, name: str, sentence: str, by: Sequence[Process], labels: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        super().__init__(name, sentence, by, labels)
        self._numbers: dict[tuple[str, ...], float] = {}

    def value(self, **labels: str) -> float | None:
        """Return the number of one series; None if nothing was recorded."""
        return self._numbers.get(self._key(labels))

    def clear(self) -> None:
        """Forget what was recorded; nothing is exported until it is recorded again."""
        with self._lock:
            self._numbers.clear()

    def samples(self) -> Iterator[Sample]:
        """Yield the number of each series."""
        with self._lock:
            numbers = list(self._numbers.items())
        for key, number in numbers:
            yield Sample(self.name, self._named(key), number)


class Counter(_Numbers):
    """A number that only grows while its process lives."""

    kind = "counter"

    def begin(self) -> None:
        """Begin at 0, so that the first event is an increase."""
        with self._lock:
            for key in self._zeros(_COUNTER_ZEROS):
                self._numbers.setdefault(key, 0.0)

    def inc(self, by: float = 1.0, /, **labels: str) -> None:
        """Add to the number."""
        key = self._key(labels)
        with self._lock:
            self._numbers[key] = self._numbers.get(key, 0.0) + by


class Gauge(_Numbers):
    """A number that goes up and down. It is exported until it is cleared or its process ends."""

    kind = "gauge"

    def set(self, value: float, /, **labels: str) -> None:
        """Set the number."""
        key = self._key(labels)
        with self._lock:
            self._numbers[key] = float(value)


class Histogram(Metric):
    """Counts of values by size, with their exact sum.

    Args:
        name, sentence, by, labels: as for every metric.
        bounds: upper bounds of the buckets, ascending; one without a bound comes after the last.
    """

    kind = "histogram"

    def __init__(
        self,
        name: str,
        sentence: str,
        by: Sequence[Process],
        bounds: Sequence[float],
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(name, sentence, by, labels)
        self.bounds = tuple(bounds)
        self._texts = (*(f"{bound:g}" for bound in self.bounds), "+Inf")
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}

    @property
    def series(self) -> tuple[str, ...]:
        """The names of the series that are exported for it."""
        return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")

    def begin(self) -> None:
        """Begin at 0, so that the first event is an increase."""
        with self._lock:
            for key in self._zeros(_HISTOGRAM_ZEROS):
                self._counts.setdefault(key, [0] * len(self._texts))
                self._sums.setdefault(key, 0.0)

    def observe(self, value: float, /, **labels: str) -> None:
        """Count a value."""
        key, place = self._key(labels), bisect_left(self.bounds, value)
        with self._lock:
            if key not in self._counts:
                self._counts[key], self._sums[key] = [0] * len(self._texts), 0.0
            self._counts[key][place] += 1
            self._sums[key] += value

    def count(self, **labels: str) -> int:
        """Return how many values one series has counted."""
        return sum(self._counts.get(self._key(labels), ()))

    def sum(self, **labels: str) -> float:
        """Return the sum of the values of one series."""
        return self._sums.get(self._key(labels), 0.0)

    def clear(self) -> None:
        """Forget what was recorded."""
        with self._lock:
            self._counts.clear()
            self._sums.clear()

    def samples(self) -> Iterator[Sample]:
        """Yield the cumulative buckets, the sum and the count of each series."""
        with self._lock:
            counted = [(key, [*counts], self._sums[key]) for key, counts in self._counts.items()]
        for key, counts, total in counted:
            labels, below = self._named(key), 0
            for text, number in zip(self._texts, counts, strict=True):
                below += number
                yield Sample(f"{self.name}_bucket", {**labels, "le": text}, below)
            yield Sample(f"{self.name}_sum", labels, total)
            yield Sample(f"{self.name}_count", labels, below)
