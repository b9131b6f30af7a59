"""Checks of the services that a configuration needs, before anything starts: database, storage, broker.

Knows nothing of Ray. Each service answers, or is given up, within seconds.
"""

from __future__ import annotations

import asyncio

from serve_app.config import Config
from serve_app.dispatch.rabbitmq import RabbitMQ, broker
from serve_app.errors import ConfigError
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage, trouble_with


async def preflight(config: Config) -> list[str]:
    """Check all services at the same time.

    Returns:
        A line for each thing that is wrong, but does not prevent a start.

    Raises:
        ConfigError: a line for each thing that does.
    """
    messenger = broker(config)
    looks = [_store(config), _storage(config), *([] if messenger is None else [_broker(messenger, config)])]
    found = await asyncio.gather(*looks, return_exceptions=True)
    for error in found:
        if isinstance(error, BaseException) and not isinstance(error, ConfigError):
            raise error
    # A dictionary, since two checks may refuse `home` with the same line.
    if errors := dict.fromkeys(str(error) for error in found if isinstance(error, ConfigError)):
        raise ConfigError("\n".join(errors))
    return [line for line in found if isinstance(line, str)]


async def _store(config: Config) -> str | None:
    store = JobStore.of(config)
    await store.start()
    try:
        if config.auth.mode == "keys" and all(key.revoked_at is not None for key, _ in await store.keys.list()):
            return "auth.mode is keys and there is none, so nobody may call: `wan-serve keys create` makes one"
        return None
    finally:
        await store.close()


async def _storage(config: Config) -> str | None:
    if not config.storage.url:
        config.make_home()
    trouble = await Storage(config.storage_options).trouble()
    if trouble is not None and config.storage.bucket:
        raise trouble_with(config.storage, trouble)
    # A disk that is full becomes free only when old videos are removed, which takes a server.
    return None if trouble is None else f"{trouble}: until then no job is accepted"


async def _broker(broker: RabbitMQ, config: Config) -> str | None:
    reason = await broker.away()
    if reason is None:
        return None
    poll_s = config.dispatcher.poll_s
    return f"queue.url: the broker is away ({reason}); jobs run all the same, looked for every {poll_s:g} s"
