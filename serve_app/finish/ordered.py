"""A map over a stream that works on several items at a time and keeps their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Pool(Protocol):
    """Threads that do work."""

    def submit(self, fn: Callable[[T], R], item: T, /) -> Future[R]:
        """Have `fn(item)` done."""


@dataclass(frozen=True)
class MeasuredPool:
    """Threads whose work is measured.

    Attributes:
        executor: the threads.
        busy: context around each piece of work.
    """

    executor: Executor
    busy: Callable[[], AbstractContextManager[None]]

    def submit(self, fn: Callable[[T], R], item: T, /) -> Future[R]:
        """Have `fn(item)` done."""

        def work() -> R:
            with self.busy():
                return fn(item)

        return self.executor.submit(work)


def ordered_map(pool: Pool, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yield `work(item)` for each item, in order. At most `ahead` items are begun and not yet yielded.

    A result that is there is yielded as soon as the next item has come, so that slow items do not hold back fast work.

    Args:
        pool: threads that do the work.
        work: function of an item.
        items: the items; may block until the next is there.
        ahead: at least 1.
    """
    begun: deque[Future[R]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            while len(begun) >= ahead or (begun and begun[0].done()):
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
