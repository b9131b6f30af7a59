"""Who gets a seat, and that none is lost, whoever leaves when."""

from __future__ import annotations

import asyncio
import time

import pytest

from serve_app.engine.admission_queue import AdmissionQueue, Claim, Leaving
from serve_app.errors import JobFailed

NEVER = float("inf")


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_most_urgent_of_those_who_wait_is_next_and_whose_turn_has_come_goes_first() -> None:
    seats, given = AdmissionQueue(1), []

    async def sit(claim: Claim) -> None:
        await seats.take(claim)
        given.append(claim.id)

    await sit(Claim("first", 2, NEVER))
    now = time.time()
    claims = [Claim("batch", 2, now + 99), Claim("late", 1, now + 50), Claim("standard", 1, now + 9)]
    claims += [Claim("urgent", 0, now + 999), Claim("overdue", 2, now - 1), Claim("longer overdue", 2, now - 2)]
    tasks = [asyncio.create_task(sit(claim)) for claim in claims]
    await settled()
    for _ in claims:
        seats.leave(given[-1])
        await settled()
    await asyncio.gather(*tasks)
    assert given == ["first", "longer overdue", "overdue", "urgent", "standard", "late", "batch"]


async def test_one_sample_has_one_seat() -> None:
    seats = AdmissionQueue(2)
    await seats.take(Claim("a", 1, NEVER))
    with pytest.raises(JobFailed, match="a is being denoised already"):
        await seats.take(Claim("a", 1, NEVER))
    assert "a" in seats and "b" not in seats


async def test_who_stops_waiting_takes_no_seat_even_in_the_moment_it_is_given() -> None:
    seats = AdmissionQueue(1)
    await seats.take(Claim("a", 1, NEVER))
    gone, given_and_gone, stays = (asyncio.create_task(seats.take(Claim(n, 1, NEVER))) for n in "bcd")
    await settled()
    gone.cancel()
    await settled()
    seats.leave("a")  # c has it from here on, but its task has not run
    given_and_gone.cancel()
    await settled()
    await asyncio.wait_for(stays, 1)
    assert "d" in seats and "c" not in seats
    seats.leave("d")
    await asyncio.wait_for(seats.take(Claim("e", 1, NEVER)), 1)


async def test_closed_seats_send_away_who_waits_and_who_comes() -> None:
    seats = AdmissionQueue(1)
    await seats.take(Claim("a", 1, NEVER))
    waiting = asyncio.create_task(seats.take(Claim("b", 1, NEVER)))
    await settled()
    seats.close()
    with pytest.raises(Leaving):
        await waiting
    with pytest.raises(Leaving):
        await seats.take(Claim("c", 1, NEVER))
    seats.leave("a")
    seats.open()
    await asyncio.wait_for(seats.take(Claim("d", 1, NEVER)), 1)
