"""Two generations of dispatchers on one store."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.errors import ServeAppError
from serve_app.jobs.generations import SILENT_S
from serve_app.jobs.store import JobStore
from tests.support.claiming import create
from tests.support.clock import MovableClock


async def leases(store: JobStore, generation: str) -> bool:
    await create(store)
    return await store.claim("me", 60, generation) is not None


async def test_the_first_generation_is_current_and_a_newer_one_waits_until_it_is_ready(store: JobStore) -> None:
    assert not await leases(store, "old"), "nobody knows it"
    assert await store.report_generation("old", False)
    assert not await store.report_generation("new", False)
    assert await leases(store, "old") and not await leases(store, "new")
    assert await store.report_generation("new", True)
    assert not await store.report_generation("old", True), "it does not come back by itself"
    assert await leases(store, "new") and not await leases(store, "old")
    assert await leases(store, ""), "a dispatcher without a generation always leases"


async def test_generations_that_come_at_once_agree_on_one(store: JobStore, store_url: str) -> None:
    stores = [store, JobStore(store_url), JobStore(store_url)]
    for other in stores[1:]:
        await other.start()
    names = ("a", "b", "c")
    await asyncio.gather(*(one.report_generation(name, False) for one, name in zip(stores, names, strict=True)))
    assert [row.state for row, _ in await store.generations()] == ["current", "waiting", "waiting"]
    for other in stores[1:]:
        await other.close()


async def test_an_operator_goes_back(store: JobStore) -> None:
    with pytest.raises(ServeAppError, match="expected one of a generation, and none has come yet"):
        await store.switch_generation("old")
    for name in ("old", "new"):
        assert await store.report_generation(name, True)
    assert await store.switch_generation("old") == "new"
    assert await store.switch_generation("old") is None
    assert not await store.report_generation("new", True)
    assert await leases(store, "old")
    with pytest.raises(ServeAppError, match="NAME has value 'third', expected one of 'new', 'old'"):
        await store.switch_generation("third")


async def test_a_generation_that_fell_silent_is_replaced(store: JobStore, clock: MovableClock) -> None:
    for name in ("old", "new"):
        assert await store.report_generation(name, True)
    clock.advance(SILENT_S - 1)
    assert not await store.report_generation("old", True)
    clock.advance(2)
    assert not await store.report_generation("old", False), "its pipeline does not run"
    assert await store.report_generation("old", True)
