"""Events and deliveries in the database, from the end of a job to the claim of a notifier."""

from __future__ import annotations

import time

from sqlalchemy import update

from serve_app.db.notifications import Delivery, Event
from serve_app.errors import JobFailed
from serve_app.jobs.store import JobStore
from serve_app.notify.endpoints import Endpoints
from serve_app.notify.outbox import Outbox
from serve_app.notify.outcome import Outcome
from tests.support.fakes import PARAMS, until
from tests.support.receiver import Receiver, receiving
from tests.support.running import OPTIONS
from tests.support.sending import Notify, completed, deliveries, ended, events, failed, listen


async def test_events_of_several_owners_in_one_batch(store: JobStore, endpoints: Endpoints) -> None:
    mine, yours = [await listen(endpoints, Receiver(), owner) for owner in ("key_mine", "key_yours")]
    for owner in ("key_mine", "key_yours", "", "key_mine"):
        await completed(store, owner=owner)
    assert await Outbox(store.database, [0]).distribute() == 4
    owners = {event.id: event.owner for event in await events(store)}
    told = sorted((row.endpoint_id, owners[row.event_id]) for row in await deliveries(store))
    assert told == sorted([(mine.id, "key_mine"), (mine.id, "key_mine"), (yours.id, "key_yours")])


async def test_the_event_is_there_when_its_job_has_ended(store: JobStore) -> None:
    """However it ended: nobody else is running."""
    ids = [await completed(store), await failed(store)]
    for end in ("fail", "deadline", "lease"):
        job = await store.create(PARAMS, "wan")
        ids.append(job.id)
        if end == "deadline":
            async with store.database.write() as session:
                (await store._locked(session, job.id)).deadline_at = 1.0
            await store.sweep(OPTIONS)
            continue
        await store.claim("me", 60 if end == "fail" else -1)
        if end == "fail":
            assert await store.retry(
                job.id, 1, JobFailed("x", "y", retryable=True), OPTIONS.model_copy(update={"max_attempts": 1})
            )
        else:
            await store.sweep(OPTIONS.model_copy(update={"max_interruptions": 1}))
    found = await events(store)
    assert [event.video_id for event in found] == ids
    assert [event.type for event in found] == ["video.completed"] + ["video.failed"] * 4


async def test_a_job_that_goes_on_tells_nothing(store: JobStore) -> None:
    job = await store.create(PARAMS, "wan")
    await store.claim("me", 60)
    assert await store.release(job.id, 1)
    await store.claim("me", 60)
    assert not await store.fail(job.id, 1, "late", "of an attempt that was superseded")
    await store.delete(job.id)
    assert await events(store) == []


async def test_what_was_deleted_is_not_sent(store: JobStore, endpoints: Endpoints, notify: Notify) -> None:
    async with receiving() as receiver:
        kept, gone, off = [await listen(endpoints, receiver) for _ in range(3)]
        await completed(store)
        await Outbox(store.database, [0, 0]).distribute()
        assert await endpoints.delete(gone.id, "")
        await endpoints.update(off.id, "", {"disabled_reason": "Disabled by its owner."})
        notify()
        rows = {row.endpoint_id: row for row in await ended(store, 2)}
        assert rows[kept.id].status == "delivered" and len(receiver.requests) == 1
        assert rows[off.id].status == "failed"
        assert rows[off.id].log[0]["error"] == "not sent: the endpoint is disabled"


async def test_replay_takes_an_event_of_another_for_none(store: JobStore, endpoints: Endpoints) -> None:
    await completed(store, owner="key_other")
    await Outbox(store.database, [0]).distribute()
    endpoint = await listen(endpoints, Receiver(), "key_mine")
    (event,) = await events(store)
    assert await endpoints.replay(endpoint, event_id=event.id) is None
    assert await endpoints.replay(endpoint, since=0) == (0, False)


async def test_a_claim_that_was_taken_over_records_nothing(store: JobStore, endpoints: Endpoints) -> None:
    await listen(endpoints, Receiver())
    await completed(store)
    outbox = Outbox(store.database, [0, 60, 60])
    assert await outbox.distribute() == 1 and await outbox.distribute() == 0
    first = await outbox.claim(lease_s=0)
    assert first is not None and first.job is None and first.endpoint is not None
    second = await outbox.claim(lease_s=60)
    assert second is not None and (second.delivery.id, second.delivery.claims) == (first.delivery.id, 2)
    assert await outbox.claim(lease_s=60) is None  # it is leased
    await outbox.record(first.delivery, Outcome(True, 0.1, 200))
    assert [row.status for row in await deliveries(store)] == ["pending"]
    await outbox.record(second.delivery, Outcome(False, 0.1, 500))
    (row,) = await deliveries(store)
    assert (row.status, row.tries) == ("pending", 2)
    assert 50 < row.due_at - time.time() < 70 and await outbox.claim(lease_s=60) is None


async def test_a_receiver_that_is_busy_waits_and_others_do_not(store: JobStore, endpoints: Endpoints) -> None:
    one, two = await listen(endpoints, Receiver()), await listen(endpoints, Receiver())
    await completed(store, notify_email="a@b.test")
    outbox = Outbox(store.database, [0])
    await outbox.distribute()
    parcel = await outbox.claim(60, busy=[one.id, ""])
    assert parcel is not None and parcel.delivery.endpoint_id == two.id
    assert await outbox.claim(60, busy=[one.id, ""]) is None
    mail = await outbox.claim(60, busy=[one.id])
    assert mail is not None and mail.delivery.recipient == "a@b.test" and mail.job is not None


async def test_who_is_cut_off_again_and_again_gives_up(store: JobStore, endpoints: Endpoints, notify: Notify) -> None:
    """Each claim is a try, whether or not anybody lives to record it."""
    async with receiving() as receiver:
        await listen(endpoints, receiver)
        await completed(store)
        outbox = Outbox(store.database, [0, 0, 0])
        await outbox.distribute()
        for _ in range(3):
            assert await outbox.claim(lease_s=0) is not None
        notify()
        (row,) = await ended(store)
        assert (row.status, receiver.connections) == ("failed", 0)
        assert row.log[0]["error"] == "not sent: its last try was cut off"


async def test_what_is_old_is_forgotten(store: JobStore, endpoints: Endpoints, notify: Notify) -> None:
    async with receiving() as receiver:
        await listen(endpoints, receiver)
        notifier = notify()
        await completed(store)
        await completed(store, owner="nobody listens")

        async def distributed() -> bool:
            return all(event.distributed for event in await events(store))

        await until(distributed)
        await ended(store)
        outbox = Outbox(store.database, [0])
        assert await outbox.forget(3600) == 0
        await notifier.stop()
        await completed(store)  # not distributed yet
        await age(store)
        while await outbox.forget(3600):
            pass
        (left,) = await events(store)
        assert not left.distributed and await deliveries(store) == []
        await outbox.distribute()
        await age(store)
        assert await outbox.forget(3600) == 0  # on its way: kept however old
        assert len(await deliveries(store)) == 1


async def age(store: JobStore) -> None:
    async with store.database.write() as session:
        for table in (Event, Delivery):
            await session.execute(update(table).values(created_at=1.0))
