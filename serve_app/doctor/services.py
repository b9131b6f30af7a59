"""Checks of the services that a configuration names: database, storage, broker and gateway. Knows no Ray."""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from pathlib import Path

import httpx
from sqlalchemy import select

from serve_app.config import Config
from serve_app.db.database import STORE_AWAY, Database
from serve_app.dispatch.rabbitmq import broker
from serve_app.doctor.finding import Finding, error, ok, warning
from serve_app.errors import ConfigError, one_line
from serve_app.storage import Storage

_QUESTIONS = 20
# Seconds of one question. A claim takes a few, so slower ones delay every job's start and every page of the API.
_SLOW_S, _TOO_SLOW_S = 0.05, 1.0
_OBJECT = 1 << 20
_SLOW_OBJECT_S = 5.0
_ANSWER_S = 10


async def services(config: Config, url: str) -> list[Finding]:
    """Check all services at the same time.

    Args:
        config: all options.
        url: the gateway's URL on this machine; empty if it is not asked.
    """
    looks = [_database(config), _storage(config), _broker(config)]
    found = await asyncio.gather(*looks, *([_gateway(url)] if url else []))
    return [one for several in found for one in several]


async def _database(config: Config) -> list[Finding]:
    check = "database"
    database = Database(config.store_url)
    try:
        await database.connect()
    except ConfigError as problem:
        return [error(check, str(problem), "start it, or correct store.url")]
    try:
        seconds = []
        async with database.read() as session:
            for _ in range(_QUESTIONS):
                began = time.perf_counter()
                await session.execute(select(1))
                seconds.append(time.perf_counter() - began)
        current, newest = await database.revisions()
    except STORE_AWAY as problem:
        return [error(check, f"went away: {one_line(problem)}", "look at the database's log")]
    finally:
        await database.close()
    median = statistics.median(seconds)
    said = f"answers in {median * 1000:.1f} ms (slowest of {_QUESTIONS}: {max(seconds) * 1000:.1f} ms)"
    found = []
    if current != newest:
        tables = f"its tables are at revision {current}, and this version has {newest}"
        found.append(warning(check, tables, "run the doctor of the version that serves; a start migrates older tables"))
    if median > _SLOW_S:
        say = error if median > _TOO_SLOW_S else warning
        found.append(say(check, said, "move it nearer, or find what else it is busy with"))
    return found or [ok(check, said)]


async def _storage(config: Config) -> list[Finding]:
    check = "storage"
    options = config.storage_options
    if not options.bucket and not _is_folder(options.url):
        return [error(check, f"there is no folder {options.url}", "mount it, or correct storage.url")]
    key, content = f"_check/{secrets.token_hex(8)}", secrets.token_bytes(_OBJECT)
    began = time.perf_counter()
    try:
        storage = Storage(options)
        await storage.ping()
        await storage.put(key, content)
        try:
            same = await storage.get(key) == content
        finally:
            await storage.delete(key)
    except (ConfigError, OSError) as problem:
        do = "start it, correct storage.url or its access keys, or free space"
        return [error(check, f"{options.url}: {one_line(problem)}", do)]
    seconds = time.perf_counter() - began
    if not same:
        return [error(check, f"{options.url} returned other bytes than were stored", "do not use this storage")]
    said = f"stored, read and removed 1 MiB at {options.url} in {seconds:.2f} s"
    if seconds > _SLOW_OBJECT_S:
        return [warning(check, said, "move it nearer, or find what slows the network")]
    return [ok(check, said)]


def _is_folder(url: str) -> bool:
    return Path(url.removeprefix("file://")).is_dir()


async def _broker(config: Config) -> list[Finding]:
    check = "broker"
    began = time.perf_counter()
    try:
        messenger = broker(config)
        reason = None if messenger is None else await messenger.away()
    except ConfigError as problem:
        return [error(check, str(problem), "correct WAN_SERVE_QUEUE_URL or queue.url, or the broker's users")]
    if messenger is None:
        return [ok(check, "none, dispatchers look at the database")]
    if reason is not None:
        poll_s = config.dispatcher.poll_s
        return [warning(check, f"away: {reason}", f"start it; until then jobs are found every {poll_s:g} s")]
    return [ok(check, f"let us in after {time.perf_counter() - began:.2f} s")]


async def _gateway(url: str) -> list[Finding]:
    check = "gateway"
    try:
        async with httpx.AsyncClient(timeout=_ANSWER_S, trust_env=False) as client:
            answer = await client.get(f"{url}/readyz")
    except httpx.HTTPError as problem:
        return [
            error(check, f"{url} does not answer: {one_line(problem)}", "look at `serve status`; run this on the head")
        ]
    if answer.status_code != 200:
        return [
            error(check, f"{url}/readyz answers {answer.status_code}: {answer.text[:120]}", "look at `serve status`")
        ]
    body = answer.json()
    if body.get("status") == "paused":
        return [warning(check, f"{url} is ready, and jobs are paused", "`wan-serve jobs resume` if that was not meant")]
    if body.get("status") == "degraded":
        return [
            warning(check, f"{url} accepts jobs and makes no videos: {answer.text[:120]}", "see the findings above")
        ]
    return [ok(check, f"{url} is ready")]
