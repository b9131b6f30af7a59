"""A map over a stream that works on several items at a time and keeps their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(pool: Executor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
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
