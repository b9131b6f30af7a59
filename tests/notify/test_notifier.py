"""Notifiers and real receivers, on both databases."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from serve_app.db.database import STORE_AWAY
from serve_app.db.notifications import LOGGED_TRIES
from serve_app.db.tables import Base
from serve_app.jobs.store import JobStore
from serve_app.metrics import catalog as metrics
from serve_app.notify.endpoints import Endpoints
from serve_app.notify.notifier import Notifier
from serve_app.notify.outbox import Outbox
from tests.support.databases import SERVER
from tests.support.fakes import until
from tests.support.receiver import HANG, HOLD, receiving
from tests.support.sending import Notify, completed, deliveries, ended, events, failed, listen, options


async def test_whoever_wants_it_is_told(store: JobStore, endpoints: Endpoints, notify: Notify) -> None:
    async with receiving() as both, receiving() as failures, receiving() as stranger:
        await listen(endpoints, both)
        await listen(endpoints, failures, "", "video.failed")
        await listen(endpoints, stranger, "key_other")
        notify()
        good, bad = await completed(store), await failed(store)
        rows = await ended(store, 3)
        assert {row.status for row in rows} == {"delivered"}
        told = sorted(
            (json.loads(request.body)["type"], json.loads(request.body)["data"]["id"]) for request in both.requests
        )
        assert told == [("video.completed", good), ("video.failed", bad)]
        assert [json.loads(request.body)["data"]["id"] for request in failures.requests] == [bad]
        assert stranger.connections == 0
        request = both.requests[0]
        assert request.headers["content-type"] == "application/json"
        assert request.headers["webhook-id"] == json.loads(request.body)["id"]
        assert rows[0].log[0]["status_code"] == 204 and rows[0].log[0]["error"] is None
        strange = await completed(store, owner="key_other")
        await ended(store, 4)
        assert [json.loads(request.body)["data"]["id"] for request in stranger.requests] == [strange]
        assert len(both.requests) == 2


async def test_a_server_error_and_then_success(store: JobStore, endpoints: Endpoints, notify: Notify) -> None:
    async with receiving() as receiver:
        receiver.answers = [500, 302]
        await listen(endpoints, receiver)
        notify()
        await completed(store)
        (row,) = await ended(store)
        assert (row.status, row.tries) == ("delivered", 3)
        assert [entry["status_code"] for entry in row.log] == [500, 302, 204]
        assert row.log[0]["answer"] == "thank you" and row.log[0]["error"] == "answered 500, expected 2xx"
        first, *others = receiver.requests
        assert all(other.body == first.body for other in others) and len(set(receiver.ids())) == 1


async def test_it_is_given_up_at_last(store: JobStore, endpoints: Endpoints, notify: Notify) -> None:
    def tries(outcome: str) -> float:
        return metrics.deliveries.value(kind="webhook", outcome=outcome) or 0

    before = [tries("again"), tries("given_up")]
    async with receiving() as receiver:
        receiver.status = 503
        endpoint = await listen(endpoints, receiver)
        notify()
        await completed(store)
        (row,) = await ended(store)
        assert (row.status, row.tries, len(receiver.requests)) == ("failed", 3, 3)
        assert [tries("again"), tries("given_up")] == [before[0] + 2, before[1] + 1]
        found = await endpoints.get(endpoint.id, "")
        assert found is not None and found.disabled_reason is None


async def test_a_receiver_that_is_down_and_comes_up(store: JobStore, endpoints: Endpoints, notify: Notify) -> None:
    async with receiving() as receiver:
        await listen(endpoints, receiver)
    notify(retries_s=[0, *[0.05] * 30])
    await completed(store)

    async def tried() -> bool:
        rows = await deliveries(store)
        return bool(rows) and len(rows[0].log) >= 2

    await until(tried)
    async with receiving(into=receiver):
        (row,) = await ended(store)
        assert row.status == "delivered" and len(receiver.requests) == 1
        assert row.log[0]["status_code"] is None and "Connect" in row.log[0]["error"]


async def test_a_slow_receiver_has_its_time_and_holds_up_nobody(
    store: JobStore, endpoints: Endpoints, notify: Notify
) -> None:
    async with receiving() as slow, receiving() as quick:
        slow.status = HANG
        await listen(endpoints, slow, "slow")
        await listen(endpoints, quick, "quick")
        notify(concurrency=5, timeout_s=10, retries_s=[0])
        for _ in range(6):
            await completed(store, owner="slow")

        async def occupied() -> bool:
            return len(slow.requests) == 4

        await until(occupied)
        await completed(store, owner="quick")

        async def told() -> bool:
            return len(quick.requests) == 1

        await until(told)  # far sooner than the ten seconds that the others take
        assert slow.most_open == 4
        slow.release.set()


async def test_no_answer_in_time_is_a_failure(store: JobStore, endpoints: Endpoints, notify: Notify) -> None:
    async with receiving() as receiver:
        receiver.answers = [HANG]
        await listen(endpoints, receiver)
        notify(timeout_s=0.3)
        await completed(store)
        (row,) = await ended(store)
        assert row.status == "delivered" and row.log[0]["error"] == "no answer within 0.3 s"


async def test_gone_disables_the_endpoint(store: JobStore, endpoints: Endpoints, notify: Notify) -> None:
    async with receiving() as receiver:
        receiver.answers = [410]
        endpoint = await listen(endpoints, receiver)
        notify()
        await completed(store)
        (row,) = await ended(store)
        assert (row.status, row.tries) == ("failed", 1)
        found = await endpoints.get(endpoint.id, "")
        assert found is not None and found.disabled_reason == "The receiver answered 410 Gone."
        second = await completed(store)

        async def distributed() -> bool:
            return all(event.distributed for event in await events(store))

        await until(distributed)
        assert len(await deliveries(store)) == 1 and len(receiver.requests) == 1
        # Enabled again, it can have what it missed.
        endpoint = await endpoints.update(endpoint.id, "", {"disabled_reason": None})  # type: ignore[assignment]
        assert await endpoints.replay(endpoint, since=0) == (2, False)
        await ended(store, 2)
        assert {json.loads(request.body)["data"]["id"] for request in receiver.requests[1:]} >= {second}


async def test_replay(store: JobStore, endpoints: Endpoints, notify: Notify) -> None:
    async with receiving() as receiver:
        receiver.status = 500
        endpoint = await listen(endpoints, receiver)
        notify()
        await completed(store)
        await ended(store)
        receiver.status = 204
        await completed(store)
        failure, success = await ended(store, 2)
        assert (failure.status, success.status) == ("failed", "delivered")
        before = len(receiver.requests)
        # By time: what did not arrive. By id: even what did.
        assert await endpoints.replay(endpoint, since=time.time() + 60) == (0, False)
        assert await endpoints.replay(endpoint, since=0) == (1, False)
        assert {row.status for row in await ended(store, 2)} == {"delivered"}
        assert receiver.ids()[before:] == [failure.event_id]
        assert await endpoints.replay(endpoint, event_id=success.event_id) == (1, False)

        async def again() -> bool:
            return len(receiver.requests) == before + 2

        await until(again)
        assert receiver.ids()[-1] == success.event_id
        for wrong in ("evt_" + "0" * 38, "nonsense", "evt_\0"):
            assert await endpoints.replay(endpoint, event_id=wrong) is None
        (row,) = [row for row in await ended(store, 2) if row.id == failure.id]
        assert [entry["status_code"] for entry in row.log] == [500, 500, 500, 204]


async def test_many_notifiers_send_each_event_once(store: JobStore, endpoints: Endpoints, notify: Notify) -> None:
    async with receiving() as receiver:
        await listen(endpoints, receiver)
        for _ in range(30):
            await completed(store)
        for _ in range(3):
            notify(timeout_s=30)
        await ended(store, 30)
        assert sorted(receiver.ids()) == sorted(event.id for event in await events(store))


async def test_the_log_is_bounded(store: JobStore, endpoints: Endpoints, notify: Notify) -> None:
    async with receiving() as receiver:
        receiver.status, receiver.body = 500, b"x" * 100_000
        await listen(endpoints, receiver)
        notify(retries_s=[0] * (LOGGED_TRIES + 4))
        await completed(store)
        (row,) = await ended(store)
        assert (len(receiver.requests), len(row.log)) == (LOGGED_TRIES + 4, LOGGED_TRIES)
        assert all(len(entry["answer"]) == 1024 for entry in row.log)


async def test_the_database_is_away_between_sending_and_recording(postgres_url: str) -> None:
    """Nobody can connect and every connection is cut; what was sent is recorded when it is back, and not sent again."""
    import asyncpg

    name = postgres_url.rpartition("/")[2]
    store = JobStore(postgres_url)
    await store.start()
    async with store.database.write() as session:
        for table in Base.metadata.sorted_tables:
            await session.execute(table.delete())
    control = await asyncpg.connect(SERVER)
    async with receiving() as receiver:
        receiver.answers = [HOLD]
        await listen(Endpoints(store.database), receiver)
        await completed(store)
        notifier = Notifier(store.database, options())
        notifier.start()
        try:

            async def asked() -> bool:
                return bool(receiver.requests)

            await until(asked)
            await control.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            await control.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
            with pytest.raises(STORE_AWAY):
                await store.ping()
            receiver.release.set()

            async def answered() -> bool:
                return receiver.open == 0

            await until(answered)
        finally:
            await control.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            await control.close()
        (row,) = await ended(store)
        assert (row.status, row.claims, len(receiver.requests)) == ("delivered", 1, 1)
        await completed(store)
        await ended(store, 2)
        notifier.raise_if_ended()
        await notifier.stop()
    await store.close()


async def test_stopping_waits_for_what_is_under_way(store: JobStore, endpoints: Endpoints, notify: Notify) -> None:
    async with receiving() as receiver:
        receiver.answers = [HANG]
        await listen(endpoints, receiver)
        notifier = notify(timeout_s=0.5)
        await completed(store)

        async def asked() -> bool:
            return bool(receiver.requests)

        await until(asked)
        await notifier.stop()
        (row,) = await deliveries(store)
        assert (row.status, row.log[0]["error"]) == ("pending", "no answer within 0.5 s")
        notifier.raise_if_ended()


async def test_a_loop_that_broke_is_told(store: JobStore, notify: Notify, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: Outbox) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Outbox, "distribute", broken)
    notifier = notify()
    assert notifier._loop_task is not None
    await asyncio.wait([notifier._loop_task])
    with pytest.raises(RuntimeError, match="loop has ended"):
        notifier.raise_if_ended()
    notifier._stopping = True  # nothing is left to be checked afterwards
