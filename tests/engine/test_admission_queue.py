"""Places of an engine: they go to the most urgent sample, and none is lost, whenever a sample leaves."""

from __future__ import annotations

import asyncio
import time

import pytest

from serve_app.engine.admission_queue import AdmissionQueue, Candidate
from serve_app.engine.errors import NotAdmitting
from serve_app.errors import JobFailed

NEVER = float("inf")


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_most_urgent_of_those_who_wait_is_next_and_who_is_overdue_goes_first() -> None:
    queue, given = AdmissionQueue(1), []

    async def enter(candidate: Candidate) -> None:
        await queue.wait_for_place(candidate)
        given.append(candidate.id)

    await enter(Candidate("first", 2, NEVER))
    now = time.time()
    candidates = [Candidate("batch", 2, now + 99), Candidate("late", 1, now + 50), Candidate("standard", 1, now + 9)]
    candidates += [Candidate("urgent", 0, now + 999), Candidate("overdue", 2, now - 1)]
    candidates += [Candidate("longer overdue", 2, now - 2)]
    tasks = [asyncio.create_task(enter(candidate)) for candidate in candidates]
    await settled()
    for _ in candidates:
        queue.free_place(given[-1])
        await settled()
    await asyncio.gather(*tasks)
    assert given == ["first", "longer overdue", "overdue", "urgent", "standard", "late", "batch"]


async def test_one_sample_has_one_place() -> None:
    queue = AdmissionQueue(2)
    await queue.wait_for_place(Candidate("a", 1, NEVER))
    with pytest.raises(JobFailed, match="a is being denoised already"):
        await queue.wait_for_place(Candidate("a", 1, NEVER))
    assert "a" in queue and "b" not in queue


async def test_who_stops_waiting_takes_no_place_even_in_the_moment_it_is_given() -> None:
    queue = AdmissionQueue(1)
    await queue.wait_for_place(Candidate("a", 1, NEVER))
    gone, given_and_gone, stays = (asyncio.create_task(queue.wait_for_place(Candidate(n, 1, NEVER))) for n in "bcd")
    await settled()
    gone.cancel()
    await settled()
    queue.free_place("a")  # c has it from here on, but its task has not run
    given_and_gone.cancel()
    await settled()
    await asyncio.wait_for(stays, 60)
    assert "d" in queue and "c" not in queue
    queue.free_place("d")
    await asyncio.wait_for(queue.wait_for_place(Candidate("e", 1, NEVER)), 60)


async def test_a_closed_queue_sends_away_who_waits_and_who_comes() -> None:
    queue = AdmissionQueue(1)
    await queue.wait_for_place(Candidate("a", 1, NEVER))
    waiting = asyncio.create_task(queue.wait_for_place(Candidate("b", 1, NEVER)))
    await settled()
    queue.close()
    with pytest.raises(NotAdmitting):
        await waiting
    with pytest.raises(NotAdmitting):
        await queue.wait_for_place(Candidate("c", 1, NEVER))
    queue.free_place("a")
    queue.open()
    await asyncio.wait_for(queue.wait_for_place(Candidate("d", 1, NEVER)), 60)
