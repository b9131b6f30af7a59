from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve_app.finish.ordered import ordered_map


def test_order_is_kept_and_work_is_beside_each_other() -> None:
    met = threading.Barrier(3)

    def work(item: int) -> int:
        met.wait(60)  # three at a time, or never
        return item * item

    with ThreadPoolExecutor(3) as pool:
        assert list(ordered_map(pool, work, iter(range(9)), 3)) == [item * item for item in range(9)]


def test_what_is_ready_does_not_wait_for_the_window() -> None:
    came = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        came.wait(60)
        yield 1
        pytest.fail("asked for more than is needed")

    def work(item: int) -> int:
        came.set()
        return item

    with ThreadPoolExecutor(1) as pool:
        made = ordered_map(pool, work, items(), 2)
        assert next(made) == 0
        made.close()  # type: ignore[attr-defined]


def test_an_error_comes_in_its_place_and_ends_it() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    got: list[int] = []
    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="two"):
        got.extend(ordered_map(pool, work, iter(range(9)), 2))
    with ThreadPoolExecutor(2) as pool:
        made = ordered_map(pool, work, iter(range(9)), 2)
        assert [next(made), next(made)] == [0, 1]
        made.close()  # type: ignore[attr-defined]
