"""The notifier, which sends the deliveries of the outbox again until they arrive or are given up.

It runs beside a dispatcher and knows nothing of it. Any number of notifiers share one outbox.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from serve_app.clock import CLOCK, Clock
from serve_app.config import Config
from serve_app.db.database import STORE_AWAY, Database
from serve_app.errors import one_line
from serve_app.logs import get_logger
from serve_app.metrics import catalog as metrics
from serve_app.notify import webhook
from serve_app.notify.mail import Mailer
from serve_app.notify.outbound import Outbound
from serve_app.notify.outbox import DueDelivery, Outbox
from serve_app.notify.outcome import Outcome

logger = get_logger(__name__)

# Most deliveries to one endpoint at once, and most mails: a receiver that hangs must not hold up all others.
_PER_RECEIVER = 4
# Seconds between two looks for old events and deliveries.
_FORGET_S = 60.0


def outbound(config: Config) -> Outbound:
    """Return the HTTP client that calls the endpoints of a deployment.

    Raises:
        ConfigError: an option cannot work.
    """
    options = config.webhooks
    return Outbound(
        allow_http=options.allow_http,
        networks=options.allow_networks,
        timeout_s=options.timeout_s,
        ca_file=options.ca_file,
    )


class Notifier:
    """A loop that delivers until stopped.

    Args:
        database: a started database.
        config: the options of webhooks and mail.
        clock: the clock by which the notifier waits.

    Raises:
        ConfigError: an option of webhooks or mail cannot work.
    """

    def __init__(self, database: Database, config: Config, clock: Clock = CLOCK) -> None:
        self._options = config.webhooks
        self._clock = clock
        self._poll_s = config.dispatcher.poll_s
        # Twice the time of a try leaves time to record it, and bounds how late a lost try is repeated.
        self._lease_s = 2 * config.webhooks.timeout_s
        self._outbox = Outbox(database, config.webhooks.retries_s)
        self._outbound = outbound(config)
        self._mailer = None
        if config.mail is not None:
            self._mailer = Mailer(config.mail, config.gateway.public_url, config.webhooks.timeout_s)
        self._sending: dict[asyncio.Task[None], str] = {}
        """The tries under way, each with the id of its endpoint, empty for a mail."""
        self._wake = asyncio.Event()
        self._stopping = False
        self._loop_task: asyncio.Task[None] | None = None
        self._forgot_at = float("-inf")

    def start(self) -> None:
        """Begin, as a task of the running event loop."""
        self._loop_task = asyncio.create_task(self._loop(), name="notifier")

    def raise_if_ended(self) -> None:
        """Raise RuntimeError, with its cause, if the loop has ended without being told to."""
        task = self._loop_task
        if task is None or not task.done() or self._stopping:
            return
        raise RuntimeError("the notifier's loop has ended") from (None if task.cancelled() else task.exception())

    async def stop(self) -> None:
        """Begin no more tries, and wait up to 10 s for those under way; the database keeps their deliveries."""
        self._stopping = True
        self._wake.set()
        if self._loop_task is not None:
            await asyncio.wait([self._loop_task])
        if self._sending:
            _, late = await asyncio.wait([*self._sending], timeout=10)
            for task in late:  # it is not recorded, so it is sent again once its lease runs out
                task.cancel()

    async def _loop(self) -> None:
        away = 0
        while not self._stopping:
            self._wake.clear()
            pause = self._poll_s
            try:
                while await self._outbox.distribute():
                    pass
                await self._claim()
                await self._forget()
                away = 0
            except STORE_AWAY as error:
                away += 1
                pause = max(pause, min(0.1 * 2**away, 5))
                logger.warning("store unreachable", extra={"error": one_line(error), "retry_in_s": pause})
            await self._clock.wait(self._wake, pause)

    async def _claim(self) -> None:
        while not self._stopping and len(self._sending) < self._options.concurrency:
            counts = Counter(self._sending.values())
            busy = [receiver for receiver, count in counts.items() if count >= _PER_RECEIVER]
            due = await self._outbox.claim(self._lease_s, busy)
            if due is None:
                return
            task = asyncio.create_task(self._deliver(due), name=due.delivery.id)
            self._sending[task] = due.delivery.endpoint_id
            task.add_done_callback(self._ended)

    async def _forget(self) -> None:
        if self._clock.monotonic() - self._forgot_at >= min(_FORGET_S, self._options.retention_s):
            while await self._outbox.forget(self._options.retention_s):
                pass
            self._forgot_at = self._clock.monotonic()

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._sending[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("delivery broke", extra={"delivery": task.get_name()}, exc_info=error)
        self._wake.set()  # another try may begin

    async def _deliver(self, due: DueDelivery) -> None:
        delivery, event = due.delivery, due.event
        outcome = await self._send(due)
        fields = {
            "delivery": delivery.id,
            "event": event.id,
            "job": event.video_id,
            "endpoint": delivery.endpoint_id or "mail",
            "tries": delivery.tries,
            "status_code": outcome.status_code,
            "seconds": round(outcome.seconds, 3),
        }
        if outcome.delivered:
            logger.info("delivered", extra=fields)
        else:
            logger.warning("not delivered", extra={**fields, "error": outcome.error})
        given_up = outcome.final or delivery.tries >= self._outbox.most_tries
        metrics.deliveries.inc(
            kind="webhook" if delivery.endpoint_id else "mail",
            outcome="delivered" if outcome.delivered else "given_up" if given_up else "again",
        )
        given_up_at = self._clock.monotonic() + self._lease_s
        while True:
            try:
                await self._outbox.record(delivery, outcome)
                return
            except STORE_AWAY as error:
                if self._clock.monotonic() > given_up_at:  # its lease is over, so it is due again
                    logger.warning("delivery not recorded", extra={**fields, "error": one_line(error)})
                    return
                await self._clock.sleep(min(1.0, self._lease_s / 10))

    async def _send(self, due: DueDelivery) -> Outcome:
        delivery, event, endpoint = due.delivery, due.event, due.endpoint
        if delivery.tries > self._outbox.most_tries:
            return _dropped("its last try was cut off")
        if delivery.endpoint_id:
            if endpoint is None:
                return _dropped("the endpoint was deleted")
            if endpoint.disabled_reason is not None:
                return _dropped("the endpoint is disabled")
            return await webhook.send(self._outbound, endpoint, event)
        if self._mailer is None:
            return _dropped("no mail server is configured")
        if due.job is None:
            return _dropped("the video was deleted")
        return await self._mailer.send(delivery, event, due.job)


def _dropped(reason: str) -> Outcome:
    return Outcome(False, 0.0, error=f"not sent: {reason}", final=True)
